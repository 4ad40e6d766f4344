"""How many steps go into one call of a compiled program, and the calls.

A call costs the host some tens of microseconds, which is more than a step of a small network. So
batches are gathered, and several steps done in a call. The bits are those of one at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .batches import Form
from .steps import Programs, State

Tree = Any
_MOST = 32  # steps in a call
_BYTES = 2**20  # of the batches in a call
_LEAST = 4  # steps: with room for fewer, it is one
_LONGEST = 0.05  # seconds of a call: so long may Ctrl-C wait
_TIMED = 3  # steps that are waited for, to see how long one takes


class Gathered(NamedTuple):
    """Batches of one form, one after the other in the same arrays.

    Attributes:
      weights: None where every example counts as one.
      steps: how many batches.
    """

    x: Tree
    y: Tree
    weights: Array | np.ndarray | None
    steps: int = 1

    @property
    def examples(self) -> int:
        return int(jax.tree.leaves(self.x)[0].shape[0])


Losses = tuple[Array, int]
"""[loss, Σ w] of steps, and how many of the first are of steps that were done."""


@dataclass(kw_only=True)
class Calls:
    """The calls of a run.

    Attributes:
      given: how many steps to a call; None to choose.
      bound: the most that may go into a call.
      in_loops: whether several may, where batches lie on the host.
      steady: forms of which several do: their steps are known to leave the state's types as they
        are.
    """

    programs: Programs
    rest: Tree
    key: Array | None
    given: int | None
    bound: int
    in_loops: bool
    steady: set[Form] = field(default_factory=set)
    _ones: dict[int, Array] = field(default_factory=dict)
    _counts: dict[int, Array] = field(default_factory=dict)
    _times: dict[Form, list[float]] = field(default_factory=dict)
    _last: float = 0.0

    def size(self, form: Form | None) -> int:
        """For how many steps with batches of a form the program is. It does not hang on time, and
        so is the same in every run."""
        if form is None or not self.in_loops:
            return 1
        if self.given is not None:
            return min(self.given, self.bound)
        fitting = min(_BYTES // max(form.bytes, 1), _MOST)
        return min(fitting if fitting >= _LEAST else 1, self.bound)

    def most(self, form: Form | None) -> int:
        """How many steps with batches of a form go into a call now."""
        if form is None or self.given is not None:
            return self.size(form)
        return min(self.size(form), self.programs.quick.get(form.told, 1))

    def run(
        self, state: State, batches: list[Gathered], form: Form | None
    ) -> tuple[State, list[Losses]]:
        """The state after a step with each batch, of which there are ``most(form)`` or fewer, and
        the losses."""
        losses: list[Losses] = []
        while batches and not self._loops(state, batches[0], form):
            first, *batches = batches
            self.steady.clear()
            x, y, weights = self._joined([first], first.examples)
            state, loss = self.programs.one(state, self.rest, x, y, weights, self.key)
            losses.append((loss, 1))
        if not batches:
            return state, losses
        count, size = sum(batch.steps for batch in batches), self.size(form)
        if count not in self._counts:  # kept on the device: to bring it there takes as long as
            self._counts[count] = jnp.asarray(count)  # all that Python does here
        examples = batches[0].examples // batches[0].steps
        x, y, weights = self._joined(batches, size * examples)
        state, loss = self.programs.several(
            state, self.rest, self._counts[count], x, y, weights, self.key, size=examples
        )
        if form is not None and form.told not in self.programs.quick:
            self._time(form, loss)
        return state, [*losses, (loss, count)]

    def _loops(self, state: State, batch: Gathered, form: Form | None) -> bool:
        """Whether steps with such batches may go into one call."""
        if form is None or not self.in_loops:
            return False
        if form not in self.steady:
            x, y, weights = self._joined([batch], batch.examples)
            if not self.programs.keeps_types(state, self.rest, x, y, weights, self.key):
                return False
            self.steady.add(form)
        return True

    def _joined(self, batches: list[Gathered], rows: int) -> tuple[Tree, Tree, Any]:
        """Batches one after the other, in arrays of so many rows."""
        if len(batches) == 1 and batches[0].examples == rows:
            x, y, weights, _ = batches[0]
            return x, y, self._all_ones(rows) if weights is None else weights
        x, y = jax.tree.map(
            lambda *leaves: _stacked(leaves, rows), *[(batch.x, batch.y) for batch in batches]
        )
        if all(batch.weights is None for batch in batches):
            return x, y, self._all_ones(rows)
        return x, y, _stacked([_weights(batch) for batch in batches], rows)

    def _all_ones(self, rows: int) -> Array:
        if rows not in self._ones:
            self._ones[rows] = jnp.ones(rows, jnp.result_type(float))
        return self._ones[rows]

    def _time(self, form: Form, loss: Array) -> None:
        """Waits for a step, to know how many are done in the time of a call."""
        loss.block_until_ready()
        now = time.perf_counter()
        if form in self._times:
            self._times[form].append(now - self._last)
        else:  # it was compiled
            self._times[form] = []
        self._last = now
        if len(self._times[form]) == _TIMED:
            step = float(np.median(self._times[form]))
            self.programs.quick[form.told] = max(1, int(_LONGEST / step))


def _weights(batch: Gathered) -> Array | np.ndarray:
    if batch.weights is None:
        return np.ones(batch.examples, jnp.result_type(float))
    return batch.weights


def _stacked(leaves: Any, rows: int) -> np.ndarray:
    """The leaves one after the other; what is behind them is not read."""
    out = np.empty((rows, *leaves[0].shape[1:]), leaves[0].dtype)
    begin = 0
    for leaf in leaves:
        out[begin : begin + len(leaf)] = leaf
        begin += len(leaf)
    return out
