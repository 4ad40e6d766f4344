"""Learns handwritten digits under differential privacy: DP-SGD on clipped per-example gradients.

Every step draws each of the N training images with probability q (Poisson sampling), clips each
drawn image's gradient gₙ to an L2 norm of C, adds up, adds Gaussian noise z and divides by qN:

    g = (Σ_drawn gₙ min(1, C / ‖gₙ‖) + σC z) / qN

What is protected: whether any one image is among the N. N itself is taken as public: the divisor
qN and the rows of a batch are made from it, and the accountant is told it. No cost of a training
image is printed. The accuracy is that of held-out images, which are not protected. The split comes
first: neighbouring sets of training images have the same images held out.

How far one image reaches: a batch has a fixed number of rows. Where more images are drawn than
that, a uniformly random subset of them is used. While the rows suffice, one image more or less
changes the sum by at most C. In a truncated batch an image can take the place of another, and then
changes the sum by up to 2C. dp-accounting's truncated subsampled Gaussian mechanism counts both:
sensitivity 2C with the probability that the other images fill the rows, sensitivity C otherwise.
Its n is the size of the larger of two neighbouring sets of images: N where an image is removed
from ours, N + 1 where one is added to ours. The ε here is the larger of the two. It holds for
adding or removing one image; replacing one is a removal and an addition.
(Ganesh 2025, "Tighter privacy analysis for truncated Poisson sampling".)

What ε does not count: every run has an ε of its own. Who publishes several runs, or the best of
them, pays for all of them. The run without privacy protects nothing and is there to compare.

Where the randomness comes from: every run takes a new key from the operating system. With --seed
the draws can be repeated, so whoever knows the seed can take the noise away: nothing is private
then. The split and the first parameters are the same in every run, and public; they need no
secret. (An example, not a product: a JAX key holds 64 bits, so whoever could try 2⁶⁴ keys would
find the noise, and the noise is made of floating-point numbers.)

Prints a line now and then, and draws accuracy against ε for several σ, beside training
without privacy. (Abadi et al. 2016, "Deep learning with differential privacy".)
"""

import itertools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import pictures
from jax import lax

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
CLASSES = 10
LINES = 12  # printed in a run


def parser():
    it = options.Parser(__doc__, needs=("matplotlib", "sklearn", "dp_accounting"))
    sigmas = "noise multipliers, one run each (2 4 8)"
    add_mechanism(it, nargs="+", default=[2.0, 4.0, 8.0], help=sigmas)
    it.takes("--steps", options.whole(), 240, "steps of a run")
    it.takes("--learning-rate", options.number(), 0.02, "of Adam")
    it.add_argument(
        "--seed",
        type=options.seed,
        help="only to repeat a demonstration: draws batches and noise from this number, and then "
        "nothing is private (default: a new key from the operating system for every run)",
    )
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def add_mechanism(it, **noise):
    """Adds the options of the mechanism and of its accountant; ``noise`` is what --noise has."""
    # Below, ε is in the hundreds, and the accountant takes minutes to say so.
    sigma = options.number(above=0.2, up_to=1e6)
    it.add_argument("--noise", type=sigma, metavar="SIGMA", **noise)
    # A uniform number has 23 bits, so a rate far smaller would be drawn as a greater one.
    it.takes("--rate", options.number(above=1e-3, up_to=1), 0.25, "q, the sampling rate")
    it.takes("--max-norm", options.number(up_to=1e6), 1.0, "C")
    # The accountant leaves out the last e⁻⁵⁰ of probability: far below that it finds no ε.
    it.takes("--delta", options.number(above=1e-15, below=1), 1e-4, "δ, well below 1 / N")


def key_of_run(seed, run):
    """A key of its own for each run: all 64 bits of it from the operating system, without a seed.

    Runs must share no noise. With the same z, 2 g(σ) − g(2σ) would be the gradient itself.
    """
    if seed is not None:
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), run)
    # Not jax.random.key(number): that keeps 32 bits of the number, unless x64 is enabled.
    bits = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


def rows_for(n, rate):
    """A static number of rows that Poisson sampling exceeds in one step of a thousand.

    One image is counted more than there is, so that it, too, would find a row at a rate of 1.
    """
    n = n + 1
    return min(n, int(np.ceil(n * rate + 3.1 * np.sqrt(n * rate * (1 - rate)))))


def poisson_batch(key, n, rate, rows):
    """Indices of a batch's rows and their weights: 1 for an image drawn, 0 for padding."""
    return first_rows(jax.random.uniform(key, (n,)), rate, rows)


def first_rows(u, rate, rows):
    """The batch that independent uniform numbers ``u``, one for each image, draw.

    The images are put in the order of their numbers; those below q are drawn, and the first rows
    are a uniformly random subset of them where they are too many.
    """
    index = jnp.argsort(u)[:rows]
    return index, (u[index] < rate).astype(jnp.float32)


def with_noise(key, gradient, deviation):
    """Every parameter's gradient with Gaussian noise of its own."""
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    noisy = [g + deviation * jax.random.normal(k, g.shape, g.dtype) for k, g in zip(keys, leaves)]
    return jax.tree.unflatten(tree, noisy)


