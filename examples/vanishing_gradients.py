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
import jax.numpy as jnp
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
        before, after, squared = networks[name]
        print(
            f"{name:<10} mean squared error {squared:.4f}   ‖∂C/∂h‖ at the first step over that at "
            f"the last: {before[0] / before[-1]:.0e} before, {after[0] / after[-1]:.0e} after"
        )
    draw(networks, options.out / "vanishing_gradients.png")
    print(f"picture: {options.out / 'vanishing_gradients.png'}")


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
) -> tuple[np.ndarray, np.ndarray, float]:
    """‖∂C/∂h_t‖ ``(t,)``, means over held-out examples, before and after; the error after."""
    model = bp.chain(layer, bp.dense(1))
    params = classic(model.init(jax.random.key(options.seed), held_out[0][0]), options)

    @jax.jit
    def norms(params: Any) -> jax.Array:
        of_states, _ = bp.deltas(model, LOSS)(params, *held_out)
        return jnp.linalg.norm(of_states, axis=-1).mean(0)

    def batches(epoch: int) -> Iterator[Batch]:
        for step in range(options.steps):
            random = np.random.default_rng((options.seed, epoch, step, 1))
            yield adding_problem(random, BATCH, options.length)

    before = np.asarray(norms(params))
    run = bp.fit(
        model,
        LOSS,
        params,
        batches,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate)),
        epochs=1,
    )
    error = model.apply(run.params, held_out[0]) - held_out[1]
    return before, np.asarray(norms(run.params)), float((error**2).mean())


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


def draw(networks: dict[str, tuple[np.ndarray, np.ndarray, float]], path: Path) -> None:
    """Both moments side by side, one line for each network, on one logarithmic scale."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, (before, after, squared) in networks.items():
        steps = np.arange(1, len(before) + 1)
        panels[0].semilogy(steps, before, linewidth=2, label=name)
        panels[1].semilogy(steps, after, linewidth=2, label=f"{name}: error {squared:.4f}")
    panels[0].set_ylabel("‖∂C/∂h$_t$‖, mean over 500 examples")
    for panel, title in zip(panels, ("untrained", "trained, with mean squared error")):
        panel.set(title=title, xlabel="step t; the answer is asked for after the last")
        panel.legend(frameon=False, loc="lower right")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
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
