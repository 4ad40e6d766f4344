"""Flax's and Equinox's own layers, unchanged: every quantity equals its definition."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal, direction
from flax import nnx

import functional_bp as bp

N, F64 = 3, {"param_dtype": jnp.float64}
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


VECTOR, POSITIONS, IMAGE, IDS = (6,), (5, 6), (6, 5, 4), "ids"
CHANNELS_FIRST = (4, 6, 5)


def over_time(cell):
    return nn.RNN(cell)


class Attending(nn.Module):
    """A look-up whose table the outputs meet too."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, 4, **F64)
        return table.attend(jnp.tanh(table(ids)))


LINEN = {
    "Dense": (lambda: nn.Dense(3, **F64), POSITIONS),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 3), axis=-1, **F64), POSITIONS),
    "Einsum": (lambda: nn.Einsum((6, 2, 3), "bti,ihk->bthk", **F64), POSITIONS),
    "Conv": (lambda: nn.Conv(3, (3, 3), strides=2, **F64), IMAGE),
    "Conv in groups": (lambda: nn.Conv(4, (3,), feature_group_count=2, **F64), POSITIONS),
    "ConvTranspose": (lambda: nn.ConvTranspose(3, (3, 3), strides=(2, 2), **F64), IMAGE),
    "ConvLocal": (lambda: nn.ConvLocal(3, (3,), **F64), POSITIONS),
    "Embed": (Attending, IDS),
    "LayerNorm": (lambda: nn.LayerNorm(**F64), POSITIONS),
    "RMSNorm": (lambda: nn.RMSNorm(**F64), POSITIONS),
    "GroupNorm": (lambda: nn.GroupNorm(2, **F64), IMAGE),
    "InstanceNorm": (lambda: nn.InstanceNorm(**F64), IMAGE),
    "BatchNorm": (lambda: nn.BatchNorm(use_running_average=True, **F64), IMAGE),
    "MultiHeadDotProductAttention": (
        lambda: nn.MultiHeadDotProductAttention(2, qkv_features=6, **F64),
        POSITIONS,
    ),
    "LSTMCell": (lambda: over_time(nn.LSTMCell(4, **F64)), POSITIONS),
    "OptimizedLSTMCell": (lambda: over_time(nn.OptimizedLSTMCell(4, **F64)), POSITIONS),
    "GRUCell": (lambda: over_time(nn.GRUCell(4, **F64)), POSITIONS),
    "MGUCell": (lambda: over_time(nn.MGUCell(4, **F64)), POSITIONS),
    "SimpleCell": (lambda: over_time(nn.SimpleCell(4, **F64)), POSITIONS),
    "Bidirectional": (
        lambda: nn.Bidirectional(
            over_time(nn.GRUCell(4, **F64)), over_time(nn.SimpleCell(4, **F64))
        ),
        POSITIONS,
    ),
    "PReLU": (lambda: nn.PReLU(**F64), POSITIONS),
    "WeightNorm": (lambda: nn.WeightNorm(nn.Dense(3, **F64)), POSITIONS),
}
RNGS = functools.partial(nnx.Rngs, 0)
NNX = {
    "Linear": (lambda: nnx.Linear(6, 3, rngs=RNGS(), **F64), POSITIONS),
    "LinearGeneral": (lambda: nnx.LinearGeneral(6, (2, 3), rngs=RNGS(), **F64), POSITIONS),
    "Einsum": (
        lambda: nnx.Einsum("bti,ihk->bthk", (6, 2, 3), (2, 3), rngs=RNGS(), **F64),
        POSITIONS,
    ),
    "Conv": (lambda: nnx.Conv(4, 3, (3, 3), rngs=RNGS(), **F64), IMAGE),
    "ConvTranspose": (lambda: nnx.ConvTranspose(4, 3, (3, 3), rngs=RNGS(), **F64), IMAGE),
    "Embed": (lambda: nnx.Embed(7, 4, rngs=RNGS(), **F64), IDS),
    "LayerNorm": (lambda: nnx.LayerNorm(6, rngs=RNGS(), **F64), POSITIONS),
    "RMSNorm": (lambda: nnx.RMSNorm(6, rngs=RNGS(), **F64), POSITIONS),
    "GroupNorm": (lambda: nnx.GroupNorm(4, 2, rngs=RNGS(), **F64), IMAGE),
    "BatchNorm": (lambda: nnx.BatchNorm(4, rngs=RNGS(), **F64), IMAGE),
    "MultiHeadAttention": (
        lambda: nnx.MultiHeadAttention(2, 6, decode=False, rngs=RNGS(), dtype=jnp.float64, **F64),
        POSITIONS,
    ),
    "LoRA": (lambda: nnx.LoRA(6, 2, 3, rngs=RNGS(), **F64), POSITIONS),
    "LoRALinear": (lambda: nnx.LoRALinear(6, 3, lora_rank=2, rngs=RNGS(), **F64), POSITIONS),
    "LSTMCell": (lambda: nnx.RNN(nnx.LSTMCell(6, 4, rngs=RNGS(), **F64)), POSITIONS),
    "OptimizedLSTMCell": (
        lambda: nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=RNGS(), **F64)),
        POSITIONS,
    ),
    "GRUCell": (lambda: nnx.RNN(nnx.GRUCell(6, 4, rngs=RNGS(), **F64)), POSITIONS),
    "SimpleCell": (
        lambda: nnx.RNN(nnx.SimpleCell(6, 4, rngs=RNGS(), dtype=jnp.float64, **F64)),
        POSITIONS,
    ),
    "PReLU": (lambda: nnx.PReLU(**F64), POSITIONS),
}


