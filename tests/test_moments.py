"""Moments, Gram matrices and kernels equal their definitions by ``vmap(jax.grad)``."""

import jax
import jax.numpy as jnp
import pytest
from definitions import (
    WEIGHTS,
    N,
    case,
    cases,
    check_equal,
    direction,
    each_grad,
    flat_each,
    outputs_jacobian,
)

import functional_bp as bp


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name, microbatch", cases(("mixed", 4)))
def test_quantities_equal_their_definitions(name, microbatch):
    model, loss, *data = case(name)
    w = jnp.array(WEIGHTS)

    def given(data, other):
        def of(quantity):
            return quantity(model, loss, microbatch=microbatch)

        return {
            "second moment": of(bp.grad_second_moment)(*data, weights=w),
            "variance": of(bp.grad_variance)(*data, weights=w),
            "noise scale": of(bp.grad_noise_scale)(*data),
            "diversity": of(bp.grad_diversity)(*data),
            "Gram": of(bp.grad_gram)(*data),
            "Gram of two": of(bp.grad_gram)(*data, other=other),
            "dots": of(bp.grad_dots)(*data, direction(data[0])),
        }

    def wanted(data, other):
        each, g = each_grad(model, loss, *data), flat_each(model, loss, *data)
        mean = jax.tree.map(lambda g: jnp.average(g, 0, w), each)
        trace = ((g - g.mean(0)) ** 2).sum() / (N - 1)
        dots = jax.tree.map(lambda g, v: jnp.tensordot(g, v, v.ndim), each, direction(data[0]))
        return {
            "second moment": jax.tree.map(lambda g: jnp.average(g**2, 0, w), each),
            "variance": jax.tree.map(lambda g, m: jnp.average((g - m) ** 2, 0, w), each, mean),
            "noise scale": trace / ((g.mean(0) ** 2).sum() - trace / N),
            "diversity": (g**2).sum() / (g.sum(0) ** 2).sum(),
            "Gram": g @ g.T,
            "Gram of two": g @ flat_each(model, loss, *other).T,
            "dots": sum(jax.tree.leaves(dots)),
        }

    other = tuple(case(name, seed=1, n=5)[2:])
    check_equal(jax.jit(given)(data, other), jax.jit(wanted)(data, other))


@pytest.mark.parametrize("name, microbatch", [("positions", None), ("tied", 5)])
def test_empirical_ntk_equals_its_definition(name, microbatch):
    model, _, params, x, _ = case(name)

    def given(params, x):
        kernel = bp.empirical_ntk(model, microbatch=microbatch)
        return {"one batch": kernel(params, x), "two": kernel(params, x, other=x[:4])}

    def wanted(params, x):
        jacobian = outputs_jacobian(model, params, x)
        shape = jax.eval_shape(lambda: model.apply(params, x)).shape
        kernel = jnp.einsum("nkp,mlp->nkml", jacobian, jacobian)
        two = kernel[:, :, :4].reshape(*shape, 4, *shape[1:])
        return {"one batch": kernel.reshape(*shape, *shape), "two": two}

    check_equal(jax.jit(given)(params, x), jax.jit(wanted)(params, x))


def test_a_weight_counts_an_example_so_many_times():
    model, loss, params, x, y = case("mixed")
    times = jnp.array([2, 0, 1, 1, 3, 1])

    def quantities(params, x, y, **weights):
        names = ("grad_variance", "grad_noise_scale", "grad_diversity")
        return {name: getattr(bp, name)(model, loss)(params, x, y, **weights) for name in names}

    often = jax.jit(quantities)(params, jnp.repeat(x, times, 0), jnp.repeat(y, times, 0))
    check_equal(jax.jit(quantities)(params, x, y, weights=times), often)


def test_noise_scale_of_one_example_is_nan():
    model, loss, params, x, y = case("mixed")
    assert jnp.isnan(jax.jit(bp.grad_noise_scale(model, loss))(params, x[:1], y[:1]))


def test_a_gram_matrix_between_models_is_refused():
    model, loss, *data = case("mixed")
    other = case("positions")[2:]
    with pytest.raises(bp.ModelError, match="other: takes the tree and shapes of the parameters"):
        bp.grad_gram(model, loss)(*data, other=other)
    with pytest.raises(bp.ModelError, match=r"other: takes the tuple \(params, x, y\)"):
        bp.grad_gram(model, loss)(*data, other=data[1])


@pytest.mark.parametrize("quantity", [bp.grad_dots, bp.hvp, bp.ggnvp])
def test_a_vector_of_another_tree_or_shape_is_refused(quantity):
    model, loss, *data = case("mixed")
    for v in (data[0][1], jax.tree.map(lambda p: p[..., None], data[0])):
        with pytest.raises(bp.ModelError, match="v: takes the tree and shapes of the parameters"):
            quantity(model, loss)(*data, v)
