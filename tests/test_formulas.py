"""What layers and losses compute, against other libraries' and by their equations: the proofs hold
a backward to its forward, and would follow one that computes something else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layers import IDS, PROBABILITIES, SIGNS

import functional_bp as bp
from functional_bp import losses
from functional_bp.layers import activations, gates

KEY = jax.random.key(0)
Z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 2, jnp.float32)


def gated_by(sigma):
    def gated(z):
        u, g = jnp.split(z, 2, axis=-1)
        return u * sigma(g)

    return gated


def exact_gelu(z):
    return jax.nn.gelu(z, approximate=False)


ACTIVATIONS = [
    (bp.identity, lambda z: z),
    (bp.sigmoid, jax.nn.sigmoid),
    (bp.tanh, jnp.tanh),
    (bp.relu, jax.nn.relu),
    (bp.leaky_relu(), jax.nn.leaky_relu),
    (bp.leaky_relu(-0.2), lambda z: jax.nn.leaky_relu(z, -0.2)),
    (bp.gelu, exact_gelu),
    (bp.gelu_tanh, jax.nn.gelu),
    (bp.silu, jax.nn.silu),
    (bp.softplus, jax.nn.softplus),
    (bp.elu(), jax.nn.elu),
    (bp.elu(0.7), lambda z: jax.nn.elu(z, 0.7)),
    (bp.selu, jax.nn.selu),
    (bp.mish, jax.nn.mish),
    (bp.hard_tanh, jax.nn.hard_tanh),
    (bp.softmax, jax.nn.softmax),
    (bp.log_softmax, jax.nn.log_softmax),
    (bp.glu, jax.nn.glu),
    (bp.reglu, gated_by(jax.nn.relu)),
    (bp.geglu, gated_by(exact_gelu)),
    (bp.swiglu, gated_by(jax.nn.silu)),
]


@pytest.mark.parametrize(("layer", "formula"), ACTIVATIONS, ids=[a.name for a, _ in ACTIVATIONS])
def test_an_activation_is_jaxs(layer, formula):
    np.testing.assert_allclose(layer.apply((), Z), formula(Z), rtol=2e-6, atol=1e-6)


def test_every_activation_is_compared():
    found = {layer.name.split("(")[0] for layer, _ in ACTIVATIONS}
    public = {
        layer.name
        for module in (activations, gates)
        for layer in vars(module).values()
        if isinstance(layer, bp.Layer)
    }
    assert found == public | {"leaky_relu", "elu"}


def smoothed(a, y):
    q = optax.smooth_labels(jax.nn.one_hot(y, 4), 0.1)
    return optax.softmax_cross_entropy(a, q)


LOSSES = [
    (losses.squared_error, SIGNS / 3, lambda a, y: optax.l2_loss(a, y).sum(1)),
    (losses.mean_squared_error, SIGNS / 3, lambda a, y: optax.squared_error(a, y).mean(1)),
    (losses.absolute_error, SIGNS / 3, lambda a, y: abs(a - y).sum(1)),
    (losses.huber(), SIGNS / 3, lambda a, y: optax.huber_loss(a, y).sum(1)),
    (losses.huber(0.5), SIGNS / 3, lambda a, y: optax.huber_loss(a, y, delta=0.5).sum(1)),
    (losses.hinge, SIGNS, lambda a, y: optax.hinge_loss(a, y).sum(1)),
    (losses.softmax_cross_entropy, IDS, optax.softmax_cross_entropy_with_integer_labels),
    (losses.softmax_cross_entropy, PROBABILITIES, optax.softmax_cross_entropy),
    (losses.smoothed_softmax_cross_entropy(0.1), IDS, smoothed),
    (
        losses.sigmoid_cross_entropy,
        PROBABILITIES,
        lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(1),
    ),
    (
        losses.kl_divergence,
        PROBABILITIES,
        lambda a, y: optax.kl_divergence(jax.nn.log_softmax(a), y),
    ),
]


@pytest.mark.parametrize(("loss", "y", "formula"), LOSSES, ids=[loss.name for loss, *_ in LOSSES])
def test_a_loss_is_optaxs(loss, y, formula):
    np.testing.assert_allclose(loss.costs(Z, y), formula(Z, y), rtol=2e-6, atol=1e-6)


def test_every_loss_is_compared():
    found = {loss.name.split("(")[0] for loss, _, _ in LOSSES}
    public = {loss.name for loss in vars(losses).values() if isinstance(loss, losses.Loss)}
    assert found == public | {"huber", "smoothed_softmax_cross_entropy"}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_plain_recurrent_layer_is_its_equation(activation):
    layer, f = bp.rnn(4, activation=activation), {"tanh": np.tanh, "relu": jax.nn.relu}[activation]
    draw = np.random.default_rng(0)
    p = {
        name: draw.normal(size=shape).astype("float32")
        for name, shape in (("weight_x", (4, 4)), ("weight_h", (4, 4)), ("bias", 4))
    }
    h, wanted = np.zeros(4), []
    for x_t in Z:
        h = f(p["weight_x"] @ x_t + p["bias"] + p["weight_h"] @ h)
        wanted.append(h)
    np.testing.assert_allclose(layer.apply(p, Z[None])[0], np.stack(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [bp.rnn, bp.lstm, bp.gru])
def test_recurrent_weights_begin_orthogonal_and_forget_gates_open(cell):
    params = cell(8).init(KEY, jnp.zeros((3, 512)))
    for gate in jnp.split(params["weight_h"], len(params["weight_h"]) // 8):
        np.testing.assert_allclose(gate @ gate.T, np.eye(8), atol=1e-5)
    # 4096 numbers or more: the standard error of their variance is 2 % of it.
    assert params["weight_x"].var() * 512 == pytest.approx(1, abs=0.1)
    forget = slice(8, 16) if cell is bp.lstm else slice(0)
    assert (params["bias"][forget] == 1).all()
    assert not params["bias"].at[forget].set(0).any()


def test_dropout_keeps_the_mean():
    """At a rate that is not its own complement."""
    y = bp.dropout(0.2).apply((), jnp.ones((64, 64)), KEY)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.8])
    # The standard error of a share of 4096 is 0.006.
    assert (y != 0).mean() == pytest.approx(0.8, abs=0.04)


def test_joins_are_numpys():
    xs = (Z, 2 * Z, Z - 1)
    np.testing.assert_allclose(bp.add.apply((), xs), np.sum(xs, 0), rtol=1e-6)
    np.testing.assert_allclose(bp.multiply.apply((), xs), np.prod(xs, 0), rtol=1e-6)
    np.testing.assert_array_equal(bp.concatenate().apply((), xs), np.concatenate(xs, -1))
    positions = tuple(x[None] for x in xs)
    joined = bp.concatenate(0).apply((), positions)
    np.testing.assert_array_equal(joined, np.concatenate(positions, 1))
    np.testing.assert_array_equal(bp.flatten.apply((), Z[None]), Z.reshape(1, -1))


def test_an_entry_and_a_layer_at_one_leave_the_others():
    x = {"x": Z, "other": jnp.arange(3)}
    np.testing.assert_array_equal(bp.entry("other").apply((), x), x["other"])
    y = bp.at("x", bp.tanh).apply((), x)
    np.testing.assert_allclose(y["x"], jnp.tanh(Z), rtol=1e-6)
    np.testing.assert_array_equal(y["other"], x["other"])


def test_an_embedding_looks_up_rows():
    weight = jax.random.normal(KEY, (5, 3))
    y = bp.embedding(5, 3).apply({"weight": weight}, jnp.array([[4, 0], [1, 1]]))
    np.testing.assert_array_equal(y, np.asarray(weight)[[[4, 0], [1, 1]]])
