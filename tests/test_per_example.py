"""Per-example gradients, norms and clipping equal their definitions by ``vmap(jax.grad)``."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import (
    IDS,
    VECTORS,
    WEIGHTS,
    N,
    batch,
    case,
    cases,
    check_equal,
    direction,
    each_grad,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import functional_bp as bp


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def norms_of(each, stacked):
    """‖gₙ‖ by parameter, those in a ``repeat`` by layer; ``stacked`` says how many axes are."""

    def norm(g, axes):
        return jnp.sqrt((g**2).sum(range(1 + axes, g.ndim)))

    return jax.tree.map(norm, each, stacked)


def together(norms):
    """One norm over the leaves of a tree, and over the layers of a stack."""
    return jnp.sqrt(sum((n.reshape(n.shape[0], -1) ** 2).sum(1) for n in jax.tree.leaves(norms)))


def stack_axes(name, params):
    """How many axes of layers each parameter has."""
    axes = {"nested repeat": (2, 0), "tied stacks": (1, 1)}.get(name, (0,) * len(params))
    return tuple(jax.tree.map(lambda _, n=n: n, p) for n, p in zip(axes, params))


@pytest.mark.parametrize(
    "name, microbatch",
    [*cases(("tied stacks", 4)), ("nested repeat", 1), ("tied stacks", 1), ("mixed", 1)],
)
def test_gradients_norms_and_clipping_equal_their_definitions(name, microbatch):
    model, loss, *data = case(name)
    weights, bound = jnp.array(WEIGHTS), 0.3
    axes = stack_axes(name, data[0])

    def ours(params, x, y):
        def clipped(**options):
            fn = bp.clipped_grad(model, loss, bound, has_aux=True, microbatch=microbatch, **options)
            return fn(params, x, y, weights=weights)

        def norms(per):
            return bp.per_example_grad_norms(model, loss, per=per, microbatch=microbatch)

        gradient, seen = clipped()
        return {
            "each": bp.per_example_grads(model, loss, microbatch=microbatch)(params, x, y),
            "norms": norms("model")(params, x, y),
            "norms per parameter": norms("parameter")(params, x, y),
            "clipped": gradient,
            "clipped, one recursion": clipped(recursions=1)[0],
            "clipped per parameter": clipped(per="parameter")[0],
            "loss": seen.loss,
            "norms seen": seen.norms,
        }

    def wanted(params, x, y):
        each = each_grad(model, loss, params, x, y)
        by_parameter = norms_of(each, axes)
        norms = together(by_parameter)
        groups = sum(n[0].size for n in jax.tree.leaves(by_parameter))

        def total(g, norm, bound):
            scale = weights.reshape(-1, *(1,) * (norm.ndim - 1)) * jnp.minimum(1, bound / norm)
            return (scale.reshape(*scale.shape, *(1,) * (g.ndim - scale.ndim)) * g).sum(0) / N

        clipped = jax.tree.map(lambda g: total(g, norms, bound), each)
        costs = jax.vmap(lambda a, y: loss.value(a, y))(model.apply(params, x), y)
        return {
            "each": each,
            "norms": norms,
            "norms per parameter": by_parameter,
            "clipped": clipped,
            "clipped, one recursion": clipped,
            "clipped per parameter": jax.tree.map(
                lambda g, n: total(g, n, bound / groups**0.5), each, by_parameter
            ),
            "loss": jnp.average(costs, weights=weights),
            "norms seen": norms,
        }

    check_equal(jax.jit(ours)(*data), jax.jit(wanted)(*data))


def test_a_layers_norm_is_that_of_its_parameters_together():
    model, loss, *data = case("nested repeat")
    by_layer, by_parameter = jax.jit(
        lambda *data: tuple(
            bp.per_example_grad_norms(model, loss, per=per)(*data) for per in ("layer", "parameter")
        )
    )(
        *data,
    )
    stack = by_parameter[0][0][0]
    np.testing.assert_allclose(by_layer[0][0][0], np.hypot(stack["weight"], stack["bias"]))
    assert by_layer[0][0][0].shape == (N, 2, 2)
    np.testing.assert_allclose(by_layer[1], np.hypot(*by_parameter[1].values()))


@pytest.mark.parametrize(
    "bad, options",
    [
        (jnp.inf, {}),
        (jnp.nan, {"recursions": 1}),
        (jnp.nan, {"per": "layer"}),
        (jnp.nan, {"microbatch": 2}),
        (jnp.inf, {"microbatch": 1, "per": "layer"}),
    ],
)
def test_an_example_that_is_not_finite_adds_nothing_and_is_reported(bad, options):
    model, loss, params, x, y = case("mixed")
    bp_clipped = bp.clipped_grad(model, loss, 0.3, has_aux=True, **options)
    spoiled = x.at[1].set(bad).at[4, 0].set(bad)
    present = jnp.ones(N).at[jnp.array([1, 4])].set(0)
    whole, spoilt, none = jax.jit(
        lambda: (
            bp_clipped(params, x, y, weights=present),
            bp_clipped(params, spoiled, y),
            bp_clipped(params, x * bad, y),
        )
    )()
    check_equal({"g": spoilt[0], "loss": spoilt[1].loss}, {"g": whole[0], "loss": whole[1].loss})
    for norms in jax.tree.leaves(spoilt[1].norms):
        np.testing.assert_array_equal(jnp.isfinite(norms), present == 1)
    assert all(not g.any() for g in jax.tree.leaves(none[0]))
    assert none[1].loss == 0


@pytest.mark.parametrize(
    "options", [{}, {"recursions": 1, "per": "layer"}, {"microbatch": 2}, {"microbatch": 1}]
)
def test_an_example_that_is_not_finite_adds_nothing_where_the_model_is_undefined_at_0(options):
    """x / ‖x‖, undefined at 0 and so no place for zeros to stand in."""

    def backward(params, x, dy):
        norm = jnp.linalg.norm(x)
        return (dy - x * (x @ dy) / norm**2) / norm, ()

    unit = bp.rule(
        bp.identity.init,
        lambda params, x, key=None: (x / jnp.linalg.norm(x), x),
        backward,
        name="unit",
    )
    model, loss = bp.chain(unit, bp.dense(3)), bp.losses.softmax_cross_entropy
    params, x, y = batch(model, (4,), IDS, N, seed=0)
    clipped = bp.clipped_grad(model, loss, 0.3, has_aux=True, **options)
    present = jnp.ones(N).at[2].set(0)
    spoilt, whole = jax.jit(
        lambda: (
            clipped(params, x.at[2, 1].set(jnp.nan), y),
            clipped(params, x, y, weights=present),
        )
    )()
    check_equal({"g": spoilt[0], "loss": spoilt[1].loss}, {"g": whole[0], "loss": whole[1].loss})


def test_a_sum_that_is_not_finite_even_then_is_zero():
    """A model that is finite at no example but in its norms: nothing leaves it."""
    spoilt = bp.rule(
        lambda key, x: {"s": jnp.ones(())},
        lambda params, x, key=None: (x * params["s"], x),
        lambda params, x, dy: (dy, {"s": Treacherous(x @ dy)}),
    )
    x, y = jnp.array([[1.0], [jnp.nan]]), jnp.zeros((2, 1))
    g = bp.clipped_grad(spoilt, bp.losses.squared_error, 0.3)({"s": jnp.ones(())}, x, y)
    assert g["s"] == 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Treacherous(bp.factors.Factored):
    """Factors whose norm is finite and whose total is not."""

    g: jax.Array

    def each(self):
        return self.g

    def scaled(self, weights):
        return Treacherous(self.g * weights)

    def total(self):
        return self.g.sum() + jnp.inf


def test_targets_with_a_mask_or_a_length_are_clipped():
    model, loss = bp.dense(3), bp.losses.softmax_cross_entropy
    params, x, y = batch(model, (5, 4), IDS, N, seed=0)
    mask = jnp.arange(5) < jnp.arange(N)[:, None]
    for target in ({"y": y, "mask": mask}, {"y": y, "length": jnp.arange(N)}):

        def both(target, params=params, x=x):
            clipped = bp.clipped_grad(model, loss, 0.1)(params, x.at[0].set(jnp.nan), target)
            each = bp.per_example_grads(model, loss)(params, x, target)
            norms = bp.per_example_grad_norms(model, loss)(params, x, target)
            scales = jnp.where(jnp.arange(N) > 0, jnp.minimum(1, 0.1 / norms), 0) / N
            return clipped, jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), each)

        clipped, wanted = jax.jit(both)(target)
        check_equal({"clipped": clipped}, {"clipped": wanted})


def test_a_weight_moves_the_clipped_gradient_by_itself_times_the_bound_at_most():
    model, loss, params, x, y = case("mixed")
    fn = bp.clipped_grad(model, loss, 0.3, normalize_by=7.0)
    weights = jnp.ones(N).at[0].set(5.0)
    moved = jax.jit(
        lambda: jax.tree.map(
            jnp.subtract, *(fn(params, x, y, weights=w) for w in (weights, weights.at[0].set(0)))
        )
    )()
    np.testing.assert_allclose(norm_of(moved), 5 * 0.3 / 7)


def norm_of(tree):
    return jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))


LOW = {"float16": 1e-3, "bfloat16": 1e-2}  # a few units in their last place


@pytest.mark.parametrize("dtype", LOW)
def test_norms_are_right_wherever_float32_can_hold_them(dtype):
    """The square of 300 is no float16, and a sum of bfloat16 stops growing at 256 terms."""
    model, loss = bp.dense(3), bp.losses.softmax_cross_entropy
    x, y = jnp.full((4, 1, 5), 300, dtype), jnp.zeros((4, 1), int)
    params = {"weight": jnp.zeros((3, 5), dtype), "bias": jnp.zeros(3, dtype)}
    for x_, y_ in ((x[:, 0], y[:, 0]), (x, y), (jnp.tile(x, (1, 9, 1)), jnp.tile(y, (1, 9)))):
        v = jax.tree.map(jnp.ones_like, params)
        norms, (g, seen), dots, grams = jax.jit(
            lambda *data, v=v: (
                bp.per_example_grad_norms(model, loss)(*data),
                bp.clipped_grad(model, loss, 1.0, has_aux=True)(*data),
                bp.grad_dots(model, loss)(*data, v),
                bp.grad_gram(model, loss)(*data),
            )
        )(params, x_, y_)
        wanted = np.sqrt((1 + 5 * 300**2) * 2 / 3)
        np.testing.assert_allclose(norms, wanted, rtol=LOW[dtype])
        np.testing.assert_allclose(seen.norms, wanted, rtol=LOW[dtype])
        np.testing.assert_allclose(norm_of(jax.tree.map(jnp.float32, g)), 1, rtol=4 * LOW[dtype])
        np.testing.assert_allclose(dots, 0, atol=LOW[dtype] * wanted)
        np.testing.assert_allclose(grams, wanted**2, rtol=2 * LOW[dtype])


@pytest.mark.parametrize("dtype", LOW)
def test_products_of_any_factors_run_in_float32(dtype):
    g = bp.factors.Itself(jnp.full((2, 1000), 900, dtype))
    held = float(g.g[0, 0])
    np.testing.assert_allclose(jnp.sqrt(g.squared_norm()), held * 1000**0.5, rtol=1e-5)
    np.testing.assert_allclose(g.gram(g), held**2 * 1000, rtol=1e-5)
    np.testing.assert_allclose(g.second_moment(), held**2, rtol=1e-5)
    np.testing.assert_allclose(g.dot(g.g[0]), held**2 * 1000, rtol=1e-5)


def test_the_derivative_of_a_norm_is_0_where_the_norm_stays_0():
    model, loss, params, x, _ = case("positions")

    def derivatives(params):
        y = model.apply(params, x).at[1:].add(1)
        fixed = jax.lax.stop_gradient(y)
        norms = bp.per_example_grad_norms(model, loss)
        v = direction(params)
        forward = jax.jvp(lambda p: norms(p, x[1:], fixed[1:]), (params,), (v,))[1]
        both = jax.jvp(lambda p: norms(p, x, fixed), (params,), (v,))[1]
        gone = jax.jvp(lambda p: norms(p, x, model.apply(p, x)), (params,), (v,))
        return forward, both, gone

    alone, both, (zeros, of_zeros) = jax.jit(derivatives)(params)
    np.testing.assert_allclose(both[1:], alone)
    assert not zeros.any() and not of_zeros.any()
    assert jnp.isfinite(both).all()


def test_an_example_without_gradient_is_exact():
    """At ‖gₙ‖ = 0 the clipping weight is 1, not 0/0."""
    model, loss, params, x, _ = case("positions")

    def both(params, x):
        y = model.apply(params, x).at[1:].add(1)
        clipped = bp.clipped_grad(model, loss, 1e9, has_aux=True)(params, x, y)
        return clipped, bp.grad(model, loss)(params, x, y)

    (gradient, seen), wanted = jax.jit(both)(params, x)
    assert seen.norms[0] == 0
    check_equal({"g": gradient}, {"g": wanted})


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    features=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3)),
    microbatch=st.none() | st.integers(1, 6),
)
def test_quantities_of_any_shape_equal_their_definitions(n, positions, features, microbatch):
    fan_in, hidden, out = features
    model, loss = bp.chain(bp.dense(hidden), bp.tanh, bp.dense(out)), bp.losses.squared_error
    random = np.random.default_rng(n)

    def ours(key, x, y):
        params = model.init(key, x[0])
        of = {"microbatch": microbatch}
        return params, {
            "norms": bp.per_example_grad_norms(model, loss, **of)(params, x, y),
            "second moment": bp.grad_second_moment(model, loss, **of)(params, x, y),
            "Gram": bp.grad_gram(model, loss, **of)(params, x, y),
            "dots": bp.grad_dots(model, loss, **of)(params, x, y, direction(params)),
            "Kronecker": bp.kronecker_factors(model, loss, **of)(params, x, y)[2]["weight"],
        }

    def wanted(params, x, y):
        each = each_grad(model, loss, params, x, y)
        flat = jnp.concatenate([g.reshape(n, -1) for g in jax.tree.leaves(each)], 1)
        a = jnp.tanh(x @ params[0]["weight"].T + params[0]["bias"])
        delta = model.apply(params, x) - y
        v = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(direction(params))])
        return {
            "dots": flat @ v,
            "Kronecker": bp.Kronecker(
                jnp.einsum("...i,...j->ij", a, a) / a[..., 0].size,
                jnp.einsum("...o,...p->op", delta, delta) / n,
            ),
            "norms": jnp.linalg.norm(flat, axis=1),
            "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
            "Gram": flat @ flat.T,
        }

    x = random.normal(size=(n, *positions, fan_in))
    y = random.normal(size=(n, *positions, out))
    params, given_ = jax.jit(ours)(jax.random.key(0), x, y)
    check_equal(given_, jax.jit(wanted)(params, x, y))


def test_quantities_under_a_key_are_those_of_the_masks_it_draws():
    """A key splits among the layers of a chain, and a layer's among the examples."""
    model = bp.chain(bp.dense(8), bp.dropout(0.5), bp.dense(2))
    loss, key, bound = bp.losses.squared_error, jax.random.key(3), 0.3
    params, *data = batch(model, (3,), VECTORS, N, seed=0)

    def ours(params, x, y):
        given = {"key": key}
        v = direction(params)
        return {
            "each": bp.per_example_grads(model, loss)(params, x, y, **given),
            "norms": bp.per_example_grad_norms(model, loss)(params, x, y, **given),
            "clipped": bp.clipped_grad(model, loss, bound)(params, x, y, **given),
            "second moment": bp.grad_second_moment(model, loss)(params, x, y, **given),
            "dots": bp.grad_dots(model, loss)(params, x, y, v, **given),
            "Gram": bp.grad_gram(model, loss)(params, x, y, **given),
            "Hessian": bp.hvp(model, loss)(params, x, y, v, **given),
            "Gauss–Newton": bp.ggnvp(model, loss)(params, x, y, v, **given),
            "gradient": bp.grad(model, loss)(params, x, y, **given),
            "autodiff": bp.grad(model, loss, method="autodiff")(params, x, y, **given),
        }

    def wanted(params, x, y):
        keys = jax.random.split(jax.random.split(key, 3)[1], N)
        masks = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (8,)))(keys)

        def output(params, x, mask):
            hidden = params[0]["weight"] @ x + params[0]["bias"]
            return params[2]["weight"] @ jnp.where(mask, 2 * hidden, 0) + params[2]["bias"]

        def outputs(params):
            return jax.vmap(output, (None, 0, 0))(params, x, masks)

        def cost(params, x, y, mask):
            return loss.value(output(params, x, mask), y)

        def mean_cost(params):
            return jax.vmap(loss.value)(outputs(params), y).mean()

        gradient, hessian_v = jax.jvp(jax.grad(mean_cost), (params,), (direction(params),))
        _, outputs_v = jax.jvp(outputs, (params,), (direction(params),))
        _, from_outputs = jax.vjp(outputs, params)
        each = jax.vmap(jax.grad(cost), (None, 0, 0, 0))(params, x, y, masks)
        flat = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
        v = direction(params)
        norms = jnp.linalg.norm(flat, axis=1)
        scales = jnp.minimum(1, bound / norms) / N
        return {
            "each": each,
            "norms": norms,
            "clipped": jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), each),
            "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
            "dots": flat @ jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(v)]),
            "Gram": flat @ flat.T,
            "Hessian": hessian_v,
            "Gauss–Newton": from_outputs(outputs_v / N)[0],  # of the squared error H = 1
            "gradient": gradient,
            "autodiff": gradient,
        }

    check_equal(jax.jit(ours)(params, *data), jax.jit(wanted)(params, *data))