class Scanned(eqx.Module):
    """A cell over time, from zeros."""

    cell: eqx.Module

    def __call__(self, x):
        zeros = jnp.zeros(self.cell.hidden_size)
        state = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros
        return jax.tree.leaves(jax.lax.scan(lambda h, x: (self.cell(x, h), None), state, x)[0])[0]


class LookedUp(eqx.Module):
    embedding: eqx.nn.Embedding

    def __call__(self, ids):
        return jax.vmap(self.embedding)(ids)


class Attended(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x)


EQUINOX = {
    "Linear": (lambda: eqx.nn.Linear(6, 3, key=KEY), VECTOR),
    "MLP": (lambda: eqx.nn.MLP(6, 3, 4, 2, key=KEY), VECTOR),
    "Conv1d": (lambda: eqx.nn.Conv1d(5, 3, 3, key=KEY), POSITIONS),
    "Conv2d": (lambda: eqx.nn.Conv2d(4, 6, 3, groups=2, stride=2, key=KEY), CHANNELS_FIRST),
    "Conv3d": (lambda: eqx.nn.Conv3d(4, 2, 2, key=KEY), (4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: eqx.nn.ConvTranspose1d(5, 3, 3, stride=2, key=KEY), POSITIONS),
    "ConvTranspose2d": (lambda: eqx.nn.ConvTranspose2d(4, 2, 3, key=KEY), CHANNELS_FIRST),
    "ConvTranspose3d": (lambda: eqx.nn.ConvTranspose3d(4, 2, 2, key=KEY), (4, 3, 3, 3)),
    "Embedding": (lambda: LookedUp(eqx.nn.Embedding(7, 4, key=KEY)), IDS),
    "LayerNorm": (lambda: eqx.nn.LayerNorm(6), VECTOR),
    "RMSNorm": (lambda: eqx.nn.RMSNorm(6), VECTOR),
    "GroupNorm": (lambda: eqx.nn.GroupNorm(2, 4), CHANNELS_FIRST),
    "MultiheadAttention": (
        lambda: Attended(eqx.nn.MultiheadAttention(2, 6, use_query_bias=True, key=KEY)),
        POSITIONS,
    ),
    "GRUCell": (lambda: Scanned(eqx.nn.GRUCell(6, 4, key=KEY)), POSITIONS),
    "LSTMCell": (lambda: Scanned(eqx.nn.LSTMCell(6, 4, key=KEY)), POSITIONS),
    "PReLU": (lambda: eqx.nn.PReLU(), VECTOR),
    "WeightNorm": (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(6, 3, key=KEY)), VECTOR),
}
CASES = {
    **{f"linen {name}": ("linen", *case) for name, case in LINEN.items()},
    **{f"nnx {name}": ("nnx", *case) for name, case in NNX.items()},
    **{f"equinox {name}": ("equinox", *case) for name, case in EQUINOX.items()},
}
OFTEN = (
    *("linen Embed", "linen BatchNorm", "linen MultiHeadDotProductAttention"),
    *("linen OptimizedLSTMCell", "nnx Conv", "nnx LoRALinear", "equinox Conv2d"),
    *("equinox LSTMCell", "linen WeightNorm"),
)


