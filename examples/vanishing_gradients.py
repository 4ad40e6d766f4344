"""Why LSTM exists, in one figure.

Three recurrent networks, a plain one, a GRU and an LSTM, face the adding problem of Hochreiter and
Schmidhuber (1997): a sequence of numbers of which two are marked; at its end, give their sum. A
network can learn from a step far back only as much as the final error reaches it: the picture
shows ‖∂C/∂h_t‖ for every step t, before and after training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from options import Parser, folder, number, seed, whole

import functional_bp as bp

CELLS: dict[str, Callable[..., bp.Layer]] = {"plain RNN": bp.rnn, "GRU": bp.gru, "LSTM": bp.lstm}
LOSS = bp.losses.squared_error
BATCH = 64

Batch = tuple[np.ndarray, np.ndarray]


def main() -> None:
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    held_out = adding_problem(np.random.default_rng(options.seed), 500, options.length)
    print(f"giving 1 always: mean squared error {((held_out[1] - 1) ** 2).mean():.4f}")
    networks = {}
    for name, make in CELLS.items():
        networks[name] = learn(make(options.units, output="last"), held_out, options)
        before, after = networks[name]
        print(
            f"{name:<10} mean squared error {error(after):.4f}   ‖∂C/∂h‖ at the first step over "
            f"that at the last: {reached(before):.0e} before, {reached(after):.0e} after"
        )
    draw(networks, options.out / "vanishing_gradients.png")
    print(f"picture: {options.out / 'vanishing_gradients.png'}")


def error(found: bp.Inspection) -> float:
    """The mean squared error, of which the cost is half."""
    return 2 * float(found.cost)


def reached(found: bp.Inspection) -> float:
    """How much of the error at the last step reaches the first."""
    norms = np.linalg.norm(found[0].d_output, axis=-1).mean(0)
    return float(norms[0] / norms[-1])


def adding_problem(random: np.random.Generator, examples: int, length: int) -> Batch:
    """x ``(n, t, 2)``: numbers from 0 to 1, and marks, one in each half; y ``(n, 1)``: the sum of
    the two numbers that are marked."""
    numbers = random.random((examples, length))
    marks = np.zeros((examples, length))
    rows = np.arange(examples)
    marks[rows, random.integers(0, length // 2, examples)] = 1
    marks[rows, random.integers(length // 2, length, examples)] = 1
    x = np.stack([numbers, marks], axis=-1)
    return x.astype(np.float32), (numbers * marks).sum(1, keepdims=True).astype(np.float32)


def learn(
    layer: bp.Layer, held_out: Batch, options: argparse.Namespace
) -> tuple[bp.Inspection, bp.Inspection]:
    """A network looked into at held-out examples, before and after it learns."""
    model = bp.chain(layer, bp.dense(1))
    params = classic(model.init(jax.random.key(options.seed), held_out[0][0]), options)

    def batches(epoch: int) -> Iterator[Batch]:
        for step in range(options.steps):
            random = np.random.default_rng((options.seed, epoch, step, 1))
            yield adding_problem(random, BATCH, options.length)

    run = bp.fit(
        model,
        LOSS,
        params,
        batches,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate)),
        epochs=1,
    )
    look = bp.inspect(model, LOSS)
    return look(params, *held_out, example=None), look(run.params, *held_out, example=None)


def classic(params: Any, options: argparse.Namespace) -> Any:
    """Every weight anew from −1/√h to 1/√h, as networks began before orthogonal initialisation."""
    bound = options.units**-0.5
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(options.seed + 1), len(leaves))
    return tree.unflatten(
        [
            jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
            if leaf.ndim == 2
            else leaf
            for key, leaf in zip(keys, leaves)
        ]
    )


def draw(networks: dict[str, tuple[bp.Inspection, bp.Inspection]], path: Path) -> None:
    """Both moments side by side, one line for each network, on one logarithmic scale."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    untrained, trained = figure.subplots(1, 2, sharey=True)
    before = {name: found for name, (found, _) in networks.items()}
    after = {f"{name}: error {error(found):.4f}": found for name, (_, found) in networks.items()}
    bp.pictures.through_time(before, axes=untrained)
    bp.pictures.through_time(after, axes=trained)
    untrained.set(title="untrained", ylabel="‖∂C/∂h$_t$‖, mean over 500 examples")
    trained.set(title="trained, with mean squared error", ylabel="")
    for panel in (untrained, trained):
        panel.set(xlabel="step t; the answer is asked for after the last")
    figure.suptitle("How much of the final error reaches step t: the adding problem")
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    it = Parser(__doc__, needs=("matplotlib",))
    for name, kind, metavar, default, meaning in (
        ("--out", folder, "DIR", "out", "folder for the picture"),
        ("--length", whole(2), "N", 60, "steps of a sequence"),
        ("--units", whole(), "N", 64, "of each network"),
        ("--steps", whole(), "N", 1500, "of training, each on 64 new sequences"),
        ("--seed", seed, "N", 0, "of weights and sequences"),
        ("--learning-rate", number(), "R", 3e-3, "of Adam"),
    ):
        meaning += " (default: %(default)s)"
        it.add_argument(name, type=kind, metavar=metavar, default=default, help=meaning)
    return it


if __name__ == "__main__":
    main()