@pytest.mark.parametrize("method", ["manual", "autodiff"])
@pytest.mark.parametrize("microbatch", [1, 4, 5, 9])
def test_a_gradient_does_not_depend_on_microbatches(microbatch, method):
    model, loss, *data = case("mixed")

    def both(*data):
        w = jnp.array(WEIGHTS)
        split = bp.value_and_grad(model, loss, method=method, microbatch=microbatch)
        return split(*data, weights=w), bp.value_and_grad(model, loss)(*data, weights=w)

    split, whole = jax.jit(both)(*data)
    check_equal({"both": split}, {"both": whole})


def test_memory_does_not_grow_with_the_batch_under_microbatches():
    model, loss = bp.chain(bp.dense(64), bp.tanh, bp.dense(3)), bp.losses.squared_error

    def temporary(n, microbatch):
        params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jnp.zeros(8))
        fn = jax.jit(bp.grad(model, loss, microbatch=microbatch))
        x, y = (jax.ShapeDtypeStruct((n, d), float) for d in (8, 3))
        return fn.lower(params, x, y).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096, 16) < 1.2 * temporary(64, 16) + 8 * 4096
    assert temporary(4096, 16) < temporary(4096, None) / 20


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_a_microbatch_that_is_no_number_of_examples_is_named(size):
    with pytest.raises(ValueError, match="microbatch: takes a whole number"):
        bp.grad(*case("mixed")[:2], microbatch=size)


def test_class_ids_out_of_range_are_named_under_microbatches_too():
    model, loss, params, x, y = case("mixed")
    with pytest.raises(bp.ModelError, match="takes class ids from 0 to 2, got 0 to 7"):
        bp.grad(model, loss, microbatch=4)(params, x, jnp.zeros_like(y).at[2].set(7))


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 0},
        {"max_norm": jnp.nan},
        {"max_norm": jnp.inf},
        {"per": "tree"},
        {"recursions": 3},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bp.clipped_grad(*case("mixed")[:2], **{"max_norm": 1.0} | options)