WITHIN = {"nnx MultiHeadAttention": 1e-5}  # NNX computes attention in float32


def moved(random, leaf):
    """A parameter away from where it begins, so that no bias is 0; state stays from 0 up."""
    return leaf + 0.2 * jnp.abs(random.normal(size=leaf.shape))


def layer_of(library, make, x):
    """The layer, and parameters in float64."""
    random = np.random.default_rng(1)
    if library == "linen":
        layer = bp.from_flax(make())
        params = layer.init(KEY, x[0])
    else:
        layer, params = bp.from_nnx(make()) if library == "nnx" else bp.from_equinox(make())
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    return layer, jax.tree.map(functools.partial(moved, random), wide)


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in CASES]
)
def test_a_layer_of_another_library(name):
    library, make, shape = CASES[name]
    random = np.random.default_rng(0)
    x = random.integers(0, 7, (N, 5)) if shape == IDS else random.normal(size=(N, *shape))
    layer, params = layer_of(library, make, x)
    out = jax.eval_shape(layer.apply, params, x)
    y, loss = random.normal(size=out.shape), bp.losses.squared_error
    state = layer.is_state(params)
    v = direction(bp.trainable(params, state))

    def ours(params, x, y):
        def of(quantity, *more, **how):
            return quantity(layer, loss, **how)(params, x, y, *more)

        return {
            "gradient": of(bp.grad),
            "each": of(bp.per_example_grads),
            "norms": of(bp.per_example_grad_norms),
            "Gram": of(bp.grad_gram),
            "dots": of(bp.grad_dots, v),
            "second moment": of(bp.grad_second_moment),
            "clipped": of(bp.clipped_grad, max_norm=0.5),
        }

    def definitions(params, x, y):
        def cost(trained, x, y):
            one = jax.tree.map(lambda a: a[None], x)
            return loss.value(layer.reference(bp.merged(trained, params), one)[0], y)

        each = jax.vmap(jax.grad(cost), (None, 0, 0))(bp.trainable(params, state), x, y)
        flat = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
        norms = jnp.sqrt((flat**2).sum(1))
        shrunk = jnp.minimum(1, 0.5 / norms)
        return {
            "gradient": jax.tree.map(lambda g: g.mean(0), each),
            "each": each,
            "norms": norms,
            "Gram": flat @ flat.T,
            "dots": flat @ jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(v)]),
            "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
            "clipped": jax.tree.map(lambda g: jnp.einsum("n...,n->...", g, shrunk) / N, each),
        }

    found, wanted = jax.jit(ours)(params, x, y), jax.jit(definitions)(params, x, y)
    within = WITHIN.get(name, 1e-11)
    if "ttention" in name:  # the gradient of a key's bias is 0, which rounding alone tells apart
        for given in (found, wanted):
            for what in ("gradient", "each", "second moment", "clipped"):
                leaves = jax.tree.leaves(given[what])
                given[what] = [g for g in leaves if jnp.abs(g).max() > within / 10]
    check_equal(found, wanted, within)
