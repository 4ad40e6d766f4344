"""State: leaves of the parameters that are renewed by a batch and have no gradient.

Two layers with state are proven in every place: ``bp.batch_norm``, and a user's rule that does not
mix examples. What is not yet as it should be is marked ``wanted``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import check_equal, compiled, direction, each_grad

import functional_bp as bp

KEY = jax.random.key(0)
LOSS = bp.losses.squared_error
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-2)  # made once, so that each model is compiled once
BOTH = ("manual", "autodiff")


def wanted(reason):
    return pytest.mark.xfail(strict=True, reason=reason)


def exactly(test):
    """In float64, operation by operation: nothing is compiled."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.enable_x64(True), jax.disable_jit():
            return test(*args, **kwargs)

    return run


def tally(factor=1.0, **given):
    """y = factor · s ⊙ x; it counts batches and adds up the means of what it gave."""

    def forward(params, x, key=None):
        y = factor * params["s"] * x
        return y, (x, y)

    def renew(params, residuals):
        y = residuals[1]
        mean = y.reshape(-1, y.shape[-1]).mean(0)
        return params | {"count": params["count"] + 1, "sum": params["sum"] + mean}

    functions = {
        "init": lambda key, x: {
            "s": jnp.ones(x.shape[-1:], x.dtype),
            "count": jnp.zeros((), jnp.result_type(float)),
            "sum": jnp.zeros(x.shape[-1:], x.dtype),
        },
        "forward": forward,
        "backward": lambda params, xy, dy: (
            factor * params["s"] * dy,
            {"s": bp.factors.Summed(factor * xy[0] * dy)},
        ),
        "renew": renew,
        "name": "tally",
        "batched": True,
        "state": ("count", "sum"),
    }
    return bp.rule(**functions | given)


def axes(x):
    return tuple(range(x.ndim - 1))


def normalised(p, x):
    """Batch norm by its definition."""
    r = 1 / np.sqrt(x.var(axes(x)) + 1e-5)
    return p["scale"] * (x - x.mean(axes(x))) * r + p["bias"]


def averaged(p, x):
    variance = x.var(axes(x), ddof=1)
    return {
        "mean": 0.9 * p["mean"] + 0.1 * x.mean(axes(x)),
        "var": 0.9 * p["var"] + 0.1 * variance,
    }


def tallied(p, x):
    return {"count": p["count"] + 1, "sum": p["sum"] + (p["s"] * x).mean(axes(x))}


TALLY, NORM = tally(inference=tally(0.5, renew=lambda params, residuals: params)), bp.batch_norm()
# Each layer; its output for a batch and its state after that, by their definitions.
STATEFUL = {
    "batch_norm": (NORM, normalised, averaged),
    "a user's rule": (TALLY, lambda p, x: p["s"] * x, tallied),
}


def dense(p, x):
    return x @ p["weight"].T + p["bias"]


def shared(layer):
    """Two blocks with one weight and one scale."""
    scale = "scale" if layer is NORM else "s"
    pair = bp.chain(bp.dense(3), layer, bp.dense(3), layer)
    return bp.tied(pair, {(2, "weight"): (0, "weight"), (3, scale): (1, scale)})


def inputs_of_shared(f, p, x):
    first = dense(p[0], x)
    tied_weight = {"weight": p[0]["weight"], "bias": p[2]["bias"]}
    return {(1,): first, (3,): dense(tied_weight, f(p[1], first))}


# A model around a layer, and what that layer is given in each of its places (f is its output).
MODELS = {
    "chain": (
        lambda layer: bp.chain(bp.dense(3), layer, bp.tanh),
        lambda f, p, x: {(1,): dense(p[0], x)},
    ),
    "residual": (
        lambda layer: bp.residual(bp.chain(bp.dense(3), layer), layer),
        lambda f, p, x: {(0, 1): dense(p[0][0], x), (1,): x},
    ),
    "parallel": (
        lambda layer: bp.chain(bp.parallel(layer, bp.chain(bp.tanh, layer)), bp.add),
        lambda f, p, x: {(0, 0): x, (0, 1, 1): np.tanh(x)},
    ),
    "tied": (shared, inputs_of_shared),
    "at": (
        lambda layer: bp.chain(bp.at("x", bp.chain(bp.dense(3), layer)), bp.entry("x")),
        lambda f, p, x: {(0, 1): dense(p[0][0], x["x"])},
    ),
    "bidirectional": (
        lambda layer: bp.bidirectional(
            bp.chain(layer, bp.rnn(2)), bp.chain(bp.tanh, layer, bp.rnn(2, reverse=True))
        ),
        lambda f, p, x: {(0, 0): x, (1, 1): np.tanh(x)},
    ),
    "a model inside a model": (
        lambda layer: bp.chain(bp.dense(3), bp.chain(layer, bp.residual(bp.chain(layer, bp.tanh)))),
        lambda f, p, x: {(1, 0): dense(p[0], x), (1, 1, 0, 0): f(p[1][0], dense(p[0], x))},
    ),
}
EVERYWHERE = [
    pytest.param(place, kind, id=f"{kind}, {place}") for place in MODELS for kind in STATEFUL
]


