"""One list of layers, each with an example of its input, and one of losses, each with targets for
three examples of four outputs: what the proofs that serve them all run over.

A new family adds its own here. Sizes are equal wherever they may be, so that what is compiled
for one layer serves the next.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import functional_bp as bp

VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((2, 2), jnp.float32)
POSITIONS = jax.ShapeDtypeStruct((2, 4), jnp.float32)

ACTIVATIONS = {
    layer.name: layer
    for layer in (
        bp.sigmoid,
        bp.tanh,
        bp.relu,
        bp.leaky_relu(0.2),
        bp.gelu,
        bp.gelu_tanh,
        bp.silu,
        bp.softplus,
        bp.elu(0.7),
        bp.selu,
        bp.mish,
        bp.hard_tanh,
        bp.softmax,
        bp.log_softmax,
        bp.glu,
        bp.reglu,
        bp.geglu,
        bp.swiglu,
    )
}


def scale(factor=bp.factors.Itself):
    """y = s ⊙ x: a rule such as a user writes."""
    return bp.rule(
        init=lambda key, x: {"s": jnp.ones(x.shape, x.dtype)},
        forward=lambda params, x, key=None: (params["s"] * x, x),
        backward=lambda params, x, dy: (
            params["s"] * dy,
            {"s": factor(x * dy)},
        ),
        name="scale",
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Plain(bp.factors.Factored):
    """Factors of a user's own class, with the two methods that it must bring."""

    g: jax.Array

    def each(self):
        return self.g

    def scaled(self, weights):
        return Plain(self.g * weights[:, None])


RULES = {
    "dense": (bp.dense(4), VECTOR),
    "dense at positions": (bp.dense(4), POSITIONS),
    "dense without bias": (bp.dense(4, bias=False), VECTOR),
    "dense to fewer": (bp.dense(2), VECTOR),
    **{name: (layer, VECTOR) for name, layer in ACTIVATIONS.items()},
    "identity": (bp.identity, VECTOR),
    "flatten": (bp.flatten, POSITIONS),
    "a user's rule": (scale(), VECTOR),
    "a user's factors": (scale(Plain), VECTOR),
}


def block():
    return bp.chain(bp.dense(4), bp.tanh)


def tied_pair(x_to_y=bp.tanh):
    """Two dense layers with one weight."""
    return bp.tied(bp.chain(bp.dense(4), x_to_y, bp.dense(4)), {(2, "weight"): (0, "weight")})


COMBINED = {
    "chain": (bp.chain(bp.dense(4), bp.tanh, bp.dense(2)), VECTOR),
    "chain through flatten": (bp.chain(bp.flatten, bp.dense(4), bp.relu), SQUARE),
    "residual": (bp.residual(block()), VECTOR),
    "residual with a projection": (bp.residual(bp.dense(2), bp.dense(2, bias=False)), VECTOR),
    "parallel": (bp.parallel(bp.dense(4), bp.tanh, scale()), VECTOR),
    "sum of branches": (bp.chain(bp.parallel(bp.dense(4), bp.tanh), bp.add), VECTOR),
    "product of branches": (bp.chain(bp.parallel(bp.dense(4), bp.tanh), bp.multiply), VECTOR),
    "branches side by side": (
        bp.chain(bp.parallel(bp.dense(4), bp.dense(2)), bp.concatenate()),
        VECTOR,
    ),
    "repeat": (bp.repeat(block(), 2), VECTOR),
    "repeat at positions": (bp.repeat(block(), 2), POSITIONS),
    "repeat of residuals": (bp.repeat(bp.residual(block()), 2), VECTOR),
    "residual of repeats": (bp.residual(bp.repeat(block(), 2)), VECTOR),
    "nested repeat": (bp.repeat(bp.repeat(block(), 2), 2), VECTOR),
    "tied": (tied_pair(), VECTOR),
    "tied at positions": (tied_pair(), POSITIONS),
    "tied twice to one source": (
        bp.tied(
            bp.chain(bp.dense(4), bp.dense(4), bp.tanh, bp.dense(4)),
            {(1, "weight"): (0, "weight"), (3, "weight"): (0, "weight")},
        ),
        VECTOR,
    ),
    "tied to a later source": (
        bp.tied(
            bp.chain(bp.dense(4), bp.tanh, bp.dense(4)),
            {(0, "weight"): (2, "weight"), (0, "bias"): (-1, "bias")},
        ),
        VECTOR,
    ),
    "tied inside repeat": (bp.repeat(tied_pair(), 2), VECTOR),
    "tied repeats": (
        bp.tied(
            bp.chain(bp.repeat(block(), 2), bp.repeat(block(), 2)),
            {(1, 0, "weight"): (0, 0, "weight")},
        ),
        VECTOR,
    ),
}

LAYERS = RULES | COMBINED

RANDOM = {
    "dropout": (bp.dropout(0.5), VECTOR),
    "dropout between layers": (bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(4)), VECTOR),
    "dropout inside repeat": (bp.repeat(bp.chain(bp.dense(4), bp.dropout(0.5)), 2), VECTOR),
}

IDS = jnp.array([2, 0, 3])
PROBABILITIES = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
SIGNS = jnp.array([[1.0, -1, 1, 1], [-1, -1, 1, -1], [1, 1, -1, 1]])

LOSSES = {
    "squared_error": (bp.losses.squared_error, SIGNS / 3),
    "mean_squared_error": (bp.losses.mean_squared_error, SIGNS / 3),
    "absolute_error": (bp.losses.absolute_error, SIGNS / 3),
    "huber": (bp.losses.huber(0.5), SIGNS / 3),
    "hinge": (bp.losses.hinge, SIGNS),
    "softmax_cross_entropy of ids": (bp.losses.softmax_cross_entropy, IDS),
    "softmax_cross_entropy of probabilities": (bp.losses.softmax_cross_entropy, PROBABILITIES),
    "smoothed_softmax_cross_entropy": (bp.losses.smoothed_softmax_cross_entropy(0.1), IDS),
    "sigmoid_cross_entropy": (bp.losses.sigmoid_cross_entropy, PROBABILITIES),
    "kl_divergence": (bp.losses.kl_divergence, PROBABILITIES),
}
