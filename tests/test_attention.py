"""Attention: every mask over many blocks, other libraries' numbers, and its memory."""

import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp
from functional_bp.layers.attention import streamed
from functional_bp.layers.attention.positions import alibi_slopes, rotated

HALF = bp.losses.loss(
    lambda a, y: 0.5 * jnp.sum((a["x"] if isinstance(a, dict) else a) ** 2),
    lambda a, y: (
        {k: v if k == "x" else jnp.zeros_like(v) for k, v in a.items()}
        if isinstance(a, dict)
        else a
    ),
    name="half",
)
VARIANTS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window on both sides": {"window": 5, "causal": False},
    "window of a block": {"window": 4},
    "grouped-query": {"kv_heads": 2},
    "multi-query": {"kv_heads": 1},
    "rotary": {"rotary": 100.0},
    "alibi": {"alibi": True},
    "alibi, full": {"alibi": True, "causal": False},
}


@pytest.mark.parametrize("block", [4, pytest.param(7, marks=pytest.mark.exhaustive), 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_mask_equals_the_textbook_formula_over_many_blocks(name, block, monkeypatch):
    blocks_of(block, monkeypatch)
    layer = bp.attention(4, **VARIANTS[name])
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 18, 8), jnp.float64)
        params = moved(layer.init(jax.random.key(1), x[0]))
        by_hand, by_autodiff = (
            bp.value_and_grad(layer, HALF, method=method)(params, x, jnp.zeros(2))
            for method in ("manual", "autodiff")
        )
        check_close(by_hand, by_autodiff)
        norms = bp.per_example_grad_norms(layer, HALF)(params, x, jnp.zeros(2))
        each = bp.per_example_grads(layer, HALF)(params, x, jnp.zeros(2))
        squares = sum((g.reshape(2, -1) ** 2).sum(1) for g in jax.tree.leaves(each))
        check_close(norms, jnp.sqrt(squares))


def blocks_of(size, monkeypatch):
    monkeypatch.setattr(streamed, "LEAST", size)
    monkeypatch.setattr(streamed, "MOST", size)


def moved(params):
    return jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)


def check_close(a, b):
    """To 1e-11 of a leaf's largest. (p does not change with b_k: its gradient is rounding.)"""
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        largest = float(jnp.abs(other).max())
        assert jnp.isfinite(one).all()
        assert jnp.abs(one - other).max() <= 1e-11 * (largest if largest > 1e-13 else 1)


PAIRS = {
    "bias": lambda t, s: {"bias": jnp.cos(jnp.arange(t * s)).reshape(t, s)},
    "bias of each head": lambda t, s: {"bias": jnp.cos(jnp.arange(4 * t * s)).reshape(4, t, s)},
    "mask": lambda t, s: {"mask": (jnp.arange(t * s) % 5 < 3).reshape(t, s).at[2].set(False)},
    "both": lambda t, s: PAIRS["bias"](t, s) | PAIRS["mask"](t, s),
    "a bias of −∞": lambda t, s: {"bias": jnp.where(PAIRS["mask"](t, s)["mask"], 0.5, -jnp.inf)},
}


@pytest.mark.parametrize("to", ["itself", "a context"])
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_given_for_each_pair_of_positions(name, to, monkeypatch):
    blocks_of(4, monkeypatch)
    with jax.enable_x64(True):
        t, s = (9, 9) if to == "itself" else (9, 7)
        layer = bp.attention(4, kv_heads=2, causal=to == "itself")
        keys = jax.random.split(jax.random.key(0), 3)
        x = {"x": jax.random.normal(keys[0], (2, t, 8))}
        x |= jax.tree.map(lambda a: jnp.stack([a, a]), PAIRS[name](t, s))
        if to == "a context":
            x["context"] = jax.random.normal(keys[1], (2, s, 8))
        params = moved(layer.init(keys[2], jax.tree.map(lambda a: a[0], x)))
        floats = {k: v for k, v in x.items() if v.dtype != bool}

        def both(params, floats):
            y, residuals = layer.forward(params, x | floats)
            dy = jax.tree.map(lambda a: jnp.sin(a) if a.dtype != bool else None, y)
            zeros = {k: jnp.zeros_like(v) if k != "x" else dy[k] for k, v in floats.items()}
            dx, totals = layer.backward(params, residuals, dy | zeros, bp.contractions.total)
            wanted, pull = jax.vjp(lambda p, f: layer.reference(p, x | f)["x"], params, floats)
            return (y["x"], totals, {k: dx[k] for k in floats}), (wanted, *pull(dy["x"]))

        given, wanted = jax.jit(both)(params, floats)
        check_close(given, wanted)


