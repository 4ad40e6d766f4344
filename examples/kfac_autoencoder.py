"""Learns to compress handwritten digits to 8 numbers and back, by K-FAC beside Adam.

The deep autoencoder of Hinton & Salakhutdinov (2006), the task on which K-FAC was introduced
(Martens & Grosse 2015): logistic units, fewer from layer to layer down to a linear code, and
mirrored. For 28 × 28 pixels theirs has 1000-500-250-30 units; for 8 × 8 this one has 128-64-32-8,
as deep, and halved as theirs. Its weights begin sparse, without which both optimisers stand still
for long (Martens 2010).

Either optimiser is tried with two batch sizes and some settings, Adam also with a rate that falls
to 0. Every run has the same time: what K-FAC takes for --epochs epochs in batches of 128. Of each,
the run that ends at the lowest training loss is drawn and spoken of. Time is that of whole compiled
epochs, measured by turns. The loss is the cross-entropy of the pixels, less their own entropy,
which no model is below.
"""

import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import pictures
from threadpoolctl import threadpool_limits

import functional_bp as bp

LOSS = bp.losses.sigmoid_cross_entropy
WIDTHS = (128, 64, 32, 8)
BATCHES = (32, 128)
DAMPINGS = (1e-2, 1e-3, 1e-4)
RATES = (3e-3, 1e-2, 3e-2)


def parser():
    it = options.Parser(__doc__)
    it.takes("--epochs", options.whole(), 60, "of K-FAC, in batches of 128")
    it.takes("--seed", options.seed, 0, "of split, weights and batches")
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def sparse(key, shape, dtype):
    """15 weights of each unit are from the standard normal distribution, the others 0."""
    of_inputs, of_values = jax.random.split(key)
    order = jax.random.uniform(of_inputs, shape).argsort().argsort()
    return jnp.where(order < 15, jax.random.normal(of_values, shape, dtype), 0)


def autoencoder(pixels):
    units = (*WIDTHS, *WIDTHS[-2::-1])
    hidden = [
        (bp.dense(n, weight_init=sparse), *([] if n == WIDTHS[-1] else [bp.sigmoid])) for n in units
    ]
    return bp.chain(
        *(layer for part in hidden for layer in part), bp.dense(pixels, weight_init=sparse)
    )


def by_kfac(model, batch, least_damping):
    return bp.kfac(model, LOSS, batch=batch, least_damping=least_damping)


def by_adam(model, batch, rate):
    return optax.with_extra_args_support(optax.adam(rate))


def constant(value, n):
    return [value] * n


def falling(value, n):
    """From the value to 0 along a cosine."""
    return [value * 0.5 * (1 + np.cos(np.pi * i / n)) for i in range(n)]


SETTINGS = {  # for each of n epochs
    "K-FAC": lambda n: {f"least damping {value:g}": constant(value, n) for value in DAMPINGS},
    "Adam": lambda n: {
        f"rate {value:g}{how}": schedule(value, n)
        for value in RATES
        for how, schedule in {"": constant, " falling": falling}.items()
    },
}


def epoch_of(optimizer, model, x, size):
    """``(params, state, setting, order, key) -> (params, state)`` after an epoch, compiled."""
    value_and_grad = bp.value_and_grad(model, LOSS)
    steps = len(x) // size

    @jax.jit
    def epoch(params, state, setting, order, key):
        update = optimizer(model, (x[:size], x[:size]), setting).update

        def step(carried, given):
            (params, state), (index, key) = carried, given
            batch = x[index]
            _, gradient = value_and_grad(params, batch, batch)
            changes, state = update(gradient, state, params, x=batch, y=batch, key=key)
            return (optax.apply_updates(params, changes), state), None

        batches = order[: steps * size].reshape(steps, size)
        return jax.lax.scan(step, (params, state), (batches, jax.random.split(key, steps)))[0]

    return epoch


def seconds_of(epochs, begun):
    """The time of each epoch: the shortest of 20, by turns.

    Each time is that of two on end, 22 steps at least: K-FAC inverts in one step of 20.
    """
    shortest = dict.fromkeys(epochs, np.inf)
    begun, order, key = dict(begun), np.arange(pictures.IMAGES), jax.random.key(0)
    for turn in range(21):  # the first compiles, and in K-FAC's first three steps all is due
        for name, epoch in epochs.items():
            start = time.perf_counter()
            for _ in range(2):
                begun[name] = epoch(*begun[name], 1e-3, order, key)
            jax.block_until_ready(begun[name])
            shortest[name] = min(shortest[name], time.perf_counter() - start if turn else np.inf)
    return {name: both / 2 for name, both in shortest.items()}


class Run(NamedTuple):
    """Its name, and after each epoch the seconds, the training loss and the squared errors of a
    picture, trained and held out; the parameters after the first few epochs and at the end."""

    name: str
    seconds: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    held_out: np.ndarray
    early: tuple
    params: tuple


