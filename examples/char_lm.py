"""A character language model, learnt by hand-written backpropagation through time.

An LSTM reads text one character at a time and gives the probabilities of the next. By default the
text is the English that Python carries: the topics of ``help()``. Every epoch prints the bits per
character of held-out text; at the end the model writes text of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options

import functional_bp as bp

CELLS: dict[str, Callable[[int], bp.Layer]] = {"lstm": bp.lstm, "gru": bp.gru, "rnn": bp.rnn}
LOSS = bp.losses.softmax_cross_entropy
HELD_OUT = 0.05  # of the text, at its end

Tree = Any


class TextError(Exception):
    """A text that cannot be learnt from; the message says why."""


def main() -> None:
    given = parser().parse_args()
    text = default_text() if given.text is None else read_text(given.text)
    least = math.ceil(2 * given.length / HELD_OUT) + 2  # a window to hold out, and then some
    if len(text) < least:
        raise TextError(f"text: takes at least {least:,} characters, got {len(text):,}")
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text)).astype(np.int32)
    cut = len(ids) - int(HELD_OUT * len(ids))
    print(f"{cut:,} characters to learn from, {len(ids) - cut:,} held out, {len(characters)} kinds")
    check_resumed(given, characters)

    layers = bp.embedding(len(characters), 64), CELLS[given.cell](given.units)
    model = bp.chain(*layers, bp.dense(len(characters)))
    print(f"\n{bp.summary(model, ids[: given.length])}\n")
    try:
        run = learn(model, ids[:cut], ids[cut:], given)
    except KeyboardInterrupt:
        kept = f"--resume goes on from {checkpoints(given)}"
        print(f"stopped; {kept if has_checkpoints(given) else 'no step is done'}", file=sys.stderr)
        sys.exit(130)  # as a program does that Ctrl-C ends

    seed_text = text[cut : cut + 1]
    first = np.searchsorted(characters, list(seed_text)).astype(np.int32)
    for temperature in given.temperature:
        key = jax.random.key(given.seed)
        written = sample(layers, run.params, first, given.sample, temperature, key)
        print(f"\n--- temperature {temperature} ---")
        print(seed_text + "".join(characters[i] for i in written))


def default_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{path}: takes text in UTF-8, got {error.reason} at byte {error.start}"
        raise TextError(message) from error
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    if not text:
        raise TextError(f"{path}: takes a text, got an empty file")
    return text


def learn(
    model: bp.Layer, train: np.ndarray, held_out: np.ndarray, given: argparse.Namespace
) -> bp.Run:
    """Trains on windows of the text, cut anew every epoch, each from a zero state."""
    length, size = given.length, given.batch_size
    steps = given.epochs * sum(1 for _ in windows(train, length, size, (given.seed, 0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, given.learning_rate, steps // 20, steps)
    begin = time.perf_counter()

    def report(run: bp.Run) -> None:
        history = run.history
        print(
            f"epoch {run.epoch:2d}   {time.perf_counter() - begin:5.1f} s   bits per character: "
            f"{history.epoch_loss[-1] / math.log(2):.3f} learning, "
            f"{history.evaluation['loss'][-1] / math.log(2):.3f} held out",
            flush=True,
        )

    return bp.fit(
        model,
        LOSS,
        jax.jit(model.init)(jax.random.key(given.seed), train[:length]),
        lambda epoch: windows(train, length, size, (given.seed, epoch)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        epochs=given.epochs,
        evaluation=list(windows(held_out, 2 * length, size, None)),
        callbacks=[report],
        checkpoints=checkpoints(given),
        resume=given.resume,
        progress=False,  # it would run into what is printed here
    )


def windows(
    ids: np.ndarray, length: int, size: int, seed: tuple[int, int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (characters, the characters that follow), ``(size, length)`` each, from a random
    place on and in random order; without a seed, from the beginning in order."""
    random = np.random.default_rng(seed)
    first = 0 if seed is None else int(random.integers(length))
    starts = np.arange(first, len(ids) - length, length)
    if seed is not None:
        random.shuffle(starts)
    for begin in range(0, len(starts), size):
        positions = starts[begin : begin + size, None] + np.arange(length)
        yield ids[positions], ids[positions + 1]


