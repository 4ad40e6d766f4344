"""How large a batch each part of a transformer could use, while it learns.

A small Flax transformer reads a digit as eight tokens, the rows of the image, and is trained by
Adam. From time to time the gradient noise scale is measured for each group of parameters by itself:

    B = tr Σ / G²

the batch size at which noise and gradient are equal: Σ is the covariance of the gradients of single
examples, G their mean. Batches far below B learn mostly from noise, so that a batch twice as large
halves the steps; batches far above B have little left to gain. (McCandlish et al. 2018, "An
empirical model of large-batch training".)

``bp.grad_noise_scale`` takes a function of parameters and one example, and its parameters are here
those of one group; the others are as they are. G² is estimated without bias, from all the training
images, so where noise hides the gradient it may come out below 0: there B is unknown, and the line
has a gap.

Prints a line at every measurement, and draws B of every group over the steps.

    python examples/noise_scale.py
"""

import flax.linen as nn
import jax
import numpy as np
import optax
import options
import pictures

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
GROUPS = {  # by what the modules are called
    "embedding": ("embed", "positions"),
    "attention": ("attention",),
    "MLPs": ("widen", "narrow"),
    "layer norms": ("norm",),
    "output layer": ("output",),
}
HEADS, TOGETHER = 4, "all together"


class Transformer(nn.Module):
    """A classifier of sequences: blocks of attention and MLP, then the mean over the tokens."""

    features: int
    blocks: int

    @nn.compact
    def __call__(self, x):  # (batch, tokens, 8) -> (batch, 10)
        width = HEADS * self.features
        a = nn.Dense(width, name="embed")(x)
        a = a + self.param("positions", nn.initializers.normal(0.1), a.shape[1:])
        for i in range(self.blocks):
            b = nn.LayerNorm(name=f"norm_{i}_attention")(a)
            a = a + nn.MultiHeadDotProductAttention(num_heads=HEADS, name=f"attention_{i}")(b)
            b = nn.LayerNorm(name=f"norm_{i}_mlp")(a)
            b = nn.gelu(nn.Dense(4 * width, name=f"widen_{i}")(b))
            a = a + nn.Dense(width, name=f"narrow_{i}")(b)
        a = nn.LayerNorm(name="norm_output")(a).mean(1)
        return nn.Dense(10, name="output")(a)


def parser():
    it = options.Parser(__doc__)
    it.takes("--features", options.whole(), 8, "of each of the four heads")
    it.takes("--blocks", options.whole(), 2, "of attention and MLP")
    it.takes("--steps", options.whole(), 300, "of training")
    it.takes("--measurements", options.whole(), 16, "of B, more of them at first")
    size = options.whole(up_to=pictures.IMAGES)
    it.takes("--batch", size, 64, "examples in a batch of the training")
    it.takes("--learning-rate", options.number(), 2e-3, "of Adam")
    it.takes("--seed", options.seed, 0, "of split, weights and batches")
    it.takes("--out", options.folder, "out", "folder for the picture")
    return it


def grouped(params):
    """``{group: the part of the parameters that is in it}``, and every parameter in one."""
    groups = {
        group: {name: p for name, p in params["params"].items() if name.startswith(names)}
        for group, names in GROUPS.items()
    }
    assert sum(map(len, groups.values())) == len(params["params"])
    return groups


def noise_scales(module, params, x, y):
    """``{group: B}``, and of all parameters together."""

    def cost(params, x, y):  # of ONE example
        logits = module.apply(params, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def of_group(group):
        def cost_of_group(group, x, y):
            return cost({"params": params["params"] | group}, x, y)

        return bp.grad_noise_scale(cost_of_group, microbatch=256)(group, x, y)

    scales = {name: of_group(group) for name, group in grouped(params).items()}
    return scales | {TOGETHER: bp.grad_noise_scale(cost, microbatch=256)(params, x, y)}


def train(module, args, data, held_out):
    """``(steps, {group: B at those steps})``, printed as they come."""
    x, y = data
    model, optimizer = bp.from_flax(module), optax.adam(args.learning_rate)
    value_and_grad = bp.value_and_grad(model, LOSS)

    @jax.jit
    def step(params, state, x, y):
        cost, gradient = value_and_grad(params, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, cost

    @jax.jit
    def measure(params):
        accuracy = (model.apply(params, held_out[0]).argmax(-1) == held_out[1]).mean()
        return accuracy, noise_scales(module, params, x, y)

    params = model.init(jax.random.key(args.seed), x[0])
    state, random = optimizer.init(params), np.random.default_rng(args.seed)
    spread = np.linspace(0, 1, args.measurements) ** 2
    steps = sorted({round(float(args.steps * part)) for part in spread} | {args.steps})
    curves = {name: [] for name in (TOGETHER, *GROUPS)}
    print(f"step  held out {' '.join(f'{name:>13}' for name in curves)}")
    for i in range(args.steps + 1):
        if i in steps:
            accuracy, scales = measure(params)
            for name, curve in curves.items():
                curve.append(float(scales[name]))
            said = " ".join(f"{curve[-1]:13.1f}" for curve in curves.values())
            print(f"{i:4d} {accuracy:9.2%} {said}", flush=True)
        index = random.choice(len(x), args.batch, replace=False)
        params, state, _ = step(params, state, x[index], y[index])
    return np.array(steps), {name: np.array(curve) for name, curve in curves.items()}


def draw(steps, curves, batch, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, scales in curves.items():
        together = {"color": "black", "linewidth": 2.5} if name == TOGETHER else {}
        known = np.where(scales > 0, scales, np.nan)
        axes.semilogy(steps, known, marker=".", label=name, **together)
    axes.axhline(batch, color="0.4", linestyle="--", label=f"the batch it is trained with: {batch}")
    axes.set_xlabel("steps of training")
    axes.set_ylabel("batch size at which noise and gradient are equal")
    axes.set_title("Gradient noise of a transformer, by groups of parameters")
    axes.grid(alpha=0.3)
    axes.legend()
    pictures.save(figure, path)


def main():
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data, held_out = pictures.digits(8, 8, seed=args.seed)
    module = Transformer(args.features, args.blocks)
    steps, curves = train(module, args, data, held_out)
    draw(steps, curves, args.batch, args.out / "noise_scale.png")
    before, after = curves[TOGETHER][[0, -1]]
    groups = {name: curves[name][-1] for name in GROUPS}
    print(
        f"noise and gradient are equal at a batch of {before:.0f} before training and {after:.0f} "
        f"after it; then from {min(groups.values()):.0f} ({min(groups, key=groups.get)}) "
        f"to {max(groups.values()):.0f} ({max(groups, key=groups.get)})"
    )


if __name__ == "__main__":
    main()
