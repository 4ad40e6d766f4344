"""Finds wrong labels by the gradients of single examples.

Some training labels of scikit-learn's digits are made wrong on purpose, and an Equinox network is
trained on all of them: ``bp.from_equinox`` makes a layer of it. The training images are then ranked
by how suspicious the trained network finds them, in three ways. g is the gradient of a training
image, v that of a held-out one, whose labels are right:

    ‖g‖                                 what is surprising pulls hard (per_example_grad_norms)
    −⟨g, mean of v⟩                     what pulls against the held-out images (grad_dots)
    mean of max(0, −⟨g, v⟩ / ‖v‖)       the same of each held-out image, however little that still
                                        has to learn, and the harm alone: no help makes up for it
                                        (grad_gram)

The first needs no held-out image. The others are first-order influence: a step along −g changes the
cost of a held-out image by −⟨g, v⟩ times the learning rate. (Pruthi et al. 2020, "Estimating
training data influence by tracing gradient descent".)

Prints how many of the wrong labels are among the k most suspicious, k being the number made wrong,
and draws that for every number looked at, and the most suspicious images.

    python examples/mislabelled.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import pictures

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
SHOWN = 10  # images of each ranking
NORM, AGAINST, HARM = "gradient norm", "against the held-out gradient", "harm to held-out images"


def parser():
    it = options.Parser(__doc__)
    part = options.number(above=1e-3, up_to=0.5)
    it.takes("--wrong", part, 0.05, "the part of the labels that is made wrong")
    it.takes("--epochs", options.whole(), 16, "of training")
    it.takes("--width", options.whole(), 16, "channels at first")
    it.takes("--learning-rate", options.number(), 2e-3, "of Adam")
    it.takes("--seed", options.seed, 0, "of split, wrong labels, weights and batches")
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def network(key, width):
    """A small convolutional classifier of one 1×8×8 image."""
    keys, relu = jax.random.split(key, 4), eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, width, 3, padding=1, key=keys[0]),
            relu,
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Conv2d(width, 2 * width, 3, padding=1, key=keys[1]),
            relu,
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(2 * width * 16, 4 * width, key=keys[2]),
            relu,
            eqx.nn.Linear(4 * width, 10, key=keys[3]),
        ]
    )


def with_errors(random, y, wrong):
    """The labels, of which a part is made wrong, and which they are."""
    planted = np.zeros(len(y), bool)
    planted[random.choice(len(y), round(wrong * len(y)), replace=False)] = True
    return np.where(planted, (y + random.integers(1, 10, len(y))) % 10, y).astype(np.int32), planted


def suspicions(model, params, data, held_out):
    """``{ranking: how suspicious each training image is}``."""
    norms = jax.jit(bp.per_example_grad_norms(model, LOSS))
    mean = jax.jit(bp.grad(model, LOSS))(params, *held_out)
    dots = jax.jit(bp.grad_dots(model, LOSS))(params, *data, mean)
    gram = jax.jit(bp.grad_gram(model, LOSS))(params, *data, other=(params, *held_out))
    lengths = jnp.maximum(norms(params, *held_out), 1e-30)  # of an image learned entirely it is 0
    return {
        NORM: np.asarray(norms(params, *data)),
        AGAINST: np.asarray(-dots),
        HARM: np.asarray(jnp.maximum(0, -gram / lengths).mean(1)),
    }


def draw(scores, images, given, right, path):
    import matplotlib.pyplot as plt

    planted = given != right
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    axes = above.subplots()
    looked_at = np.arange(len(given) + 1)
    for name, score in scores.items():
        found = np.cumsum(planted[np.argsort(-score)])
        axes.plot(looked_at, [0, *found], label=name)
    axes.plot(looked_at, looked_at * planted.mean(), color="0.4", linestyle="--", label="chance")
    axes.axvline(planted.sum(), color="0.4", linewidth=0.8)
    axes.set_xlim(0, 5 * planted.sum())
    axes.set(xlabel="images looked at, the most suspicious first", ylabel="wrong labels found")
    axes.set_title(f"{planted.sum()} wrong labels among {len(given):,}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.45))
    by_norm, by_harm = (np.argsort(-scores[name]) for name in (NORM, HARM))
    shown = {
        "by\ngradient norm": by_norm,
        "by harm to\nheld-out images": by_harm,
        "by norm, of\nthose not planted": by_norm[~planted[by_norm]],
    }
    for (name, order), row in zip(shown.items(), below.subplots(len(shown), SHOWN)):
        for axis, i in zip(row, order):
            axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            said = f"planted “{given[i]}”, is {right[i]}" if planted[i] else f"given “{given[i]}”"
            axis.set_title(said, fontsize=9, color="C3" if planted[i] else "black")
        row[0].set_ylabel(name, fontsize=8)
    below.suptitle("The most suspicious images; red where the label was made wrong", fontsize=11)
    pictures.save(figure, path)


def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (x, right), held_out = pictures.digits(1, 8, 8, seed=args.seed)
    given, planted = with_errors(np.random.default_rng(args.seed), right, args.wrong)
    k = int(planted.sum())
    model, params = bp.from_equinox(network(jax.random.key(args.seed), args.width))

    batches = bp.minibatches(x, given, 64, seed=args.seed)
    optimizer = optax.adam(args.learning_rate)
    params = bp.fit(model, LOSS, params, batches, optimizer, epochs=args.epochs).params

    def accuracy(x, y):
        return float((model.apply(params, x).argmax(-1) == y).mean())

    print(
        f"{k} of {len(x)} labels are wrong; learned {accuracy(x, given):.2%} of the given labels, "
        f"{accuracy(*held_out):.2%} held out"
    )
    scores = suspicions(model, params, (x, given), held_out)
    found = {name: int(planted[np.argsort(-s)[:k]].sum()) for name, s in scores.items()}
    for name, count in found.items():
        print(f"  {name:<30} {count:4d} of {k} wrong labels among the {k} most suspicious")
    print(f"  {'chance':<30} {k * k / len(x):4.1f}")
    draw(scores, x, given, right, args.out / "mislabelled.png")
    best = max(found, key=found.get)
    print(
        f"{best} found the most: {found[best] / k:.0%} of the wrong labels in {k / len(x):.0%} of "
        "the images"
    )


if __name__ == "__main__":
    main()
