"""Curvature equals ``jax.hessian`` and ``jax.jacrev``; Kronecker factors equal other libraries'."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import (
    WEIGHTS,
    case,
    cases,
    check_equal,
    cost,
    direction,
    flat_each,
    outputs_hessian,
    outputs_jacobian,
)
from jax.flatten_util import ravel_pytree

import functional_bp as bp

REFERENCE = Path(__file__).parent / "reference" / "curvature.npz"


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name, microbatch", cases(("mixed", 4)))
def test_products_and_diagonal_equal_their_definitions(name, microbatch):
    model, loss, *data = case(name)
    w = jnp.array(WEIGHTS)

    def given(params, x, y):
        def of(quantity):
            return quantity(model, loss, microbatch=microbatch)

        v = direction(params)
        return {
            "Hessian": of(bp.hvp)(params, x, y, v, weights=w),
            "Gauss–Newton": of(bp.ggnvp)(params, x, y, v, weights=w),
            "diagonal": of(bp.ggn_diagonal)(params, x, y, weights=w),
        }

    def wanted(params, x, y):
        def mean_cost(flat):
            each = jax.vmap(lambda x, y: cost(model, loss, unravel(flat), x, y))(x, y)
            return jnp.average(each, weights=w)

        flat, unravel = ravel_pytree(params)
        v, _ = ravel_pytree(direction(params))
        J, H = outputs_jacobian(model, params, x), outputs_hessian(model, loss, params, x, y)
        ggn = jnp.einsum("n,nkp,nkl,nlq->pq", w / w.sum(), J, H, J)
        return {
            "Hessian": unravel(jax.jacfwd(jax.grad(mean_cost))(flat) @ v),
            "Gauss–Newton": unravel(ggn @ v),
            "diagonal": unravel(jnp.diag(ggn)),
        }

    check_equal(jax.jit(given)(*data), jax.jit(wanted)(*data))


LOSSES = {
    "class ids": (bp.losses.softmax_cross_entropy, jnp.array([1, 0])),
    "probabilities": (bp.losses.softmax_cross_entropy, jnp.array([[0.2, 0.5, 0.3], [1, 0.5, 0]])),
    "length": (bp.losses.softmax_cross_entropy, {"y": jnp.array([2, 0]), "length": jnp.array(1)}),
    "sigmoid": (bp.losses.sigmoid_cross_entropy, jnp.array([[0.2, 0.5, 0.3], [1, 0.5, 0]])),
    "squared": (bp.losses.squared_error, jnp.ones((2, 3))),
    "mean squared": (bp.losses.mean_squared_error, jnp.ones((2, 3))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_losses_root_and_samples_give_its_hessian(name):
    loss, y = LOSSES[name]
    y = jax.tree.map(lambda t: t.astype(float) if jnp.issubdtype(t.dtype, jnp.floating) else t, y)
    a = jnp.array([[0.3, -1.0, 0.5], [2.0, 0.1, -0.4]])

    def given(a, key):
        S = jax.vmap(lambda e: loss.root(a, y, e.reshape(a.shape)).ravel(), out_axes=1)(jnp.eye(6))
        draws = jax.vmap(lambda k: loss.sample(k, a, y).ravel())(jax.random.split(key, 20_000))
        return S @ S.T, draws.T @ draws / len(draws)

    def wanted(a):
        return jax.hessian(lambda a: loss.value(a.reshape(2, 3), y))(a.ravel())

    (exact, sampled), hessian = jax.jit(given)(a, jax.random.key(0)), jax.jit(wanted)(a)
    np.testing.assert_allclose(exact, hessian, atol=1e-12)
    np.testing.assert_allclose(sampled, hessian, atol=0.03)


def test_monte_carlo_diagonal_approaches_the_exact_one():
    model, loss, *data = case("mixed")

    def both(params, x, y):
        draws = bp.ggn_diagonal(model, loss, samples=2000)(params, x, y, key=jax.random.key(1))
        return draws, bp.ggn_diagonal(model, loss)(params, x, y)

    sampled, exact = (ravel_pytree(tree)[0] for tree in jax.jit(both)(*data))
    assert jnp.abs(sampled - exact).max() < 0.1 * exact.max()


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_kronecker_factors_of_one_example_without_positions_are_the_whole_block(fisher, shared):
    model, loss, params, x, y = case("mixed")
    data = params, x[:1], y[:1]

    def given(*data):
        factors = bp.kronecker_factors(model, loss, fisher=fisher, shared=shared)(*data)
        kron = jax.tree.map(
            lambda f: jnp.kron(f.G, f.A), factors, is_leaf=lambda f: isinstance(f, bp.Kronecker)
        )
        return dict(enumerate(jax.tree.leaves(kron)))

    def wanted(params, x, y):
        if fisher == "empirical":
            g = flat_each(model, loss, params, x, y)
            matrix = g.T @ g
        else:
            J, H = outputs_jacobian(model, params, x), outputs_hessian(model, loss, params, x, y)
            matrix = J[0].T @ H[0] @ J[0]
        ends = np.cumsum([p.size for p in jax.tree.leaves(params)])
        return {
            i: matrix[end - p.size : end, end - p.size : end]
            for i, (p, end) in enumerate(zip(jax.tree.leaves(params), ends))
        }

    check_equal(jax.jit(given)(*data), jax.jit(wanted)(*data))


@pytest.mark.parametrize("microbatch", [None, 4])
def test_kronecker_factors_over_positions_are_the_stated_means(microbatch):
    model, loss, params, x, y = case("positions")
    w = jnp.array(WEIGHTS) / sum(WEIGHTS)

    def given(params, x, y):
        def of(shared):
            fn = bp.kronecker_factors(model, loss, shared=shared, microbatch=microbatch)
            return fn(params, x, y, weights=jnp.array(WEIGHTS))[0]

        return {"expand": of("expand"), "reduce": of("reduce")}

    def wanted(params, x, y):
        delta = bp.deltas(model, loss)(params, x, y)[0]
        t = x.shape[1]
        one, sums = jnp.ones((1, 1)), (x.mean(1), delta.sum(1))

        def both(A, G):
            return {"weight": bp.Kronecker(A, G), "bias": bp.Kronecker(one, G)}

        return {
            "expand": both(
                jnp.einsum("n,nti,ntj->ij", w / t, x, x),
                jnp.einsum("n,nto,ntp->op", w, delta, delta),
            ),
            "reduce": both(*(jnp.einsum("n,ni,nj->ij", w, s, s) for s in sums)),
        }

    check_equal(jax.jit(given)(params, x, y), jax.jit(wanted)(params, x, y))


def test_kronecker_factors_of_a_stack_and_of_a_tied_weight_are_those_of_a_chain():
    """Over uses as over positions: A is their mean, G their sum."""
    block = bp.chain(bp.dense(3), bp.tanh)
    stack, plain = bp.repeat(block, 2), bp.chain(block, block)
    tied = bp.tied(plain, {(1, 0, "weight"): (0, 0, "weight")})
    loss = bp.losses.squared_error

    def factors(x, y):
        params = plain.init(jax.random.key(0), x[0])
        stacked = jax.tree.map(lambda *p: jnp.stack(p), *params)
        shared = (params[0], ({"weight": None, "bias": params[0][0]["bias"]}, ()))
        twice = (params[0], params[0])
        return (
            bp.kronecker_factors(stack, loss)(stacked, x, y),
            bp.kronecker_factors(plain, loss)(params, x, y),
            bp.kronecker_factors(tied, loss)(shared, x, y)[0][0]["weight"],
            [layer[0]["weight"] for layer in bp.kronecker_factors(plain, loss)(twice, x, y)],
        )

    x, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    of_stack, of_chain, of_tied, (first, second) = jax.jit(factors)(x, y)
    of_chain = jax.tree.map(lambda *f: jnp.stack(f), *of_chain)
    check_equal({"stack": of_stack}, {"stack": of_chain})
    wanted = bp.Kronecker((first.A + second.A) / 2, first.G + second.G)
    check_equal({"tied": of_tied}, {"tied": wanted})


def test_curvature_equals_backpack_and_kfac_jax():
    """After the conventions: their batch quantities are of the mean loss, whose δ carry 1/N (so
    squares 1/N²); kfac-jax appends the constant 1 of the bias to the input."""
    r = np.load(REFERENCE)
    model = bp.chain(bp.dense(6), bp.tanh, bp.dense(4), bp.tanh, bp.dense(3))
    loss = bp.losses.softmax_cross_entropy
    params = tuple(
        {"weight": jnp.asarray(r[f"weight{i}"]), "bias": jnp.asarray(r[f"bias{i}"])}
        if i % 2 == 0
        else ()
        for i in range(5)
    )
    x, y = jnp.asarray(r["x"]), jnp.asarray(r["y"])

    def ours(params, x, y):
        return (
            bp.kronecker_factors(model, loss, fisher="exact")(params, x, y),
            bp.kronecker_factors(model, loss)(params, x, y),
            bp.ggn_diagonal(model, loss)(params, x, y),
            bp.per_example_grad_norms(model, loss, per="parameter")(params, x, y),
            bp.grad_second_moment(model, loss)(params, x, y),
        )

    exact, empirical, diagonal, norms, moment = jax.jit(ours)(params, x, y)

    def close(given, wanted):
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-8)

    for i in (0, 2, 4):
        close(exact[i]["weight"].G, r[f"kflr_G{i}"])
        close(exact[i]["weight"].A, r[f"kflr_A{i}"])
        close(exact[i]["bias"].G, r[f"kflr_bias_G{i}"])
        for name in ("weight", "bias"):
            close(diagonal[i][name], r[f"diag_ggn_{name}{i}"])
            close(norms[i][name] ** 2, r[f"batch_l2_{name}{i}"] * len(x) ** 2)
            close(moment[i][name], r[f"sum_grad_squared_{name}{i}"] * len(x))
        close(empirical[i]["weight"].A, r[f"kfac_jax_A{i}"][:-1, :-1])
        close(empirical[i]["weight"].G, r[f"kfac_jax_empirical_G{i}"] * len(x))
        close(exact[i]["weight"].G, r[f"kfac_jax_exact_G{i}"])


def test_sampled_kronecker_factors_approach_the_exact_ones():
    model, loss, *data = case("mixed")

    def both(*data):
        key = jax.random.key(1)
        sampled = bp.kronecker_factors(model, loss, fisher="sampled", samples=2000)
        exact = bp.kronecker_factors(model, loss, fisher="exact")
        return sampled(*data, key=key)[4]["weight"], exact(*data)[4]["weight"]

    sampled, exact = jax.jit(both)(*data)
    np.testing.assert_allclose(sampled.A, exact.A, rtol=1e-12)
    assert jnp.abs(sampled.G - exact.G).max() < 0.1 * exact.G.max()


def test_what_a_loss_does_not_state_is_asked_for():
    loss = bp.losses.loss(lambda a, y: (a**4).sum(), lambda a, y: 4 * a**3, name="quartic")
    model, _, *data = case("mixed")
    for quantity in (
        bp.ggn_diagonal(model, loss),
        bp.kronecker_factors(model, loss, fisher="exact"),
    ):
        with pytest.raises(bp.ModelError, match="quartic: does not state the root of its Hessian"):
            quantity(*data)
    with pytest.raises(bp.ModelError, match="key: targets are drawn"):
        bp.kronecker_factors(model, case("mixed")[1], fisher="sampled")(*data)


@pytest.mark.parametrize("options", [{"fisher": "true"}, {"shared": "both"}, {"samples": 0}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bp.kronecker_factors(*case("mixed")[:2], **options)
