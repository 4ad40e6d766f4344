"""Learns handwritten digits with hand-written gradients, beside the proof that they are right.

Trains a small network on scikit-learn's 1,797 real images with gradients from BP1–BP4, prints a
line for each epoch, compares them with jax.grad's on the way, and draws two pictures: the learning
curves, and ‖δ^l‖ in every layer of a deep sigmoid network beside a relu one while they train.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import idx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
METRICS = {"accuracy": lambda a, y: a.argmax(-1) == y}
CLASSES = 10


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="a folder with MNIST's or Fashion-MNIST's four IDX files, plain or gzip; "
        "scikit-learn's digits if not given",
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the data (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="examples in a batch (%(default)s)")
    parser.add_argument(
        "--width", type=int, default=256, help="units of a hidden layer (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start and the order")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for pictures and checkpoints (out)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the folder"
    )
    return parser.parse_args()


def digits(folder, seed):
    """(x, y) to train on and (x, y) held out; each x (n, pixels), from 0 to 1."""
    if folder:
        splits = idx.load(folder)
        return splits["train"], splits["test"]
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32),
        y.astype(np.int32),
        test_size=0.2,
        stratify=y,
        random_state=seed,
    )
    return (x_train, y_train), (x_test, y_test)


def train(model, params, data, held_out, args):
    """Trains, printing a line an epoch; the run, and the largest difference from autodiff."""
    x, y = data[0][: args.batch], data[1][: args.batch]
    manual, autodiff = (
        jax.jit(bp.grad(model, LOSS, method=method)) for method in ("manual", "autodiff")
    )
    differences = [0.0]

    def report(run):
        differences.append(
            relative_difference(manual(run.params, x, y), autodiff(run.params, x, y))
        )
        values = {name: series[-1] for name, series in run.history.evaluation.items()}
        print(
            f"epoch {run.epoch:3d}   loss {run.history.epoch_loss[-1]:.4f}   "
            f"held out: loss {values['loss']:.4f}, accuracy {values['accuracy']:7.2%}   "
            f"|manual - autodiff| / |autodiff| {differences[-1]:.1e}",
            flush=True,
        )

    checkpoints = args.out / "checkpoints"
    if not args.resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    run = bp.fit(
        model,
        LOSS,
        params,
        bp.minibatches(*data, args.batch, seed=args.seed),
        optax.adam(1e-3),
        epochs=args.epochs,
        evaluation=bp.minibatches(*held_out, 1024),
        metrics=METRICS,
        callbacks=[report],
        checkpoints=checkpoints,
        resume=args.resume,
    )
    return run, max(differences)


def relative_difference(tree, reference):
    """The largest max|Δ| / max|leaf| of all leaves."""
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(reference))
    )


def step_times(model, params, x, y, repetitions=200):
    """Median milliseconds of each compiled function, run in turn."""
    functions = {
        "a step by hand": jax.jit(bp.value_and_grad(model, LOSS)),
        "a step by autodiff": jax.jit(bp.value_and_grad(model, LOSS, method="autodiff")),
        "every example's gradient norm": jax.jit(bp.per_example_grad_norms(model, LOSS)),
    }
    times = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(params, x, y))
            if repetition:  # the first one compiles
                times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(ts) for name, ts in times.items()}


def delta_norms(activation, data, args, depth=8, width=64, epochs=15):
    """Mean over examples of ‖δ^l‖ in each hidden layer of a deep network: (epochs + 1, depth)."""
    hidden = [layer for _ in range(depth) for layer in (bp.dense(width), activation)]
    model = bp.chain(*hidden, bp.dense(CLASSES))
    params = model.init(jax.random.key(args.seed), data[0][0])
    deltas = jax.jit(bp.deltas(model, LOSS))
    x, y = data[0][:256], data[1][:256]

    def norms(params):
        of_layers = deltas(params, x, y)[0 : 2 * depth : 2]  # δ^l = ∂C/∂z^l, behind each dense
        return [float(jnp.linalg.norm(delta, axis=-1).mean()) for delta in of_layers]

    rows = [norms(params)]
    bp.fit(
        model,
        LOSS,
        params,
        bp.minibatches(*data, args.batch, seed=args.seed),
        optax.adam(1e-3),
        epochs=epochs,
        callbacks=[lambda run: rows.append(norms(run.params))],
    )
    return np.array(rows)


def draw_learning_curves(history, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = np.arange(1, len(history.epoch_loss) + 1)
    left.semilogy(epochs, history.epoch_loss, label="training")
    left.semilogy(epochs, history.evaluation["loss"], label="held out")
    left.set(xlabel="epoch", ylabel="mean cost C", title="Cross-entropy")
    left.legend(frameon=False)
    right.plot(epochs, 100 * history.evaluation["accuracy"], color="C1")
    best = 100 * history.evaluation["accuracy"][-1]
    right.annotate(
        f"{best:.1f} %", (epochs[-1], best), (0, -16), textcoords="offset points", ha="right"
    )
    right.set(xlabel="epoch", ylabel="% right", title="Accuracy, held out")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_delta_norms(norms, path):
    """One panel per activation, one line per layer, from the first (dark) to the last (light)."""
    figure, panels = plt.subplots(
        1, len(norms), figsize=(10, 4.5), sharey=True, layout="constrained"
    )
    for axes, (name, rows) in zip(panels, norms.items()):
        depth = rows.shape[1]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, depth))
        for layer in range(depth):
            axes.semilogy(rows[:, layer], color=colours[layer], linewidth=2)
        for layer in (0, depth - 1):
            axes.annotate(
                f"layer {layer + 1}",
                (len(rows) - 1, rows[-1, layer]),
                (6, 0),
                textcoords="offset points",
                color=colours[layer],
                va="center",
                annotation_clip=False,
            )
        axes.set(xlabel="epoch", title=f"{depth} {name} layers")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("‖δ$^l$‖, mean over examples")
    figure.suptitle("The error that reaches each layer, while the network trains")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    data, held_out = digits(args.data, args.seed)
    model = bp.chain(
        bp.dense(args.width), bp.relu, bp.dense(args.width), bp.relu, bp.dense(CLASSES)
    )
    params = model.init(jax.random.key(args.seed), data[0][0])
    print(f"{len(data[0])} images to learn from, {len(held_out[0])} held out\n")
    print(bp.summary(model, data[0][0]), end="\n\n")

    run, difference = train(model, params, data, held_out, args)
    print(f"\ntest accuracy {run.history.evaluation['accuracy'][-1]:.2%}")
    exact = " (0: equal to the last bit)" if difference == 0 else ""
    print(f"largest relative difference of manual and autodiff gradients {difference:.1e}{exact}")
    batch = data[0][: args.batch], data[1][: args.batch]
    for name, milliseconds in step_times(model, run.params, *batch).items():
        print(f"{milliseconds:8.3f} ms  {name}, batch of {len(batch[0])}, compiled")

    draw_learning_curves(run.history, args.out / "learning_curves.png")
    norms = {
        name: delta_norms(layer, data, args)
        for name, layer in (("sigmoid", bp.sigmoid), ("relu", bp.relu))
    }
    draw_delta_norms(norms, args.out / "delta_norms.png")
    print(f"pictures: {args.out / 'learning_curves.png'}, {args.out / 'delta_norms.png'}")


if __name__ == "__main__":
    main()