def private_gradient(model, images, rate, rows, max_norm, noise):
    """``(params, key, x, y) -> gradient``, the noisy mean of a batch's clipped gradients.

    This is the mechanism: nothing else of a private run sees the training images.

    Args:
      images: N, the public number; x and y of a neighbouring set are one more or fewer.
      rate, rows, max_norm, noise: q, the rows of a batch, C and σ.
    """
    expected = rate * images  # not the number drawn, which is private
    clipped = bp.clipped_grad(model, LOSS, max_norm, normalize_by=expected)

    def gradient(params, key, x, y):
        sampling, noising = jax.random.split(key)
        index, weights = poisson_batch(sampling, len(x), rate, rows)
        mean = clipped(params, x[index], y[index], weights=weights)
        return with_noise(noising, mean, noise * max_norm / expected)

    return gradient


def plain_gradient(model, rate, rows):
    """``(params, key, x, y) -> gradient``, the mean of a batch's gradients: no privacy."""
    grad = bp.grad(model, LOSS)

    def gradient(params, key, x, y):
        index, weights = poisson_batch(key, len(x), rate, rows)
        return grad(params, x[index], y[index], weights=weights)

    return gradient


def descent(optimizer, gradient):
    """``(params, state, key, x, y) -> (params, state)``, one step: what the key draws, and nothing
    else, is random in it."""

    def step(params, state, key, x, y):
        g = gradient(params, key, x, y)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(model, params, optimizer, gradient, key, data, held_out, ends):
    """Held-out accuracy after each number of steps in ``ends``, ascending."""
    step = descent(optimizer, gradient)

    @jax.jit
    def stretch(params, state, keys, x, y):
        def body(carry, key):
            return step(*carry, key, x, y), None

        return lax.scan(body, (params, state), keys)[0]

    @jax.jit
    def accuracy(params, x, y):
        return (model.apply(params, x).argmax(-1) == y).mean()

    keys, state = jax.random.split(key, ends[-1]), optimizer.init(params)
    accuracies = []
    for start, end in itertools.pairwise([0, *ends]):
        params, state = stretch(params, state, keys[start:end], *data)
        accuracies.append(float(accuracy(params, *held_out)))
        print(f"  step {end:4d}   held out {accuracies[-1]:7.2%}", flush=True)
    return accuracies


def epsilons(n, rate, rows, noise, delta, steps):
    """ε after each number of steps in ``steps``, for n images and one more or one fewer."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    def for_larger(n):
        """For the neighbours of which the larger has n images."""
        one = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            n, rate, rows, noise, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
        )
        return [one.self_compose(done).get_epsilon_for_delta(delta) for done in steps]

    return [max(pair) for pair in zip(for_larger(n), for_larger(n + 1))]


def print_sampling(n, rate, rows, seed):
    print(f"{n} images, each drawn with probability {rate:g}; {rows} rows in a batch")
    if seed is not None:
        print("--seed: whoever knows it can take the noise away; nothing below is private")


def guarantee(epsilon, delta, seed):
    secret = "" if seed is None else ", if the seed were secret"
    return f"({epsilon:.3f}, {delta:g})-differentially private{secret}"


def draw(curves, without, n, delta, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for noise, spent, accuracies in curves:
        axes.plot(spent, accuracies, marker=".", label=f"noise multiplier σ = {noise:g}")
    axes.axhline(without, color="0.4", linestyle="--", label="without privacy")
    if all(spent[0] > 0 for _, spent, _ in curves):  # with a great δ, ε is 0
        axes.set_xscale("log")
    axes.set_xlabel(f"ε spent, at δ = {delta:g}")
    axes.set_ylabel("accuracy on held-out digits")
    axes.set_title(f"DP-SGD on {n:,} handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    pictures.save(figure, path)


def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), held_out = pictures.digits(64)
    n, rows = len(x), rows_for(len(x), args.rate)
    model = bp.chain(bp.dense(64), bp.tanh, bp.dense(CLASSES))
    params = model.init(jax.random.key(0), x[0])  # public: of the image only its shape is used
    ends = sorted({round(args.steps * (i + 1) / LINES) for i in range(LINES)} - {0})
    print_sampling(n, args.rate, rows, args.seed)

    def run(i, gradient):
        key = key_of_run(args.seed, i)
        optimizer = optax.adam(args.learning_rate)
        return train(model, params, optimizer, gradient, key, (x, y), held_out, ends)

    print("without privacy")
    without = run(0, plain_gradient(model, args.rate, rows))[-1]
    curves = []
    for i, noise in enumerate(args.noise, start=1):
        print(f"noise multiplier {noise:g}")
        gradient = private_gradient(model, n, args.rate, rows, args.max_norm, noise)
        accuracies = run(i, gradient)
        spent = epsilons(n, args.rate, rows, noise, args.delta, ends)
        curves.append((noise, spent, accuracies))
        print(f"  {guarantee(spent[-1], args.delta, args.seed)}")
    draw(curves, without, n, args.delta, args.out / "dp_sgd.png")


if __name__ == "__main__":
    main()