def sample(
    layers: tuple[bp.Layer, ...],
    params: Tree,
    first: np.ndarray,
    count: int,
    temperature: float,
    key: jax.Array,
) -> np.ndarray:
    """Characters one after another, each drawn from softmax(logits / temperature) given all before.

    The same layers as the model's, with their state going in and coming out.
    """
    embedding, recurrent = layers
    vocabulary = params[0]["weight"].shape[0]
    one_step = bp.chain(bp.at("x", embedding), recurrent, bp.at("x", bp.dense(vocabulary)))

    def step(carry: Tree, key: jax.Array) -> tuple[Tree, jax.Array]:
        state, last = carry
        y = one_step.apply(params, {"x": last[:, None], "state": state})
        drawn = jax.random.categorical(key, y["x"][:, 0] / temperature).astype(last.dtype)
        return (y["state"], drawn), drawn[0]

    zeros = jnp.zeros((1, params[1]["weight_h"].shape[1]))
    parts = ("h", "c") if recurrent.name.startswith("lstm") else ("h",)
    start = ((dict.fromkeys(parts, zeros),), jnp.asarray(first))
    write = jax.jit(functools.partial(jax.lax.scan, step))
    return np.asarray(write(start, jax.random.split(key, count))[1])


def checkpoints(given: argparse.Namespace) -> Path:
    return given.out / "char-lm-checkpoints"


def has_checkpoints(given: argparse.Namespace) -> bool:
    return any(path.name.isdigit() for path in checkpoints(given).glob("*"))


def check_resumed(given: argparse.Namespace, characters: list[str]) -> None:
    """A resumed run takes the characters of the run it goes on with: their ids are the model's."""
    given.out.mkdir(parents=True, exist_ok=True)
    known = given.out / "char-lm-characters.json"
    if given.resume and has_checkpoints(given):
        theirs = read_characters(known)
        if theirs != characters:
            differ = sorted(set(theirs) ^ set(characters))
            raise TextError(
                f"--resume: takes the text of the run in {given.out}, got one with other "
                f"characters: {differ}"
            )
    else:
        bp.delete_checkpoints(checkpoints(given))  # refused while another run writes there
    write_characters(known, characters)


def read_characters(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(
            f"--resume: takes {path}, the characters of the run to go on with: {error.strerror}"
        ) from error
    try:
        characters = json.loads(content)
    except ValueError:  # neither JSON nor UTF-8
        characters = None
    if not isinstance(characters, list) or not all(isinstance(c, str) for c in characters):
        raise TextError(
            f"--resume: takes {path}, a JSON list of the characters of the run to go on with, got "
            f"{len(content)} bytes that are not a whole one"
        )
    return characters


def write_characters(path: Path, characters: list[str]) -> None:
    """The file is there whole or not at all, and is left alone where it says the same."""
    content = json.dumps(characters)
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") == content:
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            written = Path(folder) / path.name
            written.write_text(content, encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        raise TextError(f"{path}: could not be written: {error.strerror}") from error


def parser() -> argparse.ArgumentParser:
    it = options.Parser(__doc__, needs=("orbax.checkpoint",))
    it.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="learn this text, in UTF-8 (default: the topics of Python's help())",
    )
    it.resumes("checkpoints")
    it.add_argument("--cell", choices=list(CELLS), default="lstm", help="(default: %(default)s)")
    for name, kind, default, meaning in (
        ("--units", options.whole(up_to=10**4), 352, "of the recurrent layer"),
        ("--epochs", options.whole(up_to=10**4), 2, "times to go through the text"),
        ("--batch-size", options.whole(up_to=10**6), 32, "windows for one step"),
        ("--length", options.whole(up_to=10**6), 64, "characters of a window"),
        ("--sample", options.whole(up_to=10**6), 600, "characters to write at the end"),
        ("--seed", options.seed, 0, "of weights, windows and samples"),
    ):
        meaning += " (default: %(default)s)"
        it.add_argument(name, type=kind, metavar="N", default=default, help=meaning)
    it.add_argument(
        "--temperature",
        type=options.number(above=1e-3, up_to=1e3),
        nargs="+",
        metavar="T",
        default=[0.5, 0.8],
        help="of the samples: below 1 likelier characters, above 1 wilder ones (default: 0.5 0.8)",
    )
    it.add_argument(
        "--learning-rate",
        type=options.number(up_to=1e3),
        metavar="R",
        default=1e-2,
        help="of Adam at its highest (default: %(default)s)",
    )
    return it


if __name__ == "__main__":
    try:
        main()
    except (TextError, ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"{error}")
