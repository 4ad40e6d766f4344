"""Learn handwritten digits with gradients from BP1-BP4.

A small network learns scikit-learn's 1,797 digits, or MNIST or Fashion-MNIST from their own files,
by the hand-written δ recursion. After every epoch its gradient is compared with jax.grad's. Two
pictures are written: learning curves, and the size of the errors δ in each layer of a deep sigmoid
network and a deep relu network, before and after they learn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import idx
import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from options import Parser, folder, number, seed, whole
from pictures import digits

import functional_bp as bp

MODEL = bp.chain(bp.dense(256), bp.relu, bp.dense(128), bp.relu, bp.dense(10))
LOSS = bp.losses.softmax_cross_entropy
METRICS = {"accuracy": lambda a, y: a.argmax(-1) == y}

DEPTH, WIDTH = 10, 64  # of the two deep networks

Examples = tuple[np.ndarray, np.ndarray]


def main() -> None:
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = load(options.data)
    print(f"{len(train[1]):,} images to learn from, {len(held_out[1]):,} held out")
    print(f"\n{bp.summary(MODEL, train[0][0])}\n")

    run, difference = learn(train, held_out, options)
    print(f"\ntest accuracy: {run.history.evaluation['accuracy'][-1]:.2%}")
    print(f"largest relative difference of manual and autodiff gradients: {difference:.1e}")
    print(f"compiled, batch of {options.batch_size}:")
    for name, seconds in times(run.params, train, options.batch_size).items():
        print(f"  {name:<21} {1e3 * seconds:6.2f} ms")

    bp.pictures.history(run.history).savefig(options.out / "learning.png", dpi=150)
    draw_errors(
        {name: learn_deep(name, train, options) for name in ("sigmoid", "relu")},
        options.out / "errors.png",
    )
    print(f"pictures: {options.out / 'learning.png'}, {options.out / 'errors.png'}")


def load(data: Path | None) -> tuple[Examples, Examples]:
    """Examples to learn from and held out: images (n, pixels) from 0 to 1, and labels (n,)."""
    if data is not None:
        return idx.load(data, "train"), idx.load(data, "t10k")
    return digits(64, seed=5)  # others: 97 to 99 %


def learn(train: Examples, held_out: Examples, options: argparse.Namespace) -> tuple[bp.Run, float]:
    """Trains MODEL; also gives the largest difference between the two gradients on the way."""
    x, y = train[0][:1000], train[1][:1000]
    manual = jax.jit(bp.grad(MODEL, LOSS, method="manual"))
    autodiff = jax.jit(bp.grad(MODEL, LOSS, method="autodiff"))
    params = jax.jit(MODEL.init)(jax.random.key(options.seed), x[0])
    differences = [relative_difference(manual(params, x, y), autodiff(params, x, y))]

    def report(run: bp.Run) -> None:
        gradients = manual(run.params, x, y), autodiff(run.params, x, y)
        differences.append(relative_difference(*gradients))
        history = run.history
        print(
            f"epoch {run.epoch:2d}   training cost {history.epoch_loss[-1]:.4f}   "
            f"test cost {history.evaluation['loss'][-1]:.4f}   "
            f"test accuracy {history.evaluation['accuracy'][-1]:.2%}   "
            f"manual and autodiff differ by {differences[-1]:.1e}"
        )

    checkpoints = options.out / "digits-checkpoints"
    if not options.resume:
        bp.delete_checkpoints(checkpoints)
    run = bp.fit(
        MODEL,
        LOSS,
        params,
        bp.minibatches(*train, options.batch_size, seed=options.seed),
        optax.adam(options.learning_rate),
        epochs=options.epochs,
        evaluation=bp.minibatches(*held_out, 500),
        metrics=METRICS,
        callbacks=[report],
        checkpoints=checkpoints,
        resume=options.resume,
        progress=False,  # it would run into what is printed here
    )
    return run, max(differences)


def relative_difference(a: Any, b: Any) -> float:
    """max|a − b| / max|b| of the parameter where that is largest."""
    pairs = zip(*map(jax.tree.leaves, jax.device_get((a, b))))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def times(params: Any, train: Examples, size: int) -> dict[str, float]:
    """Seconds for a compiled step by hand, by autodiff, and for every example's gradient norm."""
    x, y = train[0][:size], train[1][:size]
    functions = {
        "step, manual": jax.jit(bp.value_and_grad(MODEL, LOSS, method="manual")),
        "step, autodiff": jax.jit(bp.value_and_grad(MODEL, LOSS, method="autodiff")),
        "every example's norm": jax.jit(bp.per_example_grad_norms(MODEL, LOSS)),
    }
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(200):  # in turn, so that whatever else the machine does meets all of them
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(params, x, y))
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def learn_deep(name: str, train: Examples, options: argparse.Namespace) -> dict[str, bp.Inspection]:
    """A deep network of one activation, looked into before and after plain gradient descent."""
    he_normal = jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)
    hidden = [bp.dense(WIDTH, weight_init=he_normal), getattr(bp, name)] * DEPTH
    model = bp.chain(*hidden, bp.dense(10))
    params = jax.jit(model.init)(jax.random.key(options.seed), train[0][0])
    run = bp.fit(
        model,
        LOSS,
        params,
        bp.minibatches(*train, options.batch_size, seed=options.seed),
        optax.sgd(0.02),
        steps=options.deep_steps,
    )
    look = bp.inspect(model, LOSS)
    x, y = train[0][:500], train[1][:500]
    return {
        "untrained": look(params, x, y, example=None),
        f"after {run.step} steps": look(run.params, x, y, example=None),
    }


def draw_errors(networks: dict[str, dict[str, bp.Inspection]], path: Path) -> None:
    """The errors of every layer, network by network, on one logarithmic scale."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for panel, (name, moments) in zip(
        figure.subplots(1, len(networks), sharey=True), networks.items()
    ):
        bp.pictures.delta_norms(moments, axes=panel)
        first, last = (float(found.cost) for found in moments.values())
        panel.set_title(f"{name}: cost {first:.2f} at first, {last:.2f} at the end")
    figure.suptitle(f"Errors sent back through {DEPTH} hidden layers of {WIDTH} units, means")
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    it = Parser(__doc__, needs=("matplotlib", "sklearn", "orbax.checkpoint"))
    it.add_argument(
        "--data",
        type=folder,
        metavar="DIR",
        help="learn MNIST or Fashion-MNIST from its four IDX files in DIR, plain or gzip "
        "(default: scikit-learn's digits)",
    )
    it.resumes("pictures and checkpoints")
    deep = "steps for which to train each of the two deep networks"
    for name, kind, metavar, default, meaning in (
        ("--epochs", whole(), "N", 20, "times to go through the training images"),
        ("--batch-size", whole(), "N", 32, "images for one step"),
        ("--deep-steps", whole(), "N", 400, deep),
        ("--seed", seed, "N", 0, "of the initial weights and the order of the images"),
        ("--learning-rate", number(), "R", 1e-3, "of Adam"),
    ):
        meaning += " (default: %(default)s)"
        it.add_argument(name, type=kind, metavar=metavar, default=default, help=meaning)
    return it


if __name__ == "__main__":
    try:
        main()
    except idx.IdxError as error:
        sys.exit(f"{error}")
