"""K-FAC takes the step that its equations say, and Newton's where they coincide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import WEIGHTS, case, check_equal, outputs_hessian, outputs_jacobian
from jax.extend.core import jaxprs_in_params

import functional_bp as bp
from functional_bp.training import quadratic_model


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_one_step_solves_linear_least_squares():
    """There the Gauss–Newton matrix is A ⊗ I, and the Hessian too."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 5)), random.normal(size=(40, 3))
    model, loss = bp.chain(bp.dense(3, bias=False)), bp.losses.squared_error
    optimizer = bp.kfac(
        model,
        loss,
        1.0,
        batch=(x, y),
        damping=1e-14,
        max_step=None,
        fisher="exact",
        estimate_from=1.0,
    )

    def step(key):
        params = model.init(key, x[0])
        state = optimizer.init(params)
        gradient = bp.grad(model, loss)(params, x, y)
        updates, _ = optimizer.update(gradient, state, params, x=x, y=y)
        return optax.apply_updates(params, updates)

    weight = jax.jit(step)(jax.random.key(0))[0]["weight"]
    # What differs is the damping, which is √λ = 1e-7 on each side.
    np.testing.assert_allclose(weight, np.linalg.lstsq(x, y)[0].T, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shared", "amortised"),
    [
        ("mixed", "expand", {"estimate_every": 1, "estimate_from": 1.0, "inverse_every": 1}),
        (
            "nested repeat",
            "reduce",
            {"estimate_every": 3, "estimate_from": 0.4, "inverse_every": 4},
        ),
    ],
)
def test_steps_are_as_the_equations_say(name, shared, amortised):
    """With a learning rate and weights that change at every step."""
    model, loss, params, x, y = case(name)
    decay, damping, bound = 0.8, 0.01, 1e-3
    rates = (0.1, 0.3, 0.05, 0.1, 0.2, 0.1)
    optimizer = bp.kfac(
        model,
        loss,
        lambda step: jnp.array(rates)[step],
        batch=(x, y),
        damping=damping,
        decay=decay,
        momentum=0.5,
        max_step=bound,
        fisher="empirical",
        shared=shared,
        **amortised,
    )
    weights = jnp.array(WEIGHTS)
    batches = [(x, y, weights), (x[::-1] * 2, y, weights[::-1]), (x + 1, y[::-1], weights + 1)] * 2
    share = {1.0: slice(None), 0.4: slice(None, None, 2)}[amortised["estimate_from"]]  # of 6, 3

    @jax.jit
    def ours(state, x, y, weights):
        gradient = bp.grad(model, loss)(params, x, y, weights=weights)
        return optimizer.update(gradient, state, params, x=x, y=y, weights=weights)

    @jax.jit
    def material(x, y, weights):
        part = x[share], y[share]
        factors = bp.kronecker_factors(model, loss, fisher="empirical", shared=shared)
        return (
            bp.grad(model, loss)(params, x, y, weights=weights),
            factors(params, *part, weights=weights[share]),
        )

    def due(step, every):
        return step < 3 or step % every == 0

    def preconditioned(g, A, G):
        root_of_pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        left = G + np.sqrt(damping) / root_of_pi * np.eye(len(G))
        right = A + np.sqrt(damping) * root_of_pi * np.eye(len(A))
        return np.linalg.solve(left, g.reshape(len(G), len(A))) @ np.linalg.inv(right)

    def is_kronecker(node):
        return isinstance(node, bp.Kronecker)

    state, average, velocity, shrinks, estimates = optimizer.init(params), None, None, [], 0
    for step, batch in enumerate(batches):
        gradient, factors = material(*batch)
        if due(step, amortised["estimate_every"]):
            estimates += 1
            new = [
                (np.asarray(f.A), np.asarray(f.G))
                for f in jax.tree.leaves(factors, is_leaf=is_kronecker)
            ]
            average = [
                tuple(decay * old + (1 - decay) * n for old, n in zip(olds, news))
                for olds, news in zip(average or [(0, 0)] * len(new), new)
            ]
        if due(step, amortised["inverse_every"]):
            unbiased = [tuple(f / (1 - decay**estimates) for f in pair) for pair in average]
        us, slope = [], 0.0
        for g, (A, G) in zip(jax.tree.leaves(gradient), unbiased):
            stack = A.shape[:-2]
            u = np.stack(
                [
                    preconditioned(*one)
                    for one in zip(
                        np.asarray(g).reshape(-1, g.size // max(1, int(np.prod(stack)))),
                        A.reshape(-1, *A.shape[-2:]),
                        G.reshape(-1, *G.shape[-2:]),
                    )
                ]
            ).reshape(g.shape)
            us.append(u)
            slope += (u * g).sum()
        shrinks.append(min(1, np.sqrt(bound / (rates[step] ** 2 * slope))))
        velocity = [shrinks[-1] * u + 0.5 * v for u, v in zip(us, velocity or [0.0] * len(us))]
        wanted = [jnp.asarray(-rates[step] * v) for v in velocity]
        update, state = ours(state, *batch)
        check_equal({step: update}, {step: jax.tree.unflatten(jax.tree.structure(params), wanted)})
    assert max(shrinks) < 1  # or the bound would not be seen


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def gauss_newton(name):
    """``(params, x, y, weights) -> Σₙ wₙ Jₙᵀ Hₙ Jₙ / Σₙ wₙ`` of a model, by its definition."""
    model, loss, *_ = case(name)

    def of(params, x, y, weights):
        J = outputs_jacobian(model, params, x)
        H = outputs_hessian(model, loss, params, x, y)
        return jnp.einsum("n,nap,nab,nbq->pq", weights / weights.sum(), J, H, J)

    return jax.jit(of)


@pytest.mark.parametrize("name", ["mixed", "tied stacks"])
def test_without_a_learning_rate_a_step_minimises_the_quadratic_model(name):
    """Along K-FAC's direction and the step before; ``estimate_from`` is of F too."""
    model, loss, params, x, y = case(name)
    weights, damping = jnp.array(WEIGHTS), 0.03
    given = {"batch": (x, y), "damping": damping, "fisher": "empirical", "estimate_from": 0.4}
    optimizer = bp.kfac(model, loss, **given)
    direction = bp.kfac(model, loss, 1.0, max_step=None, **given)  # −u

    @jax.jit
    def both(states, params, x):
        gradient = bp.grad(model, loss)(params, x, y, weights=weights)
        found = [
            o.update(gradient, state, params, x=x, y=y, weights=weights)
            for o, state in zip((optimizer, direction), states)
        ]
        return gradient, *zip(*found)

    states, last = (optimizer.init(params), direction.init(params)), 0 * flat(params)
    for step in range(4):
        x = x[::-1] * 0.9
        gradient, (ours, minus_u), states = both(states, params, x)
        F = gauss_newton(name)(params, x[::2], y[::2], weights[::2])
        F += damping * np.eye(len(F))
        D = np.stack([-flat(minus_u), last], 1)[:, : 1 + (step > 0)]
        wanted = D @ np.linalg.solve(D.T @ F @ D, -D.T @ flat(gradient))
        check_equal({step: flat(ours)}, {step: wanted}, within=1e-8)
        last, params = wanted, optax.apply_updates(params, ours)
    assert states[0].damping == damping


@pytest.mark.parametrize(("damping", "lower"), [(1.0, True), (1e-9, False)])
def test_the_damping_follows_what_the_model_foretold(damping, lower):
    """Every fifth step; where steps are too long for the model it grows, else it falls."""
    model, loss, params, x, y = case("mixed")
    optimizer = bp.kfac(
        *(model, loss),
        **{"batch": (x, y), "damping": damping, "least_damping": 1e-12},
        **{"fisher": "empirical", "estimate_from": 1.0},
    )

    @jax.jit
    def step(state, params):
        cost, gradient = bp.value_and_grad(model, loss)(params, x, y)
        update, state = optimizer.update(gradient, state, params, x=x, y=y)
        after = optax.apply_updates(params, update)
        change = bp.value_and_grad(model, loss)(after, x, y)[0] - cost
        return gradient, update, state, change, after

    state, dampings = optimizer.init(params), [damping]
    for _ in range(10):
        before = params
        gradient, update, state, change, params = step(state, params)
        d, F = flat(update), gauss_newton("mixed")(before, x, y, jnp.ones(len(x)))
        foretold = d @ flat(gradient) + 0.5 * d @ F @ d + 0.5 * dampings[-1] * d @ d
        ratio, factor = change / foretold, 1.0
        if len(dampings) % 5 == 0:
            factor = 0.95**5 if ratio > 0.75 else 0.95**-5 if ratio < 0.25 else 1.0
        dampings.append(dampings[-1] * factor)
        np.testing.assert_allclose(state.damping, dampings[-1], rtol=1e-12)
    assert (dampings[-1] < damping) if lower else (dampings[-1] > damping)


@pytest.mark.parametrize(
    ("ratio", "wanted"), [(0.24, 4.0), (0.26, 2.0), (0.74, 2.0), (0.76, 1.0), (-1.0, 4.0)]
)
def test_levenberg_and_marquardts_rule(ratio, wanted):
    assert quadratic_model.adapted(jnp.array(2.0), jnp.array(ratio), 0.5, 0.1) == wanted


def test_the_damping_does_not_fall_below_the_least():
    model, loss, params, x, y = case("mixed")
    optimizer = bp.kfac(model, loss, batch=(x, y), damping=1.0, least_damping=0.9)
    run = bp.fit(model, loss, params, [(x, y)], optimizer, epochs=5, key=jax.random.key(0))
    assert run.opt_state.damping == 0.9


def test_directions_that_depend_on_each_other_have_a_minimum():
    F, slopes = np.array([[2.0, 4.0], [4.0, 8.0]]), np.array([1.0, 2.0])
    c, change = quadratic_model.minimised(F, slopes)
    np.testing.assert_allclose(F @ c, -slopes, rtol=1e-12)
    np.testing.assert_allclose(change, -0.25, rtol=1e-12)


def test_frozen_parameters_have_no_part_in_the_quadratic_model():
    """It steps as a model without them does."""
    x, y = np.random.default_rng(0).normal(size=(2, 8, 3))
    loss, given = bp.losses.squared_error, {"batch": (x, y), "fisher": "exact"}
    whole, rest = bp.chain(bp.dense(4), bp.tanh, bp.dense(3)), bp.chain(bp.dense(3))
    params = whole.init(jax.random.key(0), x[0])
    hidden = np.tanh(x @ params[0]["weight"].T)

    def trained(model, params, x, **how):
        optimizer = bp.kfac(model, loss, **given | {"batch": (x, y)})
        return bp.fit(model, loss, params, [(x, y)], optimizer, epochs=6, **how).params[-1]

    ours = trained(whole, params, x, frozen=lambda path: path[0] == 0)
    check_equal({"last": ours}, {"last": trained(rest, (params[-1],), hidden)})


def outside_branches(jaxpr):
    """The names of a program's operations, those in a ``cond``'s branches left out."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from outside_branches(inner)


def test_what_is_not_due_is_skipped():
    """It lies in branches, which the compiler leaves branches: it computes one, not both."""
    model, loss, params, x, y = case("mixed")
    optimizer = bp.kfac(model, loss, 0.1, batch=(x, y), fisher="empirical", estimate_every=2)

    def of(gradient, state, params):
        return optimizer.update(gradient, state, params, x=x, y=y)

    given = (params, optimizer.init(params), params)
    always = list(outside_branches(jax.make_jaxpr(of)(*given).jaxpr))
    assert always.count("cond") == 2  # estimates, inverses
    assert not {"tanh", "erf", "cholesky"} & set(always)  # of the forward pass, of inverting
    assert always.count("dot_general") == 3 * len(jax.tree.leaves(params))  # G⁻¹ g A⁻¹, ⟨u, g⟩
    assert jax.jit(of).lower(*given).compile().as_text().count(" conditional(") == 2


def test_a_step_may_be_given_the_buffers_of_its_state():
    model, loss, params, x, y = case("mixed")
    optimizer = bp.kfac(model, loss, 0.1, batch=(x, y), fisher="empirical")

    def step(state, params):
        return optimizer.update(params, state, params, x=x, y=y)[1]

    state = jax.jit(step, donate_argnums=0)(optimizer.init(params), params)
    assert state[0].steps == state[0].estimates == 1


def test_a_parameter_without_factors_is_stepped_along_its_gradient():
    model, loss = bp.chain(bp.embedding(5, 2, dtype=float), bp.dense(3)), bp.losses.squared_error
    x, y = jnp.array([0, 1, 1, 4]), jnp.ones((4, 3))
    optimizer = bp.kfac(model, loss, 0.1, batch=(x, y), fisher="exact", max_step=None)

    def step(key):
        params = model.init(key, x[0])
        gradient = bp.grad(model, loss)(params, x, y)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params, x=x, y=y)
        return updates[0]["weight"], gradient[0]["weight"]

    update, gradient = jax.jit(step)(jax.random.key(0))
    check_equal({"embedding": update}, {"embedding": -0.1 * gradient})


def test_a_parameter_that_has_had_no_input_and_no_gradient_is_not_stepped():
    """Its factor A is 0, which has no share of the damping to ask for."""
    model, loss = bp.chain(bp.dense(2, bias=False)), bp.losses.squared_error
    params, x, y = ({"weight": jnp.ones((2, 3))},), jnp.zeros((4, 3)), jnp.ones((4, 2))
    optimizer = bp.kfac(model, loss, 0.1, batch=(x, y), fisher="exact")

    def step(params):
        gradient = bp.grad(model, loss)(params, x, y)
        return optimizer.update(gradient, optimizer.init(params), params, x=x, y=y)[0]

    assert (jax.jit(step)(params)[0]["weight"] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        *({"damping": 0}, {"decay": 1.0}, {"momentum": -0.1}, {"max_step": 0}),
        *(
            {"inverse_every": 0},
            {"estimate_every": 0},
            {"estimate_from": 0},
            {"estimate_from": 1.1},
        ),
    ],
)
def test_options_out_of_range_are_named(options):
    model, loss, _, x, y = case("mixed")
    with pytest.raises(ValueError, match=next(iter(options))):
        bp.kfac(model, loss, 0.1, batch=(x, y), **options)


def test_fit_hands_kfac_its_batches():
    model, loss, params, x, y = case("mixed")
    optimizer = bp.kfac(model, loss, 0.1, batch=(x, y), damping=0.1)
    run = bp.fit(model, loss, params, [(x, y)], optimizer, epochs=10, key=jax.random.key(0))
    assert run.history.epoch_loss[-1] < 0.8 * run.history.epoch_loss[0]
