"""One list of layers, each with an example of its input, and one of losses, each with targets for
three examples of four outputs: what the proofs that serve them all run over.

What a new rule must be in:

    RULES       a layer that is no combination of others, with an input of each kind that it takes:
                it is proven against autodiff and central differences, its sums in bfloat16 are
                looked at, and faults are planted in it
    COMBINED    a combinator, around layers with parameters: proven, and its sums looked at
    RANDOM      a layer that draws from a key, and every combinator around one: proven under a key,
                and what it draws must depend on the key
    LOSSES      a loss: proven at targets of each kind, and finite at extreme outputs

and what it computes in tests/test_formulas.py: a proof holds a backward to its forward alone.
tests/test_rules.py fails while a public layer or loss, or a function that makes one, is in none.
Sizes are equal wherever they may be, so that what is compiled for one layer serves the next.
"""

import dataclasses
import functools

import flax.linen
import jax
import jax.numpy as jnp

import functional_bp as bp
from functional_bp.factors import Outer, Summed, accumulator
from functional_bp.losses import vocabulary

VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((2, 2), jnp.float32)
POSITIONS = jax.ShapeDtypeStruct((2, 4), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((4, 3, 2), jnp.float32)
MANY = jax.ShapeDtypeStruct((6, 4), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((3, 2), jnp.float32)
IDS_OF_WORDS = jnp.array([1, 4, 1])


def padded(*states):
    """A sequence whose last step is padding, with an initial state for each recurrent layer."""
    pair = jax.ShapeDtypeStruct((2,), jnp.float32)
    return {"x": SEQUENCE, "length": 2, "state": tuple(dict.fromkeys(s, pair) for s in states)}


ACTIVATIONS = {
    layer.name: layer
    for layer in (
        bp.sigmoid,
        bp.tanh,
        bp.relu,
        bp.leaky_relu(0.2),
        bp.leaky_relu(-0.2),  # whose output does not tell the sign of its input
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
        bp.activation(jnp.sin, jnp.cos, name="a user's activation"),
        bp.gated(jnp.sin, jnp.cos, name="a user's glu"),
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


def users_cell():
    """h_t = sin(p_t + u ⊙ h_{t−1}): the recurrent weight is a vector, one number for each unit."""

    def init(key, features, dtype):
        weight = jax.random.normal(key, (2, features), dtype)
        return {"weight_x": weight, "bias": jnp.zeros(2, dtype), "u": jnp.ones(2, dtype)}

    def forward(params, state, p):
        z = p + params["u"][:, None] * state["h"]
        return {"h": jnp.sin(z)}, z

    def backward(params, df, dstate):
        delta = dstate["h"] * df
        return {"h": params["u"][:, None] * delta}, delta

    def factors(delta, x, h_before):
        return {"weight_x": Outer(delta, x), "bias": Summed(delta), "u": Summed(delta * h_before)}

    return bp.Cell("a user's cell", 2, ("h",), init, forward, jnp.cos, backward, factors)


def traced():
    """Kernels as (in, out), one of them used twice."""

    def init(key, x):
        kernel = jax.random.normal(key, (x.shape[-1], 2), x.dtype)
        return {"kernel": kernel, "bias": jnp.zeros(2, x.dtype)}

    def apply(params, x):
        z = x @ params["kernel"] + params["bias"][None]
        return jnp.tanh(z) @ params["kernel"].T

    return bp.from_function(apply, init=init, name="traced")


def of_function(apply, **shapes):
    """A layer of a function whose parameters have these shapes."""

    def init(key, x):
        keys = jax.random.split(key, len(shapes))
        return {n: jax.random.normal(k, s, x.dtype) for (n, s), k in zip(shapes.items(), keys)}

    return bp.from_function(apply, init=init)


def _blocks(params, x):
    left, right = params["w"][:, :2], params["w"][:, 2:]
    return jnp.tanh(x @ left) + x @ right + x @ params["v"][1:, :2]


def _convolved(params, x):
    z = jax.lax.conv_general_dilated(x.T[None], params["w"], (1,), "SAME")  # (out, in, 2)
    return jnp.tanh(z[0].T)


def _decayed(params, x):
    return x @ params["w"] + (params["w"] ** 2).sum() + jnp.exp(params["u"]).sum()


# What only functions have: each is proven with the faults that are planted in its factors.
def over_vocabulary():
    """The costs of two positions, of which ids are known, by a loss over a vocabulary of five."""

    def forward(params, x, key=None):
        ids = jnp.broadcast_to(jnp.array([2, 0]), x.shape[:2])
        return vocabulary.forward(params["weight"], x, ids, 0.1, 0.1)

    def backward(params, kept, dy):
        dh, factor = vocabulary.backward(params["weight"], kept, dy, 0.1, 0.1)
        return dh, {"weight": factor}

    def init(key, x):
        return {"weight": jax.random.normal(key, (5, x.shape[-1]), x.dtype)}

    return bp.rule(init, forward, backward, name="over_vocabulary", batched=True)


OF_FUNCTIONS = {
    "a vocabulary": (over_vocabulary(), POSITIONS),
    "a kernel": (of_function(lambda p, x: jnp.tanh(x @ p["w"]), w=(4, 2)), POSITIONS),
    "blocks": (of_function(_blocks, w=(4, 4), v=(5, 3)), POSITIONS),
    "a convolution": (of_function(_convolved, w=(2, 4, 2)), POSITIONS),
    "decayed": (of_function(_decayed, w=(4, 2), u=(2, 2)), POSITIONS),
}


RULES = {
    "dense": (bp.dense(4), VECTOR),
    "dense at positions": (bp.dense(4), POSITIONS),
    "dense without bias": (bp.dense(4, bias=False), VECTOR),
    "dense to fewer": (bp.dense(2), VECTOR),
    # So few outputs that norms and Gram matrices are cheapest from gₙ multiplied out.
    "dense to one at positions": (bp.dense(1), POSITIONS),
    **{name: (layer, VECTOR) for name, layer in ACTIVATIONS.items()},
    "conv": (bp.conv(2, 3), IMAGE),
    "conv, dilated, circular": (bp.conv(2, 2, dilation=2, padding="CIRCULAR"), MANY),
    "conv in groups": (bp.conv(4, (3,), strides=2, groups=2, bias=False), MANY),
    "conv_transpose": (bp.conv_transpose(2, 3, strides=2), SEQUENCE),
    "conv_transpose in groups": (
        bp.conv_transpose(4, 2, strides=2, groups=2, padding="VALID"),
        MANY,
    ),
    "max_pool": (bp.max_pool(2, strides=1, padding="SAME"), IMAGE),
    "avg_pool": (bp.avg_pool(3, strides=2, padding=1), IMAGE),
    "global_max_pool": (bp.global_max_pool, IMAGE),
    "global_avg_pool": (bp.global_avg_pool, IMAGE),
    "upsample": (bp.upsample(2), SEQUENCE),
    "upsample in lines": (bp.upsample((3, 2), method="linear"), IMAGE),
    "pad": (bp.pad(((1, 2), 0)), IMAGE),
    "crop": (bp.crop(1), MANY),
    "identity": (bp.identity, VECTOR),
    "layer_norm": (bp.layer_norm(), VECTOR),
    "layer_norm at positions": (bp.layer_norm(bias=False), POSITIONS),
    "rms_norm": (bp.rms_norm(), POSITIONS),
    "group_norm": (bp.group_norm(2), POSITIONS),
    "instance_norm": (bp.instance_norm(), MANY),
    "batch_norm": (bp.batch_norm(), VECTOR),
    "batch_norm at positions": (bp.batch_norm(), POSITIONS),
    "batch_norm at inference": (bp.batch_norm().inference(), POSITIONS),
    "flatten": (bp.flatten, POSITIONS),
    "add": (bp.add, (VECTOR, VECTOR)),
    "multiply": (bp.multiply, (VECTOR, VECTOR, VECTOR)),
    "concatenate": (bp.concatenate(), (VECTOR, jax.ShapeDtypeStruct((2,), jnp.float32))),
    "concatenate positions": (bp.concatenate(0), (POSITIONS, POSITIONS)),
    "entry": (bp.entry("x"), {"x": VECTOR, "other": POSITIONS, "length": 2}),
    "embedding": (bp.embedding(5, 2), IDS_OF_WORDS),
    "rnn": (bp.rnn(2), SEQUENCE),
    "lstm of a padded sequence from a state": (bp.lstm(2), padded("hc")),
    "gru in blocks, from the end and a trained state": (
        bp.gru(2, checkpoint=2, reverse=True, trained_state=True),
        SEQUENCE,
    ),
    "last output": (bp.rnn(2, activation="relu", output="last"), padded("h")),
    "a user's cell": (bp.through_time(users_cell()), SEQUENCE),
    "attention": (bp.attention(2), POSITIONS),
    "attention of groups in a window": (
        bp.attention(4, kv_heads=2, window=2, rotary=100.0, size=2, bias=False),
        SEQUENCE,
    ),
    "attention to a padded sequence": (
        bp.attention(2, causal=False, alibi=True),
        {"x": POSITIONS, "length": 1},
    ),
    "attention with a bias and a mask": (
        bp.attention(2),
        {
            "x": POSITIONS,
            "bias": jax.ShapeDtypeStruct((2, 2, 2), jnp.float32),
            "mask": jnp.array([[True, False], [True, True]]),
        },
    ),
    "attention to another sequence": (
        bp.attention(2, causal=False, window=2),
        {"x": POSITIONS, "context": SEQUENCE, "context_length": 2},
    ),
    "positions": (bp.positions(3), POSITIONS),
    "a function": (traced(), POSITIONS),
    "a Flax module": (bp.from_flax(flax.linen.Dense(2)), VECTOR),
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
    "parallel by name": (
        bp.parallel(x=bp.dense(4), context=bp.chain(bp.tanh, bp.dense(2))),
        VECTOR,
    ),
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
    "batch norms in a stack": (
        bp.repeat(bp.chain(bp.dense(4, bias=False), bp.batch_norm(), bp.tanh), 2),
        MANY,
    ),
    "batch norms in a branch and a shortcut": (
        bp.chain(
            bp.residual(
                bp.parallel(bp.batch_norm(), bp.tanh), bp.parallel(bp.tanh, bp.batch_norm())
            ),
            bp.add,
        ),
        MANY,
    ),
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
    "tied embedding": (
        bp.tied(
            bp.chain(bp.embedding(5, 2), bp.tanh, bp.dense(5, bias=False)),
            {(2, "weight"): (0, "weight")},
        ),
        IDS_OF_WORDS,
    ),
    "at an entry": (bp.at("x", bp.dense(4)), {"x": VECTOR, "length": 2}),
    "bidirectional": (bp.bidirectional(bp.lstm(2)), padded("hc", "hc")),
    "residual of a sequence": (bp.residual(bp.rnn(2)), padded("h")),
}

LAYERS = RULES | COMBINED

RANDOM = {
    "dropout": (bp.dropout(0.5), VECTOR),
    "dropout between layers": (bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(4)), VECTOR),
    "dropout inside repeat": (bp.repeat(bp.chain(bp.dense(4), bp.dropout(0.5)), 2), VECTOR),
    "dropout in a branch": (bp.parallel(bp.dense(4), bp.dropout(0.5)), VECTOR),
    "dropout behind a shortcut": (bp.residual(bp.dropout(0.5)), VECTOR),
    "dropout of a tied pair": (tied_pair(bp.dropout(0.5)), VECTOR),
    "dropout at an entry": (bp.at("x", bp.dropout(0.5)), {"x": VECTOR, "length": 2}),
    "dropout in both directions": (
        bp.bidirectional(
            bp.chain(bp.dropout(0.5), bp.rnn(2)),
            bp.chain(bp.dropout(0.5), bp.rnn(2, reverse=True)),
        ),
        SEQUENCE,
    ),
}

IDS = jnp.array([2, 0, 3])
PROBABILITIES = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
SIGNS = jnp.array([[1.0, -1, 1, 1], [-1, -1, 1, -1], [1, 1, -1, 1]])

QUARTIC = bp.losses.loss(
    lambda a, y: 0.25 * jnp.sum((a - y) ** 4, dtype=accumulator(a)),
    lambda a, y: ((a - y) ** 3).astype(a.dtype),
    name="a user's loss",
)

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
    "a user's loss": (QUARTIC, SIGNS / 3),
}
