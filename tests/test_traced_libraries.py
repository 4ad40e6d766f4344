"""Flax's and Equinox's own layers, unchanged: every quantity equals its definition."""

import functools
import inspect

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal, direction, first_order, first_order_by_vmap
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


class SpectrallyNormed(nn.Module):
    """As it is at inference, which does not renew its estimate."""

    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(3, **F64))(x, update_stats=False)


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
    "MultiHeadAttention": (lambda: nn.MultiHeadAttention(2, qkv_features=6, **F64), POSITIONS),
    "SelfAttention": (lambda: nn.SelfAttention(2, qkv_features=6, **F64), POSITIONS),
    "LSTMCell": (lambda: over_time(nn.LSTMCell(4, **F64)), POSITIONS),
    "OptimizedLSTMCell": (lambda: over_time(nn.OptimizedLSTMCell(4, **F64)), POSITIONS),
    "GRUCell": (lambda: over_time(nn.GRUCell(4, **F64)), POSITIONS),
    "MGUCell": (lambda: over_time(nn.MGUCell(4, **F64)), POSITIONS),
    "SimpleCell": (lambda: over_time(nn.SimpleCell(4, **F64)), POSITIONS),
    "ConvLSTMCell": (lambda: over_time(nn.ConvLSTMCell(2, (3,), **F64)), IMAGE),
    "RNN": (lambda: nn.RNN(nn.GRUCell(4, **F64), reverse=True, keep_order=True), POSITIONS),
    "Bidirectional": (
        lambda: nn.Bidirectional(
            over_time(nn.GRUCell(4, **F64)), over_time(nn.SimpleCell(4, **F64))
        ),
        POSITIONS,
    ),
    "PReLU": (lambda: nn.PReLU(**F64), POSITIONS),
    "WeightNorm": (lambda: nn.WeightNorm(nn.Dense(3, **F64)), POSITIONS),
    "SpectralNorm": (SpectrallyNormed, POSITIONS),
}
RNGS = functools.partial(nnx.Rngs, 0)


class SpectrallyNormedNNX(nnx.Module):
    def __init__(self):
        self.layer = nnx.SpectralNorm(nnx.Linear(6, 3, rngs=RNGS(), **F64), rngs=RNGS())

    def __call__(self, x):
        return self.layer(x, update_stats=False)


def attention(**options):
    return nnx.MultiHeadAttention(
        2, 6, decode=False, rngs=RNGS(), dtype=jnp.float64, **F64, **options
    )


def rnn(cell, hidden=4):
    return nnx.RNN(cell(6, hidden, rngs=RNGS(), dtype=jnp.float64, **F64))


