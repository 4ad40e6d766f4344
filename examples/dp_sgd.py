"""Learns handwritten digits under differential privacy: DP-SGD on clipped per-example gradients.

Every step draws each of the N training images with probability q (Poisson sampling), clips each
drawn image's gradient to an L2 norm of C, adds up, adds Gaussian noise and divides by qN, the
expected number drawn. Adding or removing one image changes the sum by at most C, so noise of
standard deviation σC on the sum is the Gaussian mechanism of noise multiplier σ.

A batch has a static number of rows; where more images are drawn, a random subset of them is
used. (ε, δ) is what dp-accounting's PLD accountant, for adding or removing one image, gives for
its TruncatedSubsampledGaussianDpEvent, in which that truncation is accounted for. (An example,
not a product: the noise is jax.random's, floating-point and not cryptographic.)

Prints a line now and then, and draws accuracy against ε for several σ, beside training
without privacy. (Abadi et al. 2016, "Deep learning with differential privacy".)
"""

import argparse
from pathlib import Path

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting.pld import PLDAccountant
from jax import lax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
CLASSES = 10


def number(low, high):
    """What argparse takes for a number above ``low`` and up to ``high``."""

    def parse(text):
        value = float(text)
        if not low < value <= high:
            raise argparse.ArgumentTypeError(
                f"takes a number above {low}, up to {high}; got {text}"
            )
        return value

    return parse


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = number(0, float("inf"))
    parser.add_argument(
        "--noise",
        type=positive,
        nargs="+",
        default=[2.0, 4.0, 8.0],
        metavar="SIGMA",
        help="noise multipliers, one run each (2 4 8)",
    )
    parser.add_argument(
        "--rate", type=number(0, 1), default=0.25, help="q, the sampling rate (%(default)s)"
    )
    parser.add_argument("--max-norm", type=positive, default=1.0, help="C (%(default)s)")
    parser.add_argument(
        "--delta", type=number(0, 1), default=1e-4, help="δ, below 1 / N (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=240, help="steps of a run (%(default)s)")
    parser.add_argument(
        "--learning-rate", type=positive, default=0.02, help="of Adam (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the picture (out)"
    )
    return parser.parse_args(argv)


def rows_for(n, rate):
    """A static number of rows that Poisson sampling exceeds in one step of a thousand."""
    return min(n, int(np.ceil(n * rate + 3.1 * np.sqrt(n * rate * (1 - rate)))))


def poisson_batch(key, n, rate, rows):
    """Indices of a batch's rows and their weights: 1 for an image drawn, 0 for padding.

    The images are put in the order of independent uniform numbers; those below q are drawn, and
    the first rows are a uniformly random subset of them where they are too many.
    """
    u = jax.random.uniform(key, (n,))
    index = jnp.argsort(u)[:rows]
    return index, (u[index] < rate).astype(jnp.float32)


def epsilons(n, rate, rows, noise, delta, steps):
    """ε after each number of steps in ``steps``, ascending."""
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(n, rate, rows, noise)
    accountant, done, values = PLDAccountant(), 0, []
    for step in steps:
        accountant.compose(event, step - done)
        done = step
        values.append(accountant.get_epsilon(delta))
    return values


def private_gradient(model, max_norm, expected, noise):
    """``(params, x, y, weights, key) -> (cost, gradient)``, the noisy mean of clipped gradients."""
    clipped = bp.clipped_grad(model, LOSS, max_norm, normalize_by=expected, has_aux=True)

    def fn(params, x, y, weights, key):
        gradient, seen = clipped(params, x, y, weights=weights)
        leaves, tree = jax.tree.flatten(gradient)
        # One image more or less moves the gradient by at most max_norm / expected.
        sigma = noise * max_norm / expected
        keys = jax.random.split(key, len(leaves))
        noisy = [g + sigma * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys)]
        return seen.loss, jax.tree.unflatten(tree, noisy)

    return fn


def train(model, params, data, held_out, gradient, sample, args, every):
    """Held-out accuracy after every so many steps."""
    x, y = map(jnp.asarray, data)
    optimizer = optax.adam(args.learning_rate)

    def step(carry, key):
        params, state = carry
        sample_key, noise_key = jax.random.split(key)
        index, weights = sample(sample_key)
        cost, g = gradient(params, x[index], y[index], weights, noise_key)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), cost

    @jax.jit
    def stretch(carry, keys):
        carry, losses = lax.scan(step, carry, keys)
        accuracy = (model.apply(carry[0], held_out[0]).argmax(-1) == held_out[1]).mean()
        return carry, losses.mean(), accuracy

    carry = params, optimizer.init(params)
    keys = jax.random.split(jax.random.key(args.seed + 1), args.steps).reshape(-1, every)
    accuracies = []
    for i, some in enumerate(keys):
        carry, cost, accuracy = stretch(carry, some)
        accuracies.append(float(accuracy))
        print(
            f"  step {(i + 1) * every:4d}   loss {cost:.4f}   held out {accuracy:7.2%}", flush=True
        )
    return accuracies


def draw(curves, without, args, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for noise, (spent, accuracies) in curves.items():
        axes.plot(spent, accuracies, marker=".", label=f"noise multiplier σ = {noise:g}")
    axes.axhline(without, color="0.4", linestyle="--", label="without privacy")
    axes.set_xscale("log")
    axes.set_xlabel(f"ε spent, at δ = {args.delta:g}")
    axes.set_ylabel("accuracy on held-out digits")
    axes.set_title("DP-SGD on 1,437 handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main():
    args = arguments()
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int32), test_size=0.2, stratify=y,
        random_state=args.seed,
    )  # fmt: skip
    n, every = len(x), max(1, args.steps // 12)
    args.steps = every * max(1, args.steps // every)
    rows = rows_for(n, args.rate)
    model = bp.chain(bp.dense(64), bp.tanh, bp.dense(CLASSES))
    params = model.init(jax.random.key(args.seed), x[0])
    print(f"{n} images, each drawn with probability {args.rate}; {rows} rows in a batch")

    def sample(key):
        return poisson_batch(key, n, args.rate, rows)

    def run(gradient):
        return train(model, params, (x, y), (x_test, y_test), gradient, sample, args, every)

    print("without privacy")

    def plain(params, x, y, weights, key):
        return bp.value_and_grad(model, LOSS)(params, x, y, weights=weights)

    without = run(plain)[-1]
    curves = {}
    for noise in args.noise:
        print(f"noise multiplier {noise:g}")
        accuracies = run(private_gradient(model, args.max_norm, n * args.rate, noise))
        steps = range(every, args.steps + 1, every)
        spent = epsilons(n, args.rate, rows, noise, args.delta, steps)
        curves[noise] = spent, accuracies
        print(f"  ({spent[-1]:.3f}, {args.delta:g})-differentially private")
    draw(curves, without, args, args.out / "dp_sgd.png")


if __name__ == "__main__":
    main()
