"""A character language model, learnt by hand-written backpropagation through time.

An LSTM reads text one character at a time and gives the probabilities of the next. By default the
text is the English that Python carries: the topics of ``help()``. Every epoch prints the bits per
character of held-out text; at the end the model writes text of its own.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
from text import HELD_OUT, Kept, TextError, characters_and_ids, reporting, text_of, windows

import functional_bp as bp

CELLS: dict[str, Callable[[int], bp.Layer]] = {"lstm": bp.lstm, "gru": bp.gru, "rnn": bp.rnn}
LOSS = bp.losses.softmax_cross_entropy
NAME = "char-lm"  # of what a run keeps

Tree = Any


def main() -> None:
    given = parser().parse_args()
    # A window to hold out, and then some.
    text = text_of(given.text, math.ceil(2 * given.length / HELD_OUT) + 2)
    characters, ids, cut = characters_and_ids(text)
    kept = Kept(given.out, NAME)
    kept.begin(characters, given.resume)

    layers = bp.embedding(len(characters), 64), CELLS[given.cell](given.units)
    model = bp.chain(*layers, bp.dense(len(characters)))
    print(f"\n{bp.summary(model, ids[: given.length])}\n")
    try:
        run = learn(model, ids[:cut], ids[cut:], given)
    except KeyboardInterrupt:
        kept.stop()

    first = ids[cut : cut + 1]
    for temperature in given.temperature:
        key = jax.random.key(given.seed)
        written = sample(layers, run.params, first, given.sample, temperature, key)
        print(f"\n--- temperature {temperature} ---")
        print(text[cut] + "".join(characters[i] for i in written))


def learn(
    model: bp.Layer, train: np.ndarray, held_out: np.ndarray, given: argparse.Namespace
) -> bp.Run:
    """Trains on windows of the text, cut anew every epoch, each from a zero state."""
    length, size = given.length, given.batch_size
    steps = given.epochs * sum(1 for _ in windows(train, length, size, (given.seed, 0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, given.learning_rate, steps // 20, steps)
    return bp.fit(
        model,
        LOSS,
        jax.jit(model.init)(jax.random.key(given.seed), train[:length]),
        lambda epoch: windows(train, length, size, (given.seed, epoch)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        epochs=given.epochs,
        evaluation=list(windows(held_out, 2 * length, size, None)),
        callbacks=[reporting()],
        checkpoints=Kept(given.out, NAME).checkpoints,
        resume=given.resume,
        progress=False,  # it would run into what is printed here
    )


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


def parser() -> argparse.ArgumentParser:
    it = options.Parser(__doc__, needs=("orbax.checkpoint",))
    it.learns_text()
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
    it.samples_at(0.5, 0.8)
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