NNX = {
    "Linear": (lambda: nnx.Linear(6, 3, rngs=RNGS(), **F64), POSITIONS),
    "LinearGeneral": (lambda: nnx.LinearGeneral(6, (2, 3), rngs=RNGS(), **F64), POSITIONS),
    "Einsum": (
        lambda: nnx.Einsum("bti,ihk->bthk", (6, 2, 3), (2, 3), rngs=RNGS(), **F64),
        POSITIONS,
    ),
    "Conv": (lambda: nnx.Conv(4, 3, (3, 3), rngs=RNGS(), **F64), IMAGE),
    "ConvTranspose": (lambda: nnx.ConvTranspose(4, 3, (3, 3), (2, 2), rngs=RNGS(), **F64), IMAGE),
    "Embed": (lambda: nnx.Embed(7, 4, rngs=RNGS(), **F64), IDS),
    "LayerNorm": (lambda: nnx.LayerNorm(6, rngs=RNGS(), **F64), POSITIONS),
    "RMSNorm": (lambda: nnx.RMSNorm(6, rngs=RNGS(), **F64), POSITIONS),
    "GroupNorm": (lambda: nnx.GroupNorm(4, 2, rngs=RNGS(), **F64), IMAGE),
    "BatchNorm": (lambda: nnx.BatchNorm(4, rngs=RNGS(), **F64), IMAGE),
    "MultiHeadAttention": (attention, POSITIONS),
    "MultiHeadAttention with dropout": (lambda: attention(dropout_rate=0.5), POSITIONS),
    "MultiHeadAttention with norms": (
        lambda: attention(dropout_rate=0.5, normalize_qk=True),
        POSITIONS,
    ),
    "LoRA": (lambda: nnx.LoRA(6, 2, 3, rngs=RNGS(), **F64), POSITIONS),
    "LoRA of a layer": (
        lambda: nnx.LoRA(
            6, 2, 3, base_module=nnx.Linear(6, 3, rngs=RNGS(), **F64), rngs=RNGS(), **F64
        ),
        POSITIONS,
    ),
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
    "RNN": (
        lambda: nnx.RNN(nnx.GRUCell(6, 4, rngs=RNGS(), **F64), reverse=True, keep_order=True),
        POSITIONS,
    ),
    "Bidirectional": (
        lambda: nnx.Bidirectional(rnn(nnx.GRUCell), rnn(nnx.SimpleCell), rngs=RNGS()),
        POSITIONS,
    ),
    "PReLU": (lambda: nnx.PReLU(**F64), POSITIONS),
    "InstanceNorm": (lambda: nnx.InstanceNorm(4, rngs=RNGS(), **F64), IMAGE),
    "WeightNorm": (
        lambda: nnx.WeightNorm(nnx.Linear(6, 3, rngs=RNGS(), **F64), rngs=RNGS()),
        POSITIONS,
    ),
    "SpectralNorm": (SpectrallyNormedNNX, POSITIONS),
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


def with_state(make, *args, **options):
    """A layer as it is at inference, beside its state."""
    layer, state = eqx.nn.make_with_state(make)(*args, **options)

    class WithState(eqx.Module):
        layer: eqx.Module

        def __call__(self, x):
            return self.layer(x, jax.lax.stop_gradient(state), inference=True)[0]

    return WithState(layer)


class Tied(eqx.Module):
    """A layer and its transpose."""

    shared: eqx.nn.Shared

    def __call__(self, x):
        there, back = self.shared()
        return back(jnp.tanh(there(x)))


def tied():
    pair = eqx.nn.Linear(6, 3, key=KEY), eqx.nn.Linear(3, 6, key=KEY)
    shared = eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight.T)
    return Tied(shared)


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
    "Conv": (lambda: eqx.nn.Conv(2, 4, 3, 2, dilation=2, key=KEY), CHANNELS_FIRST),
    "ConvTranspose": (
        lambda: eqx.nn.ConvTranspose(2, 4, 2, 3, stride=2, output_padding=1, key=KEY),
        CHANNELS_FIRST,
    ),
    "BatchNorm": (lambda: with_state(eqx.nn.BatchNorm, 6, "batch", mode="batch"), VECTOR),
    "SpectralNorm": (
        lambda: with_state(
            lambda: eqx.nn.SpectralNorm(eqx.nn.Linear(6, 3, key=KEY), "weight", key=KEY)
        ),
        VECTOR,
    ),
    "Shared": (tied, VECTOR),
    "WeightNorm": (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(6, 3, key=KEY)), VECTOR),
}
CASES = {
    **{f"linen {name}": ("linen", *case) for name, case in LINEN.items()},
    **{f"nnx {name}": ("nnx", *case) for name, case in NNX.items()},
    **{f"equinox {name}": ("equinox", *case) for name, case in EQUINOX.items()},
}
BASE, NONE = "a base, of which others are", "no parameters"
POOLS = ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax")
WITHOUT = {  # parameters of their own, and why
    "linen": {
        **dict.fromkeys(("Module", "RNNCellBase"), BASE),
        **dict.fromkeys(("Dropout", "Sequential"), NONE),
        **dict.fromkeys(
            ("Fp8DotGeneralOp", "Fp8DirectDotGeneralOp", "NANOOFp8DotGeneralOp", "Fp8Einsum"),
            "products in float8: their scales are state",
        ),
        "Fp8DotGeneral": "Fp8DirectDotGeneralOp by its former name",
    },
    "nnx": {
        **dict.fromkeys(("Module", "RNNCellBase"), BASE),
        **dict.fromkeys(("Dict", "Dropout", "List", "RoPE", "Sequential"), NONE),
    },
    "equinox": {
        "StatefulLayer": BASE,
        "StateIndex": "a name of state",
        **dict.fromkeys(("Dropout", "Identity", "Lambda", "Sequential"), NONE),
        **dict.fromkeys(("AdaptivePool", "Pool", "RotaryPositionalEmbedding"), NONE),
        **{f"{kind}Pool{n}d": NONE for kind in POOLS for n in (1, 2, 3)},
    },
}


@pytest.mark.parametrize(
    ("library", "module", "base", "table"),
    [
        ("linen", nn, nn.Module, LINEN),
        ("nnx", nnx, nnx.Module, NNX),
        ("equinox", eqx.nn, eqx.Module, EQUINOX),
    ],
)
def test_every_layer_with_parameters_is_in_the_tables(library, module, base, table):
    public = {name: c for name, c in vars(module).items() if name[0] != "_" and inspect.isclass(c)}
    layers = {name for name, c in public.items() if issubclass(c, base)}
    proven, without = {name.split()[0] for name in table}, set(WITHOUT[library])
    missing = layers - proven - without
    assert not missing, f"{module.__name__}: not proven: {', '.join(sorted(missing))}"
    assert proven <= layers - without


OFTEN = (
    *("linen Embed", "linen BatchNorm", "linen MultiHeadDotProductAttention"),
    *("linen OptimizedLSTMCell", "nnx Conv", "nnx LoRALinear", "equinox Conv2d"),
    *("equinox LSTMCell", "linen WeightNorm"),
)


WITHIN = {"nnx MultiHeadAttention": 1e-5}  # the softmax of jax.nn.dot_product_attention: float32


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

    def cost(trained, x, y):
        one = jax.tree.map(lambda a: a[None], x)
        return loss.value(layer.reference(bp.merged(trained, params), one)[0], y)

    ours = functools.partial(first_order, layer, loss, v)
    by_vmap = functools.partial(first_order_by_vmap, cost, v)
    found = jax.jit(ours)(params, x, y)
    wanted = jax.jit(by_vmap)(bp.trainable(params, state), x, y)
    within = WITHIN.get(name, 1e-12)
    if "ttention" in name:  # the gradient of a key's bias is 0, which rounding alone tells apart
        for given in (found, wanted):
            for what in ("gradient", "each", "second moment", "clipped"):
                leaves = jax.tree.leaves(given[what])
                given[what] = [g for g in leaves if jnp.abs(g).max() > within / 10]
    check_equal(found, wanted, within)
