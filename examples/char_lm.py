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
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functional_bp as bp

CELLS: dict[str, Callable[[int], bp.Layer]] = {"lstm": bp.lstm, "gru": bp.gru, "rnn": bp.rnn}
LOSS = bp.losses.softmax_cross_entropy
HELD_OUT = 0.05  # of the text, at its end

Tree = Any


class TextError(Exception):
    """A text that cannot be learnt from; the message says why."""


def main() -> None:
    options = command_line()
    text = default_text() if options.text is None else read_text(options.text)
    least = math.ceil(2 * options.length / HELD_OUT) + 2  # a window to hold out, and then some
    if len(text) < least:
        raise TextError(f"text: takes at least {least:,} characters, got {len(text):,}")
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text)).astype(np.int32)
    cut = len(ids) - int(HELD_OUT * len(ids))
    print(f"{cut:,} characters to learn from, {len(ids) - cut:,} held out, {len(characters)} kinds")
    check_resumed(options, characters)

    layers = bp.embedding(len(characters), 64), CELLS[options.cell](options.units)
    model = bp.chain(*layers, bp.dense(len(characters)))
    print(f"\n{bp.summary(model, ids[: options.length])}\n")
    run = learn(model, ids[:cut], ids[cut:], options)

    seed_text = text[cut : cut + 1]
    first = np.searchsorted(characters, list(seed_text)).astype(np.int32)
    for temperature in options.temperature:
        key = jax.random.key(options.seed)
        written = sample(layers, run.params, first, options.sample, temperature, key)
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
    model: bp.Layer, train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace
) -> bp.Run:
    """Trains on windows of the text, cut anew every epoch, each from a zero state."""
    length, size = options.length, options.batch_size
    steps = options.epochs * sum(1 for _ in windows(train, length, size, (options.seed, 0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, steps // 20, steps)
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
        jax.jit(model.init)(jax.random.key(options.seed), train[:length]),
        lambda epoch: windows(train, length, size, (options.seed, epoch)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        epochs=options.epochs,
        evaluation=list(windows(held_out, 2 * length, size, None)),
        callbacks=[report],
        checkpoints=checkpoints(options),
        resume=options.resume,
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


def checkpoints(options: argparse.Namespace) -> Path:
    return options.out / "char-lm-checkpoints"


def check_resumed(options: argparse.Namespace, characters: list[str]) -> None:
    """A resumed run takes the characters of the run it goes on with: their ids are the model's."""
    options.out.mkdir(parents=True, exist_ok=True)
    known = options.out / "char-lm-characters.json"
    if not options.resume:
        shutil.rmtree(checkpoints(options), ignore_errors=True)
    elif known.exists():
        theirs = json.loads(known.read_text(encoding="utf-8"))
        if theirs != characters:
            differ = sorted(set(theirs) ^ set(characters))
            raise TextError(
                f"--resume: takes the text of the run in {options.out}, got one with other "
                f"characters: {differ}"
            )
    elif checkpoints(options).exists():
        raise TextError(f"--resume: takes {known}, the characters of the run to go on with")
    known.write_text(json.dumps(characters), encoding="utf-8")


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="learn this text, in UTF-8 (default: the topics of Python's help())",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("out"),
        help="folder for the checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the latest checkpoint in the output folder; a run without this option "
        "deletes the checkpoints there and begins anew",
    )
    parser.add_argument(
        "--cell", choices=list(CELLS), default="lstm", help="(default: %(default)s)"
    )
    for name, default, meaning in (
        ("--units", 352, "of the recurrent layer"),
        ("--epochs", 2, "times to go through the text"),
        ("--batch-size", 32, "windows for one step"),
        ("--length", 64, "characters of a window"),
        ("--sample", 600, "characters to write at the end"),
        ("--seed", 0, "of weights, windows and samples"),
    ):
        parser.add_argument(
            name, type=int, metavar="N", default=default, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        default=[0.5, 0.8],
        help="of the samples: below 1 likelier characters, above 1 wilder ones (default: 0.5 0.8)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="R",
        default=1e-2,
        help="of Adam at its highest (default: %(default)s)",
    )
    options = parser.parse_args()
    for name in ("units", "epochs", "batch_size", "length", "sample"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} takes a number from 1")
    if not all(temperature > 0 for temperature in options.temperature):
        parser.error("--temperature takes numbers above 0")
    return options


if __name__ == "__main__":
    try:
        main()
    except (TextError, bp.ModelError) as error:
        sys.exit(f"{error}")
