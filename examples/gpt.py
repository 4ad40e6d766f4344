"""A GPT of characters, learnt by hand-written backpropagation, and what it attends to.

A decoder of GPT-2's kind reads text and gives the probabilities of the next character. By default
the text is the English that Python carries: the topics of ``help()``. Every epoch prints the bits
per character of held-out text, in windows as long as the model reads; at the end the model writes
text of its own, and a picture shows where one of its heads looks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path
from typing import Any

import generating
import jax
import numpy as np
import optax
import options
from decoder import Sizes, model_and_loss
from pictures import save
from text import HELD_OUT, Kept, TextError, characters_and_ids, reporting, text_of, windows

import functional_bp as bp

ROTARY = 10_000.0
SIZES = {  # the sizes but for the vocabulary, and the learning rate at its highest
    "tiny": (Sizes(0, 2, 2, 32, 32, ROTARY), 1e-2),
    "small": (Sizes(0, 4, 4, 192, 256, ROTARY), 2e-3),
    "medium": (Sizes(0, 6, 6, 384, 256, ROTARY), 1e-3),
    "gpt2": (Sizes(0, 12, 12, 768, 1024), 6e-4),
}
NAME = "gpt"  # of what a run keeps
LEAST, MOST = 16, 60  # characters of a sentence whose attention is drawn
SPACES = {" ": "␣", "\n": "↵", "\t": "⇥"}  # as they are drawn

Tree = Any


def main() -> None:
    given = parser().parse_args()
    sizes, rate = SIZES[given.size]
    if given.positions is not None:
        rotary = ROTARY if given.positions == "rotary" else None
        sizes = dataclasses.replace(sizes, rotary=rotary)
    # A window to hold out.
    text = text_of(given.text, math.ceil((sizes.positions + 1) / HELD_OUT))
    characters, ids, cut = characters_and_ids(text)
    kept = Kept(given.out, NAME)
    kept.begin(characters, given.resume)

    sizes = dataclasses.replace(sizes, vocabulary=len(characters))
    model, loss = model_and_loss(sizes, given.dropout)
    given.learning_rate = given.learning_rate or rate
    try:
        params, _ = learn(model, loss, ids[:cut], ids[cut:], sizes, given).params
    except KeyboardInterrupt:
        kept.stop()

    write = functools.partial(generating.write, top_k=given.top_k, top_p=given.top_p)
    for temperature in given.temperature:
        key = jax.random.key(given.seed)
        first = ids[None, cut : cut + 1]
        drawn = write(sizes, params, first, given.sample, key, temperature=temperature)
        written = text[cut] + "".join(characters[i] for i in drawn[0])
        print(f"\n--- temperature {temperature} ---\n{written}")
    words = sentence(written, min(MOST, sizes.positions))
    draw_attention(sizes, params, np.searchsorted(characters, list(words)), words, given.out)


def learn(
    model: bp.Layer,
    loss: bp.losses.Loss,
    train: np.ndarray,
    held_out: np.ndarray,
    sizes: Sizes,
    given: argparse.Namespace,
) -> bp.Run:
    """Trains on windows of the text, cut anew every epoch."""
    length, size = sizes.positions, given.batch_size
    batches = functools.partial(windows, train, length, size)
    steps = given.epochs * sum(1 for _ in batches((given.seed, 0)))
    key = jax.random.key(given.seed)
    params = jax.jit(functools.partial(bp.init, model, loss))(key, train[:length], train[:length])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count:,} parameters: {sizes}\n")
    return bp.fit(
        model,
        loss,
        params,
        lambda epoch: batches((given.seed, epoch)),
        optimizer(given.learning_rate, steps),
        epochs=given.epochs,
        key=key if given.dropout else None,
        microbatch=None if given.accumulate == 1 else math.ceil(size / given.accumulate),
        compute_dtype=None if given.dtype == "float32" else given.dtype,
        evaluation=list(windows(held_out, length, size, None)),
        callbacks=[reporting()],
        checkpoints=Kept(given.out, NAME).checkpoints,
        resume=given.resume,
        progress=False,  # it would run into what is printed here
    )


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipped gradients; weights alone decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)

    def decays(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "weight", params)

    adam = optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=decays)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def sentence(text: str, most: int) -> str:
    """The first whole sentence that is neither short nor long, else what there is, cut."""
    whole = re.split(r"(?<=[.!?])\s+", text)[1:-1] or [text]
    return next((s for s in whole if LEAST <= len(s) <= most), whole[0][:most])


def draw_attention(sizes: Sizes, params: Tree, ids: np.ndarray, words: str, out: Path) -> None:
    """Of all heads, the one that looks furthest back, on average over a sentence's characters."""
    from matplotlib.figure import Figure

    p = np.asarray(generating.attention(sizes, params, ids))
    t = np.arange(len(words))
    back = (p * (t[:, None] - t)).sum((-2, -1))
    layer, head = np.unravel_index(back.argmax(), back.shape)
    figure = Figure(figsize=(10, 9.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(p[layer, head], cmap="Blues", vmin=0, vmax=1)
    shown = [SPACES.get(c, c) for c in words]
    axes.set_xticks(t, shown, fontsize=9, family="monospace")
    axes.set_yticks(t, shown, fontsize=9, family="monospace")
    axes.set_xlabel("looks at this character")
    axes.set_ylabel("having read up to this character, to foretell the next")
    axes.set_title(f"Attention p of head {head + 1} in layer {layer + 1}, on text that it wrote")
    figure.colorbar(image, ax=axes, shrink=0.6)
    save(figure, out / "gpt-attention.png")


def parser() -> argparse.ArgumentParser:
    it = options.Parser(__doc__, needs=("matplotlib", "orbax.checkpoint"))
    it.learns_text()
    it.resumes("checkpoints and the picture")
    for name, choices, default, meaning in (
        ("--size", list(SIZES), "small", "(default: %(default)s)"),
        ("--positions", ["rotary", "learned"], None, "(default: learned for gpt2, else rotary)"),
        ("--dtype", ["float32", "bfloat16"], "float32", "of both passes (default: %(default)s)"),
    ):
        it.add_argument(name, choices=choices, default=default, help=meaning)
    for name, kind, default, meaning in (
        ("--epochs", options.whole(up_to=10**4), 6, "times to go through the text"),
        ("--batch-size", options.whole(up_to=10**6), 8, "windows for one step"),
        ("--accumulate", options.whole(up_to=10**6), 1, "parts that a step goes through it in"),
        ("--sample", options.whole(up_to=10**6), 600, "characters to write at the end"),
        ("--seed", options.seed, 0, "of weights, noise, windows and samples"),
    ):
        meaning += " (default: %(default)s)"
        it.add_argument(name, type=kind, metavar="N", default=default, help=meaning)
    for name, kind, default, meaning in (
        ("--learning-rate", options.number(up_to=1e3), None, "at its highest (default: by size)"),
        ("--dropout", options.number(below=1), 0.0, "the part that is dropped (default: none)"),
        ("--top-k", options.whole(up_to=10**6), None, "draw from the likeliest so many"),
        ("--top-p", options.number(up_to=1), 1.0, "draw from the likeliest of this probability"),
    ):
        it.add_argument(name, type=kind, metavar="X", default=default, help=meaning)
    it.samples_at(0.8)
    return it


if __name__ == "__main__":
    try:
        main()
    except (TextError, ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"{error}")
