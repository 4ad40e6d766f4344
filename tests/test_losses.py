"""Losses: proven, finite at extreme values, of the dtype given, and what they refuse."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import IDS, LOSSES, PROBABILITIES, SIGNS

import functional_bp as bp

X = np.random.default_rng(0).normal(size=(3, 4))
PARAMS = {"weight": np.eye(4), "bias": np.zeros(4)}
EXTREME = [-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4]
OF_LOGITS = [name for name in LOSSES if "cross_entropy" in name or name == "kl_divergence"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_proven_in_every_quantity(name):
    loss, y = LOSSES[name]
    bp.testing.check_model(bp.dense(4), loss, PARAMS, X, y)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.sampled_from(EXTREME), min_size=12, max_size=12))
def test_extreme_outputs_have_a_finite_cost_and_delta(name, dtype, outputs):
    loss, y = LOSSES[name]
    a = jnp.asarray(outputs, dtype).reshape(3, 4)
    costs, delta = loss.costs(a, y), loss.deltas(a, y)
    assert np.isfinite(costs).all()
    assert np.isfinite(np.asarray(delta, np.float32)).all()
    assert (costs.dtype, delta.dtype) == (jnp.float32, a.dtype)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_targets_of_zero_and_one_have_a_finite_cost_and_delta(name):
    loss, y = LOSSES[name]
    if y is not IDS:
        y = jnp.eye(4)[:3]
    a = jnp.asarray(np.tile([[1e4, -1e4, 0, 5]], (3, 1)), jnp.float32)
    assert np.isfinite(loss.costs(a, y)).all()
    assert np.abs(loss.deltas(a, y)).max() <= 1


def test_a_saturated_network_has_a_finite_cost_and_gradient():
    model = bp.chain(bp.dense(4), bp.sigmoid, bp.dense(4), bp.tanh, bp.dense(4))
    params = model.init(jax.random.key(0), X[0].astype(np.float32))
    far = jax.tree.map(lambda p: 1e4 * p, params)
    for name in OF_LOGITS:
        loss, y = LOSSES[name]
        cost, gradient = bp.value_and_grad(model, loss)(far, X.astype(np.float32), y)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((cost, gradient)))


def test_softmax_cross_entropy_of_ids_is_that_of_their_one_hot_rows():
    loss, one_hot = bp.losses.softmax_cross_entropy, jax.nn.one_hot(IDS, 4)
    np.testing.assert_allclose(loss.costs(X, IDS), loss.costs(X, one_hot), rtol=1e-6)
    np.testing.assert_allclose(loss.deltas(X, IDS), loss.deltas(X, one_hot), atol=1e-6)


def test_cross_entropy_over_positions_is_the_mean_over_them():
    loss, twice = bp.losses.softmax_cross_entropy, np.stack([X, X], 1)
    ids = jnp.stack([IDS, IDS], 1)
    np.testing.assert_allclose(loss.costs(twice, ids), loss.costs(X, IDS), rtol=1e-6)
    np.testing.assert_allclose(2 * loss.deltas(twice, ids)[:, 0], loss.deltas(X, IDS), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "y"),
    {
        "squared_error": SIGNS[:, :1],
        "mean_squared_error": SIGNS[:, 0],
        "absolute_error": SIGNS.astype(int),
        "sigmoid_cross_entropy": IDS,
        "softmax_cross_entropy of ids": IDS[:, None],
        "softmax_cross_entropy of probabilities": PROBABILITIES[:, :3],
        "smoothed_softmax_cross_entropy": IDS.astype(float),
        "kl_divergence": IDS,
        "hinge": {"a tree": SIGNS},
    }.items(),
)
def test_a_target_that_does_not_fit_is_refused_never_broadcast(name, y):
    loss, _ = LOSSES[name]
    with pytest.raises(bp.ModelError, match=name.split(" of ")[0] + ".*: takes .* got "):
        bp.grad(bp.dense(4), loss)(PARAMS, X, y)


@pytest.mark.parametrize("method", ["manual", "autodiff"])
@pytest.mark.parametrize(
    ("name", "logits", "y", "cost"),
    [
        ("softmax_cross_entropy", [1e5, 1e5 + 1], 0, np.log1p(np.e)),
        ("softmax_cross_entropy", [1e5, 1e5 + 1], [0.7, 0.3], np.log1p(np.e) - 0.3),
        ("softmax_cross_entropy", [-1e5, 1 - 1e5], [0.7, 0.3], np.log1p(np.e) - 0.3),
        ("kl_divergence", [1e5, 1e5 + 1], [0.5, 0.5], np.log1p(np.e) - 0.5 - np.log(2)),
        ("softmax_cross_entropy", [-np.inf, 1.0], 1, 0.0),
        ("softmax_cross_entropy", [-np.inf, 1.0], [0.0, 1.0], 0.0),
        ("kl_divergence", [-np.inf, 1.0], [0.0, 1.0], 0.0),
        ("sigmoid_cross_entropy", [1e5, -1e5], [1.0, 0.0], 0.0),
        ("sigmoid_cross_entropy", [np.inf, -np.inf], [1.0, 0.0], 0.0),
    ],
)
def test_a_cost_keeps_its_digits_at_large_logits(name, logits, y, cost, method):
    """In float32, whose numbers lie 0.0078 apart at 1e5; and what is impossible costs nothing."""
    a, y = jnp.array([logits], jnp.float32), jnp.asarray([y])
    y = y if jnp.issubdtype(y.dtype, jnp.integer) else y.astype(jnp.float32)
    loss = getattr(bp.losses, name)
    shift = bp.rule(  # logits that are parameters, so that δ^L is the gradient
        lambda key, x: {"a": x},
        lambda params, x, key=None: (params["a"], ()),
        lambda params, residuals, dy: (None, {"a": bp.factors.Itself(dy)}),
    )
    value, gradient = bp.value_and_grad(shift, loss, method=method)({"a": a[0]}, a, y)
    np.testing.assert_allclose(value, cost, rtol=1e-6, atol=1e-7)
    assert jnp.isfinite(gradient["a"]).all()