def drawn(model, x, seed=0):
    """Parameters by eval_shape: none is 0, and a variance is above it."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, KEY, jax.tree.map(lambda leaf: leaf[0], x))
    return jax.tree.map(lambda p: jnp.asarray(draw.uniform(0.4, 1.2, p.shape), p.dtype), shapes)


def batch(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


@functools.cache
def built(place, kind):
    """``(model, params, x, y)``: five sequences of four steps."""
    with jax.enable_x64(True):
        model = MODELS[place][0](STATEFUL[kind][0])
        x = {"x": batch(5, 4, 3)} if place == "at" else batch(5, 4, 3)
        params = drawn(model, x)
        return model, params, x, jnp.ones(jax.eval_shape(model.apply, params, x).shape)


@functools.cache
def renewing(place, kind, method="manual"):
    """``((cost, params), gradient)``."""
    model, *data = built(place, kind)
    return bp.value_and_grad(model, LOSS, method=method, renew=True)(*data)


def named(tree):
    """Leaves by their paths, None among them."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path): v for path, v in pairs}


def states(place, kind):
    """The state at every place after the batch, by its definition."""
    _, params, x, _ = built(place, kind)
    _, f, renewed = STATEFUL[kind]
    params, x = jax.tree.map(np.asarray, (params, x))
    found = {}
    for path, given in MODELS[place][1](f, params, x).items():
        p = functools.reduce(lambda tree, k: tree[k], path, params)
        if place == "tied" and path == (3,):  # its scale is that of the first
            p = params[1] | {k: v for k, v in p.items() if v is not None}
        found |= {(*path, name): value for name, value in renewed(p, given).items()}
    return found


def at_state(model, params):
    return {path for path, state in named(model.is_state(params)).items() if state}


def assert_close(a, b, within=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, within, within), a, b)