@pytest.mark.parametrize("lengths", [[0, 5], [9, 4], [1, 9]])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_seen_by_nobody(lengths, causal, monkeypatch):
    """Whatever stands there; and where all is padding, outputs are the bias alone, not NaN."""
    blocks_of(4, monkeypatch)
    layer = bp.attention(2, causal=causal)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 9, 4), jnp.float64)
        params = moved(layer.init(jax.random.key(1), x[0]))
        valid = jnp.arange(9) < jnp.array(lengths)[:, None]
        other = jnp.where(valid[..., None], x, 7.0)
        length = jnp.array(lengths)
        given = layer.apply(params, {"x": x, "length": length})["x"]
        changed = layer.apply(params, {"x": other, "length": length})["x"]
        check_close(jnp.where(valid[..., None], given, 0), jnp.where(valid[..., None], changed, 0))
        if lengths[0] == 0:
            bias = jnp.broadcast_to(params["output"]["bias"], (9, 4))
            check_close(given[0], bias)
            gradient = bp.grad(layer, HALF)(params, {"x": x, "length": length}, jnp.zeros(2))
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_it_is_flax_attention():
    theirs = flax.linen.MultiHeadDotProductAttention(
        num_heads=2, dtype=jnp.float64, param_dtype=jnp.float64
    )
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (3, 5, 4), jnp.float64)
        variables = moved(theirs.init(jax.random.key(1), x, x))
        mask = flax.linen.make_causal_mask(x[..., 0])

        def ours(of):
            weight, bias = of["kernel"], of["bias"]
            rows = weight.reshape(-1, 4) if weight.shape[-1] == 4 else weight.reshape(4, -1)
            return {"weight": rows.T, "bias": bias.ravel()}

        params = {
            {"out": "output"}.get(name, name): ours(of) for name, of in variables["params"].items()
        }
        check_close(bp.attention(2).apply(params, x), theirs.apply(variables, x, x, mask=mask))
        check_close(bp.attention(2, causal=False).apply(params, x), theirs.apply(variables, x, x))


def test_rotary_positions_are_products_of_complex_numbers():
    x = np.random.default_rng(0).normal(size=(6, 8))
    angles = np.arange(6)[:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angles)
    with jax.enable_x64(True):
        found = rotated(jnp.asarray(x), 100.0)
        check_close(found, np.concatenate([turned.real, turned.imag], -1))
        check_close(rotated(found, 100.0, back=True), x)


def test_its_weights_are_drawn_as_one_says():
    ones = bp.attention(2, weight_init=jax.nn.initializers.ones)
    params = ones.init(jax.random.key(0), jnp.ones((3, 4)))
    assert all((projection["weight"] == 1).all() for projection in params.values())


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_memory_is_linear_in_the_length():
    def temporary(t):
        layer = bp.attention(2)
        x = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
        params = jax.eval_shape(
            layer.init, jax.random.key(0), jax.ShapeDtypeStruct((t, 16), x.dtype)
        )
        step = jax.jit(lambda params, x: bp.grad(layer, HALF)(params, x, jnp.zeros(1)))
        return step.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 4.4 * temporary(4096) < 4.4 * 4.4 * temporary(1024)
    assert temporary(4096) < 4096 * 4096 * 4 / 4  # a quarter of one matrix of all positions


def test_half_precision_is_summed_in_single():
    layer = bp.attention(2)
    x = jax.random.normal(jax.random.key(0), (2, 300, 16))
    params = layer.init(jax.random.key(1), x[0])
    wanted = bp.grad(layer, HALF)(params, x, jnp.zeros(2))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    found = bp.grad(layer, HALF)(*half, jnp.zeros(2))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        # bfloat16 has 8 bits; ∂C/∂b_k is 0 but for rounding
        assert a.dtype == jnp.bfloat16
        scale = max(float(jnp.abs(b).max()), 1.0)
        assert jnp.abs(a.astype(jnp.float32) - b).max() <= 0.05 * scale


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bp.attention(4, kv_heads=3), "kv_heads: takes a divisor of 4 heads, got 3"),
        (lambda: bp.attention(2, window=0), "window: takes a whole number from 1, got 0"),
        (lambda: bp.attention(3).init(KEY, X[0]), "takes features that 3 heads divide, got 4"),
        (lambda: bp.attention(4, rotary=10.0).init(KEY, X[0]), "of an even size for rotary"),
        (lambda: bp.attention(2).init(KEY, X[0, 0]), r"takes x of shape \(t, features\)"),
        (lambda: bp.attention(2).init(KEY, {"x": X[0], "context": X[0]}), "say causal=False"),
        (lambda: bp.positions(4).init(KEY, X[0]), "takes up to 4 positions, got 5"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(bp.ModelError, match=message):
        make()


KEY, X = jax.random.key(0), jnp.ones((2, 5, 4))


def test_a_transformer_is_composed_of_it_and_learns():
    block = bp.chain(
        bp.residual(bp.chain(bp.layer_norm(), bp.attention(2))),
        bp.residual(bp.chain(bp.layer_norm(), bp.dense(32), bp.gelu, bp.dense(16))),
    )
    model = bp.chain(
        bp.embedding(11, 16), bp.positions(12), bp.repeat(block, 2), bp.layer_norm(), bp.dense(11)
    )
    random = np.random.default_rng(0)
    begin = random.integers(11, size=(64, 1))
    words = (begin + np.arange(13) * random.integers(1, 3, size=(64, 1))) % 11
    x, y = words[:, :-1], words[:, 1:]
    loss = bp.losses.softmax_cross_entropy
    params = model.init(jax.random.key(0), x[0])
    run = bp.fit(model, loss, params, bp.minibatches(x, y, 16, seed=0), optax.adam(1e-2), epochs=30)
    assert run.history.epoch_loss[-1] < 0.4 < math.log(11)
    bp.testing.check_model(model, loss, params, x[:3], y[:3])