def train(name, epoch, begun, settings, seconds, evaluate, args):
    """Trains for as many epochs as there are settings."""
    random, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    (params, state), early, curves = begun, None, []
    for i, setting in enumerate(settings):
        key, epoch_key = jax.random.split(key)
        params, state = epoch(
            params, state, setting, random.permutation(pictures.IMAGES), epoch_key
        )
        curves.append([seconds * (i + 1), *map(float, evaluate(params))])
        early = params if i < early_epochs(args) else early
    run = Run(name, *np.array(curves).T, early, params)
    print(
        f"  {name}: {len(settings)} epochs, training loss {run.losses[-1]:.4f}, squared error "
        f"{run.errors[-1]:.3f}, held out {run.held_out[-1]:.3f}",
        flush=True,
    )
    return run


def early_epochs(args):
    return max(1, args.epochs // 10)


def compared(x, held_out, args):
    """The model, and the best run of K-FAC and of Adam."""
    model = autoencoder(x.shape[-1])
    params = jax.jit(model.init)(jax.random.key(args.seed), x[0])
    least = (jax.scipy.special.entr(x) + jax.scipy.special.entr(1 - x)).sum(-1).mean()

    @jax.jit
    def evaluate(params):
        def error(x):
            return ((jax.nn.sigmoid(model.apply(params, x)) - x) ** 2).sum(-1).mean()

        return LOSS.costs(model.apply(params, x), x).mean() - least, error(x), error(held_out)

    kinds = {"K-FAC": by_kfac, "Adam": by_adam}
    keys = [(kind, size) for kind in kinds for size in BATCHES]
    epochs = {key: epoch_of(kinds[key[0]], model, x, key[1]) for key in keys}

    def begin(kind, size):
        return params, kinds[kind](model, (x[:size], x[:size]), 1e-3).init(params)

    begun = {key: begin(*key) for key in keys}
    seconds = seconds_of(epochs, begun)
    for (kind, size), t in seconds.items():
        print(f"{kind}, batch {size}: {1e3 * t / (len(x) // size):.2f} ms a step")
    runs = {kind: [] for kind in kinds}
    for kind, size in keys:
        each = seconds[kind, size]
        n = max(1, round(args.epochs * seconds["K-FAC", 128] / each))
        for name, settings in SETTINGS[kind](n).items():
            named = f"{kind}, batch {size}, {name}"
            given = named, epochs[kind, size], begun[kind, size], settings, each, evaluate, args
            runs[kind].append(train(*given))
    best = {
        kind: min(tried, key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))
        for kind, tried in runs.items()
    }
    return model, best


def finding(best):
    """What the numbers say."""
    first, second = sorted(best, key=lambda kind: best[kind].losses[-1])
    leader, other = best[first], best[second]
    reached = leader.seconds[np.argmax(leader.losses <= other.losses[-1])] / other.seconds[-1]
    n = min(len(run.losses) for run in best.values())
    early = " and ".join(f"{run.errors[n - 1]:.3f} by {kind}" for kind, run in best.items())
    return (
        f"In equal time, {other.seconds[-1]:.2f} s, the squared error of a picture falls to "
        f"{leader.errors[-1]:.3f} by {first} and {other.errors[-1]:.3f} by {second} (held out, "
        f"{leader.held_out[-1]:.3f} and {other.held_out[-1]:.3f}); in {n} epochs to {early}. "
        f"{first} needs {reached:.0%} of the time to be at the training loss at which {second} "
        "ends."
    )


def draw(model, best, digits, path, args):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(14, 4.6), layout="constrained", width_ratios=(3, 3, 4)
    )
    for run in best.values():
        axes[0].semilogy(np.arange(1, len(run.losses) + 1), run.losses, label=run.name)
        axes[1].semilogy(run.seconds, run.losses)
    axes[0].set(xlabel="epochs", ylabel="training loss", title="at equal epochs")
    axes[0].set_xlim(0, min(len(run.losses) for run in best.values()))
    axes[1].set(xlabel="seconds of compiled epochs", title="at equal time")
    axes[1].sharey(axes[0])
    axes[0].legend(fontsize="small")
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
    rows = {"held out": digits}
    for when, of in ((f"after {early_epochs(args)} epochs", "early"), ("at the end", "params")):
        for kind, run in best.items():
            rows[f"{kind}\n{when}"] = jax.nn.sigmoid(model.apply(getattr(run, of), digits))
    strips = [
        np.concatenate([np.pad(d.reshape(8, 8), 1) for d in np.asarray(row)], 1)
        for row in rows.values()
    ]
    axes[2].imshow(np.concatenate(strips), cmap="gray")
    axes[2].set_yticks(10 * np.arange(len(rows)) + 4.5, labels=rows)
    axes[2].set_xticks([])
    figure.supxlabel(textwrap.fill(finding(best), 160), fontsize="small")
    pictures.save(figure, path)


@threadpool_limits.wrap(limits=1, user_api="blas")  # else the threads that invert wait for others'
def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (held_out, labels) = pictures.digits(64, seed=args.seed)
    model, best = compared(jnp.asarray(x), held_out, args)
    digits = held_out[[list(labels).index(label) for label in range(10)]]
    draw(model, best, digits, args.out / "kfac_autoencoder.png", args)
    print(*(f"best: {run.name}" for run in best.values()), finding(best), sep="\n")


if __name__ == "__main__":
    main()