def assert_equal(a, b):
    """Bit for bit, and in dtype."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


@pytest.mark.parametrize(("place", "kind"), EVERYWHERE)
@exactly
def test_state_is_named_where_it_is_and_renewed_as_its_definition_says(place, kind):
    model, params, _, _ = built(place, kind)
    wanted = states(place, kind)
    assert at_state(model, params) == wanted.keys()
    for method in BOTH:
        renewed = named(renewing(place, kind, method)[0][1])
        assert_close({path: renewed[path] for path in wanted}, wanted)


@pytest.mark.parametrize(("place", "kind"), EVERYWHERE)
@exactly
def test_renewal_leaves_every_trained_parameter_and_every_dtype_as_it_is(place, kind):
    model, params, _, _ = built(place, kind)
    for method in BOTH:
        renewed = renewing(place, kind, method)[0][1]
        assert_equal(*(bp.trainable(p, model.is_state(params)) for p in (renewed, params)))
        assert jax.tree.map(jnp.shape, renewed) == jax.tree.map(jnp.shape, params)
        assert jax.tree.map(jnp.result_type, renewed) == jax.tree.map(jnp.result_type, params)


@pytest.mark.parametrize(("place", "kind"), EVERYWHERE)
@exactly
def test_a_gradient_has_none_at_state_and_autodiffs_numbers_elsewhere(place, kind):
    model, params, _, _ = built(place, kind)
    ((cost, _), gradient), ((cost_wanted, _), wanted) = (
        renewing(place, kind, method) for method in BOTH
    )
    nones = {path for path, leaf in named(gradient).items() if leaf is None}
    ties = {path for path, leaf in named(params).items() if leaf is None}
    assert nones == at_state(model, params) | ties
    assert_close((cost, gradient), (cost_wanted, wanted))


@pytest.mark.parametrize("counts", [(3,), (2, 2)], ids=["repeat", "nested repeat"])
@pytest.mark.parametrize("kind", STATEFUL)
@exactly
def test_a_stack_renews_its_state_as_the_chain_of_its_layers_does(counts, kind):
    """The last rule's residual is the block's output, which a stack keeps once."""
    block = bp.chain(bp.dense(3), bp.tanh, STATEFUL[kind][0])
    stack = functools.reduce(bp.repeat, counts, block)
    x = batch(5, 3)
    params, n = drawn(stack, x), int(np.prod(counts))
    flat = jax.tree.map(lambda p: p.reshape(n, *p.shape[len(counts) :]), params)
    layers = tuple(jax.tree.map(lambda p: p[i], flat) for i in range(n))  # noqa: B023  at once

    def stacked(layers):
        return jax.tree.map(lambda *p: jnp.stack(p).reshape(*counts, *p[0].shape), *layers)

    for method in BOTH:
        (cost, renewed), gradient = bp.value_and_grad(stack, LOSS, method=method, renew=True)(
            params, x, jnp.ones((5, 3))
        )
        unrolled = bp.value_and_grad(bp.chain(*[block] * n), LOSS, renew=True)
        (cost_wanted, wanted), gradient_wanted = unrolled(layers, x, jnp.ones((5, 3)))
        assert_close((cost, renewed, gradient), (cost_wanted, *map(stacked, (wanted, gradient_wanted))))


@pytest.mark.parametrize(("place", "kind"), EVERYWHERE)
@exactly
def test_at_inference_nothing_is_mixed_or_renewed_and_state_stays_state(place, kind):
    model, params, x, y = built(place, kind)
    inference = model.inference()
    assert inference.inference() is inference
    assert not inference.mixes_examples
    assert at_state(inference, params) == at_state(model, params)
    assert_equal(model.apply(params, x), inference.forward(params, x)[0])
    first = jax.tree.map(lambda leaf: leaf[:1], x)
    assert_close(model.apply(params, first), model.apply(params, x)[:1])
    for method in BOTH:
        step = bp.value_and_grad(inference, LOSS, method=method, renew=True)
        assert_equal(step(params, x, y)[0][1], params)


@exactly
def test_outputs_are_those_of_the_inference_form():
    x = batch(5, 3)
    params = drawn(bp.chain(NORM, TALLY), x)
    p, q = params
    normal = p["scale"] * (x - p["mean"]) / np.sqrt(p["var"] + 1e-5) + p["bias"]
    assert_close(bp.chain(NORM, TALLY).apply(params, x), 0.5 * q["s"] * normal)


def test_inference_of_a_model_without_state_is_the_model():
    block = bp.chain(bp.dense(3), bp.dropout(0.5), bp.layer_norm())
    for model in (block, bp.repeat(block, 2), bp.residual(block), bp.tied(block, {}), bp.dense(2)):
        assert model.inference() is model


@exactly
def test_inference_inside_a_chain_stops_renewal_there_and_frozen_does_not():
    model = bp.chain(NORM.inference(), bp.dense(3), TALLY.inference(), NORM)
    x = batch(5, 3)
    params = drawn(model, x)
    assert at_state(model, params) == {(i, k) for i in (0, 3) for k in ("mean", "var")} | {
        (2, "count"),
        (2, "sum"),
    }
    step = bp.value_and_grad(model, LOSS, renew=True, frozen=lambda path: path[0] == 3)
    (_, renewed), gradient = step(params, x, x)
    assert_equal(renewed[:3], params[:3])
    assert (renewed[3]["mean"] != params[3]["mean"]).all()
    assert gradient[3] == dict.fromkeys(params[3])
    assert {k for k, g in gradient[0].items() if g is None} == {"mean", "var"}


def test_dropout_draws_at_inference_where_there_is_a_key():
    model = bp.chain(NORM, bp.dropout(0.5))
    params, x = model.init(KEY, jnp.ones(8)), 1 + jax.random.uniform(KEY, (64, 8))
    assert (model.apply(params, x) != 0).all()
    assert 0.3 < (model.inference().forward(params, x, KEY)[0] == 0).mean() < 0.7
    assert_equal(model.apply(params, x, KEY), model.inference().forward(params, x, KEY)[0])


@exactly
def test_frozen_and_state_together():
    model, params, x, y = built("chain", "batch_norm")
    trees = (
        ({"weight": True, "bias": False}, True, False),
        (False, {"scale": True, "bias": False, "mean": False, "var": False}, ()),
    )
    for frozen in (*trees, lambda path: path[-1] in ("scale", "mean"), True, model.is_state(params)):
        for method in BOTH:
            step = bp.value_and_grad(model, LOSS, method=method, frozen=frozen, renew=True)
            (_, renewed), gradient = step(params, x, y)
            assert_close(renewed, renewing("chain", "batch_norm")[0][1])
            whole = renewing("chain", "batch_norm")[1]
            flags = bp.trainable(whole, True) if frozen is True else None
            if frozen is not True and not callable(frozen):
                assert_close(gradient, bp.trainable(whole, _of_gradient(frozen, params, whole)))
            elif flags is not None:
                assert jax.tree.leaves(gradient) == []
