"""Learns handwritten digits by K-FAC beside Adam, at equal epochs and at equal time.

Both train the same deep, narrow-waisted classifier from the same start on the same batches; K-FAC's
Kronecker factors come from the same δ recursion as the gradients. Adam goes on until it has had
K-FAC's time, which is that of the compiled steps alone. Prints a line an epoch and draws the
training loss against epochs and against seconds.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import pictures

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
WIDTHS = (128, 64, 32, 64, 128)


def parser():
    it = options.Parser(__doc__)
    it.takes("--epochs", options.whole(), 12, "of K-FAC")
    it.takes("--batch", options.whole(up_to=pictures.IMAGES), 128, "examples in a batch")
    it.takes("--seed", options.seed, 0, "of split, weights and batches")
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def train(model, params, optimizer, data, held_out, args, seconds=0.0):
    """``(seconds, losses, accuracies)`` after each epoch, the compiling not counted, until
    ``args.epochs`` and ``seconds`` have passed."""
    x, y = map(jnp.asarray, data)
    value_and_grad = bp.value_and_grad(model, LOSS)

    @jax.jit
    def step(params, state, index, key):
        batch = x[index], y[index]
        cost, gradient = value_and_grad(params, *batch)
        updates, state = optimizer.update(gradient, state, params, x=batch[0], y=batch[1], key=key)
        return optax.apply_updates(params, updates), state, cost

    @jax.jit
    def evaluate(params):
        cost = LOSS.costs(model.apply(params, x), y).mean()
        return cost, (model.apply(params, held_out[0]).argmax(-1) == held_out[1]).mean()

    state = optimizer.init(params)
    random, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    step = step.lower(params, state, np.arange(args.batch), key).compile()
    spent, curves = 0.0, []
    while len(curves) < args.epochs or spent < seconds:
        order = random.permutation(len(x))
        for i in range(len(x) // args.batch):
            key, step_key = jax.random.split(key)
            index = order[i * args.batch : (i + 1) * args.batch]
            start = time.perf_counter()
            params, state, cost = step(params, state, index, step_key)
            jax.block_until_ready(params)
            spent += time.perf_counter() - start
        cost, accuracy = map(float, evaluate(params))
        curves.append((spent, cost, accuracy))
        print(
            f"  epoch {len(curves):3d}   {spent:6.2f} s   training loss {cost:.5f}   "
            f"held out {accuracy:7.2%}",
            flush=True,
        )
    return np.array(curves).T


def draw(curves, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, (seconds, losses, _) in curves.items():
        axes[0].semilogy(np.arange(1, len(losses) + 1), losses, marker=".", label=name)
        axes[1].semilogy(seconds, losses, marker=".", label=name)
    epochs = min(len(losses) for _, losses, _ in curves.values())
    axes[0].set(xlabel="epochs", ylabel="training loss", title="at equal epochs")
    axes[0].set_xlim(0.5, epochs + 0.5)
    axes[1].set(xlabel="seconds of compiled steps", title="at equal time")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    pictures.save(figure, path)


def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data, held_out = pictures.digits(64, seed=args.seed)
    model = bp.chain(
        *(layer for width in WIDTHS for layer in (bp.dense(width), bp.tanh)), bp.dense(10)
    )
    params = model.init(jax.random.key(args.seed), data[0][0])
    batch = jax.tree.map(lambda leaf: leaf[: args.batch], data)
    optimizers = {
        "K-FAC": bp.kfac(model, LOSS, 0.3, batch=batch),
        "Adam": optax.with_extra_args_support(optax.adam(3e-3)),
    }
    curves, seconds = {}, 0.0
    for name, optimizer in optimizers.items():
        print(name)
        curves[name] = train(model, params, optimizer, data, held_out, args, seconds)
        seconds = seconds or curves[name][0][-1]
    for name, (spent, losses, accuracies) in curves.items():
        at = np.searchsorted(spent, seconds, side="right") - 1
        print(
            f"{name}: after {args.epochs} epochs, loss {losses[args.epochs - 1]:.5f}, "
            f"{accuracies[args.epochs - 1]:.2%}; "
            f"after {seconds:.2f} s, loss {losses[at]:.5f}, {accuracies[at]:.2%}"
        )
    draw(curves, args.out / "kfac_digits.png")


if __name__ == "__main__":
    main()
