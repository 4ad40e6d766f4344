"""One comparison: candidates by turns in one process, in random order.

What machine and neighbours do to one candidate they do to the next a moment later, so the ratio
of two times from the same turn is steadier than either time. A comparison reports the median of
those ratios with its quartiles, what the compiled programs take for temporaries, and what tracing
and compiling cost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Tree = Any
MIB = 2**20


def wall(function: Callable[..., Tree], arguments: tuple[Tree, ...]) -> float:
    """Seconds until a call's results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


@dataclass(frozen=True)
class Candidate:
    """One way to compute something.

    Attributes:
      name: what it is; see the package's docstring.
      make: ``() -> (function, arguments)``; an ImportError from it skips the candidate.
      jit: compile the function, and measure that too; else it is called as it stands.
      same: it computes what the row's first candidate does, which is then checked.
      clock: ``(function, arguments) -> seconds`` of one call.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Tree], tuple[Tree, ...]]]
    jit: bool = True
    same: bool = True
    clock: Callable[[Callable[..., Tree], tuple[Tree, ...]], float] = wall


@dataclass(frozen=True)
class Row:
    """A comparison: a title and its candidates, ours first.

    With ``run=False`` nothing is called: tracing, compiling and memory only, for which the
    arguments may be ``ShapeDtypeStruct``.
    """

    title: str
    candidates: Sequence[Candidate]
    run: bool = True


@dataclass(frozen=True)
class Result:
    """What was measured of one candidate; None where it does not apply.

    ``ratio`` is (lower quartile, median, upper quartile) of our time over this candidate's.
    """

    name: str
    seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    turns: int = 0
    temp_bytes: int | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None


def compare(
    row: Row, *, budget: float = 6.0, turns: tuple[int, int] = (5, 400)
) -> tuple[list[Result], list[str]]:
    """Measures a row.

    Args:
      row: what to compare.
      budget: seconds to spend on calls, shared equally among the candidates.
      turns: the fewest and the most calls of each candidate, whatever the budget.

    Returns:
      A result for each candidate, and a line for each that was skipped.

    Raises:
      AssertionError: where candidates that should compute the same do not.
    """
    present, skipped = [], []
    for candidate in row.candidates:
        try:
            present.append((candidate, *candidate.make()))
        except ImportError as error:
            skipped.append(f"{row.title}: {candidate.name} skipped, {error}")
    if not present or present[0][0] is not row.candidates[0]:
        return [], skipped
    compiled = _compiled(present, budget / 4 if row.run else 2 * budget)
    ready = [
        (candidate, program or function, arguments)
        for (candidate, function, arguments), (program, *_) in zip(present, compiled)
    ]
    times = [[] for _ in ready]
    if row.run:
        _check_same(row.title, ready)
        times = _times(ready, budget, turns)
    results = [
        Result(
            name=candidate.name,
            seconds=float(np.median(t)) if t else None,
            ratio=_ratio(times[0], t) if t else None,
            turns=len(t),
            temp_bytes=program and program.memory_analysis().temp_size_in_bytes,
            trace_seconds=trace,
            compile_seconds=compile_,
        )
        for (candidate, *_), (program, trace, compile_), t in zip(present, compiled, times)
    ]
    return results, skipped


def _times(ready: Sequence[tuple], budget: float, turns: tuple[int, int]) -> list[list[float]]:
    """Seconds of every call. A candidate whose share of the budget is spent sits out."""
    fewest, most = turns
    times: list[list[float]] = [[] for _ in ready]
    playing = list(range(len(ready)))
    while playing:
        for i in random.sample(playing, len(playing)):
            candidate, function, arguments = ready[i]
            times[i].append(candidate.clock(function, arguments))
        done = len(times[0])
        playing = [
            i
            for i in playing
            if done < fewest or (done < most and sum(times[i]) < budget / len(ready))
        ]
        if playing and playing[0] != 0:
            playing = [0, *playing]  # ours is in every turn: the others are measured against it
        if playing == [0]:
            break
    return times


def _ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    ratios = np.array(ours[: len(theirs)]) / np.array(theirs)
    return tuple(float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))


def _compiled(present: Sequence[tuple], budget: float) -> list[tuple[Any, Any, Any]]:
    """(program, trace seconds, compile seconds) of each candidate, medians of up to five.

    Every time through a function that was made anew, which JAX's caches do not know, and by turns,
    so that no candidate pays for what JAX prepares once in a process.
    """
    programs: list[Any] = [None] * len(present)
    traces: list[list[float]] = [[] for _ in present]
    compiles: list[list[float]] = [[] for _ in present]
    start = time.perf_counter()
    for turn in range(5):
        if turn > 1 and time.perf_counter() - start > budget:
            break
        for i in random.sample(range(len(present)), len(present)):
            candidate, function, arguments = present[i]
            if candidate.jit:
                function = candidate.make()[0] if turn else function
                begin = time.perf_counter()
                traced = jax.jit(lambda *a, f=function: f(*a)).trace(*arguments)
                traced_at = time.perf_counter()
                programs[i] = traced.lower().compile()
                traces[i].append(traced_at - begin)
                compiles[i].append(time.perf_counter() - traced_at)
    # The first time through fills JAX's caches of its own functions.
    return [
        (program, np.median(t[1:]).item() if t else None, np.median(c[1:]).item() if c else None)
        for program, t, c in zip(programs, traces, compiles)
    ]


def _check_same(title: str, ready: Sequence[tuple]) -> None:
    """Also the call that warms every candidate up."""
    (_, ours, arguments), *others = ready
    expected = jax.tree.leaves(jax.block_until_ready(ours(*arguments)))
    for candidate, function, arguments in others:
        got = jax.tree.leaves(jax.block_until_ready(function(*arguments)))
        if candidate.same:
            assert len(got) == len(expected), f"{title}: {candidate.name} gives another tree"
            worst = max(map(_error, got, expected))
            assert worst < 1e-3, f"{title}: {candidate.name} differs from ours by {worst:.1e}"


def _error(got: Tree, expected: Tree) -> float:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{got.shape} is not {expected.shape}"
    return float(np.abs(got - expected).max() / (np.abs(expected).max() + 1e-30))


HEADER = """\
| | | ms | ours ÷ this, median (quartiles) | temp MiB | trace ms | compile ms |
|---|---|--:|--:|--:|--:|--:|"""


def lines_of(title: str, results: Sequence[Result]) -> list[str]:
    """A row's lines in the table."""
    lines = []
    for i, r in enumerate(results):
        ratio = "" if r.ratio is None or i == 0 else "{1:.3f} ({0:.3f}–{2:.3f})".format(*r.ratio)
        cells = (
            title if i == 0 else "",
            r.name,
            _number(r.seconds, 1e3),
            ratio,
            _number(r.temp_bytes, 1 / MIB),
            _number(r.trace_seconds, 1e3),
            _number(r.compile_seconds, 1e3),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:.{0 if value * scale >= 100 else 2}f}"
