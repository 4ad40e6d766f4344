"""Trains an unchanged Flax classifier of handwritten digits with differential privacy.

``bp.from_flax`` makes a layer of the module, and the private mechanism of ``dp_sgd.py`` takes it as
it takes any other model; what ε covers is said there. The network has convolutions and a layer
norm, and is written as any Flax network is.

Before training, the clipped gradient of one batch is compared with jax-privacy's of the same
module: the largest difference, the time of one call (median of calls that alternate) and the
temporary memory of the compiled function, each with all examples at once and with a few at a time.
jax-privacy forms the gradient of every example; functional_bp has the factors of those of the
weights. The batch is of held-out images: of the training images nothing is printed.

    python examples/flax_private.py
"""

import statistics
import time

import dp_sgd
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import options
import pictures

import functional_bp as bp

LINES = 8  # printed in the training


class Network(nn.Module):
    """A small convolutional classifier of 8×8 images."""

    width: int

    @nn.compact
    def __call__(self, x):  # (batch, 8, 8, 1) -> (batch, 10)
        x = nn.tanh(nn.Conv(self.width, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.tanh(nn.Conv(2 * self.width, (3, 3))(x))
        x = nn.LayerNorm()(x.reshape(len(x), -1))
        x = nn.tanh(nn.Dense(4 * self.width)(x))
        return nn.Dense(10)(x)


def parser():
    it = options.Parser(__doc__, needs=("matplotlib", "sklearn", *options.PRIVACY))
    dp_sgd.add_mechanism(it, default=3.0, help="noise multiplier σ (%(default)s)")
    it.takes("--steps", options.whole(), 160, "of training")
    it.takes("--learning-rate", options.number(), 0.01, "of Adam")
    it.takes("--width", options.whole(), 16, "channels at first")
    it.takes("--batch", options.whole(up_to=pictures.HELD_OUT), 256, "examples of the comparison")
    it.takes("--microbatch", options.whole(), 16, "of them at a time, a divisor of their number")
    it.takes("--calls", options.whole(), 15, "timed calls of each")
    it.add_argument(
        "--seed",
        type=options.seed,
        help="only to repeat a demonstration: then nothing is private (default: a new key from the "
        "operating system)",
    )
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def by_jax_privacy(module, max_norm, batch, microbatch=None):
    """``(params, x, y) -> gradient``, the mean of a batch's clipped gradients."""
    import jax_privacy

    def cost(params, x, y):
        logits = module.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax_privacy.clipped_grad(
        cost,
        l2_clip_norm=max_norm,
        normalize_by=batch,
        batch_argnums=(1, 2),
        microbatch_size=microbatch,
    )


def compare(functions, params, x, y, calls):
    """Prints of each function how far it is from the first, its milliseconds and its memory, and
    returns ``{name: (milliseconds, MiB)}``."""
    compiled = {
        name: jax.jit(function).lower(params, x, y).compile()
        for name, function in functions.items()
    }
    first, *_ = results = [function(params, x, y) for function in compiled.values()]
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(first))
    seconds = {name: [] for name in compiled}
    for _ in range(calls):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(params, x, y))
            seconds[name].append(time.perf_counter() - start)
    print(f"  its largest number is {largest:.2e}")
    costs = {}
    for (name, function), result in zip(compiled.items(), results):
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, result)
        difference = max(map(float, jax.tree.leaves(differences)))
        milliseconds = 1e3 * statistics.median(seconds[name])
        mebibytes = function.memory_analysis().temp_size_in_bytes / 2**20
        costs[name] = milliseconds, mebibytes
        print(
            f"  {name:<28} {milliseconds:8.2f} ms  {mebibytes:8.2f} MiB   "
            f"largest difference {difference:.1e}"
        )
    return costs


def train(model, params, gradient, data, held_out, args):
    """``(steps, held-out accuracies after them)``."""
    optimizer = optax.adam(args.learning_rate)
    step = jax.jit(dp_sgd.descent(optimizer, gradient))

    @jax.jit
    def accuracy(params, x, y):
        return (model.apply(params, x).argmax(-1) == y).mean()

    ends = sorted({round(args.steps * (i + 1) / LINES) for i in range(LINES)} - {0})
    data, state, accuracies = jax.device_put(data), optimizer.init(params), []
    # One step a call: on a CPU, XLA's convolutions are several times slower within a scan.
    for i, key in enumerate(jax.random.split(dp_sgd.key_of_run(args.seed, 0), args.steps), 1):
        params, state = step(params, state, key, *data)
        if i in ends:
            accuracies.append(float(accuracy(params, *held_out)))
            print(f"  step {i:4d}   held out {accuracies[-1]:7.2%}", flush=True)
    return ends, accuracies


def draw(costs, ends, accuracies, said, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    names = ["\n(".join(name.split(" (")) for name in costs]
    for axis, values, title in zip(
        axes, zip(*costs.values()), ("milliseconds of one call", "MiB of temporary memory")
    ):
        bars = axis.bar(names, values, color=["C0", "0.7"] * 2)
        axis.bar_label(bars, fmt="%.3g")
        axis.set(title=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=7)
    axes[2].plot(ends, accuracies, marker=".")
    axes[2].set(xlabel="steps", title="accuracy on held-out digits")
    axes[2].grid(alpha=0.3)
    axes[2].text(0.97, 0.05, said, transform=axes[2].transAxes, ha="right")
    figure.suptitle("The clipped gradient of one Flax network, and its private training")
    pictures.save(figure, path)


def main():
    args = parser().parse_args()
    if args.batch % args.microbatch:
        parser().error(f"--microbatch: takes a divisor of {args.batch}, got {args.microbatch}")
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), held_out = pictures.digits(8, 8, 1)
    module = Network(args.width)
    model = bp.from_flax(module)
    params = model.init(jax.random.key(0), x[0])  # public: of the image only its shape is used
    batch, max_norm = args.batch, args.max_norm
    functions = {}
    for at_a_time, said in (
        (None, "all at once"),
        (args.microbatch, f"{args.microbatch} at a time"),
    ):
        functions[f"functional_bp ({said})"] = bp.clipped_grad(
            model, dp_sgd.LOSS, max_norm, normalize_by=batch, microbatch=at_a_time
        )
        functions[f"jax-privacy ({said})"] = by_jax_privacy(module, max_norm, batch, at_a_time)
    compared = [array[:batch] for array in held_out]
    norms = jax.jit(bp.per_example_grad_norms(model, dp_sgd.LOSS))(params, *compared)
    print(
        f"clipped gradient of {batch} held-out images, {(norms > max_norm).sum()} of them clipped"
    )
    costs = compare(functions, params, *compared, args.calls)

    n, rows = len(x), dp_sgd.rows_for(len(x), args.rate)
    dp_sgd.print_sampling(n, args.rate, rows, args.seed)
    gradient = dp_sgd.private_gradient(model, n, args.rate, rows, max_norm, args.noise)
    ends, accuracies = train(model, params, gradient, (x, y), held_out, args)
    [epsilon] = dp_sgd.epsilons(n, args.rate, rows, args.noise, args.delta, [args.steps])
    draw(costs, ends, accuracies, f"ε = {epsilon:.2f}", args.out / "flax_private.png")
    print(f"held out {accuracies[-1]:.2%}, {dp_sgd.guarantee(epsilon, args.delta, args.seed)}")


if __name__ == "__main__":
    main()
