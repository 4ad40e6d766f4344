"""Averages of parameters, and passes in another dtype than the parameters'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import functional_bp as bp
from functional_bp.training.steps import Setting, programs

LOSS = bp.losses.softmax_cross_entropy
X = np.random.default_rng(0).normal(size=(44, 6)).astype(np.float32)
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
BATCHES = bp.minibatches(X, Y, 4, seed=1)
MODEL = bp.chain(bp.dense(8), bp.tanh, bp.dense(3))
NORMED = bp.chain(bp.dense(8), bp.batch_norm(), bp.relu, bp.dense(3))
NOISY = bp.chain(bp.dense(8), bp.tanh, bp.dropout(0.2), bp.dense(3))
ADAM = optax.adam(1e-2)
KEPT = {"ema": 0.9, "key": jax.random.key(2), "evaluation": [(X, Y)], "every": 5}


@functools.cache
def start(model=MODEL):
    return jax.jit(model.init)(jax.random.key(0), X[0])


def fit(model=MODEL, batches=BATCHES, loss=LOSS, params=None, **given):
    given = given if "steps" in given else {"epochs": 2} | given
    params = start(model) if params is None else params
    return bp.fit(model, loss, params, batches, ADAM, **given)


def assert_same(a, b):
    parts = [(r.params, r.opt_state, r.ema, r.step, vars(r.history)) for r in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), a, b)


# ---- averages -----------------------------------------------------------------------------------


def test_averages_are_those_of_the_formula():
    seen = []
    run = fit(
        steps=7, every=1, ema=0.8, callbacks=[lambda r: seen.append(jax.device_get(r.params))]
    )
    mean = jax.tree.map(np.zeros_like, seen[0])
    for params in seen:
        mean = jax.tree.map(lambda m, p: 0.8 * m + 0.2 * p, mean, params)
    assert_close(run.ema, jax.tree.map(lambda m: m / (1 - 0.8**7), mean))
    assert_close(fit(steps=7, ema=0.0).ema, run.params)
    assert_close(fit(steps=0, ema=0.8).ema, start())
    assert fit(steps=1).ema is None


def test_averaging_changes_nothing_else():
    averaged, plain = fit(ema=0.9), fit()
    for part in ("params", "opt_state"):
        assert_close(getattr(averaged, part), getattr(plain, part))


def test_evaluations_are_of_the_averages():
    run = fit(**KEPT)
    measured = bp.evaluate(MODEL, LOSS)
    assert run.history.evaluation["loss"][-1] == measured(run.ema, [(X, Y)])["loss"]
    assert measured(run.ema, [(X, Y)]) != measured(run.params, [(X, Y)])


def test_state_and_frozen_parameters_are_in_the_averages_as_they_are():
    run = fit(NORMED, ema=0.9, frozen=lambda path: path[0] == 3)
    for state in ("mean", "var"):
        np.testing.assert_array_equal(run.ema[1][state], run.params[1][state])
    jax.tree.map(np.testing.assert_array_equal, run.ema[3], start(NORMED)[3])
    assert not np.array_equal(run.ema[0]["weight"], run.params[0]["weight"])


def test_averages_of_bfloat16_parameters_move():
    """A thousandth of a step is nothing to a bfloat16 sum."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    seen = []
    run = fit(
        batches=bp.minibatches(X.astype(jnp.bfloat16), Y, 4),
        params=params,
        ema=0.999,
        every=1,
        callbacks=[lambda run: seen.append(np.asarray(run.params[0]["weight"], float))],
    )
    assert run.ema[0]["weight"].dtype == jnp.bfloat16
    expected = np.average(seen, axis=0, weights=0.999 ** np.arange(len(seen))[::-1])
    # XLA averages the parameters as they are before they are rounded to bfloat16.
    assert_close(np.asarray(run.ema[0]["weight"], float), expected, 8e-3)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_run_with_averages_goes_on_as_if_it_had_not_stopped(tmp_path, dtype):
    pytest.importorskip("orbax.checkpoint")
    how = KEPT | {"model": NOISY, "compute_dtype": dtype}
    whole = fit(**how, steps=20)
    for steps, several in ((3, 1), (4, 4), (11, 2), (20, 8)):
        folder = {"checkpoints": tmp_path, "resume": True}
        run = fit(**how, **folder, steps=steps, steps_per_call=several)
    # The looks at which it stopped are looks of the resumed run alone.
    assert_same(
        *[
            bp.Run(r.params, r.opt_state, r.step, 0, bp.History(r.history.loss, *[0] * 4), r.ema)
            for r in (run, whole)
        ]
    )


def test_another_choice_of_averages_is_refused_and_another_decay_is_said(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    for folder, begun, other, message in (
        ("none", {}, {"ema": 0.9}, "ema: it has none, this run has averages of the parameters"),
        ("some", {"ema": 0.9}, {}, "ema: it has averages of the parameters, this run has none"),
    ):
        how = {"checkpoints": tmp_path / folder, "resume": True}
        fit(**how, **begun, steps=2)
        with pytest.raises(bp.ModelError, match=message):
            fit(**how, **other, steps=4)
    with pytest.warns(UserWarning, match=r"ema decay: it has 0\.9, this run has 0\.5"):
        fit(**how, ema=0.5, steps=4)


# ---- passes in another dtype --------------------------------------------------------------------


def dtypes_of(tree):
    return {
        leaf.dtype.name
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def operations(jaxpr):
    """The equations of a jaxpr, and of those inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from operations(getattr(inner, "jaxpr", inner))


def products(model, method):
    """The dtypes of the two factors of every matrix product of a step."""
    how = {"method": method, "frozen": None, "microbatch": None, "ema": None}
    setting = Setting.of(model, LOSS, start(model), ADAM, **how, compute_dtype="bfloat16")
    state, rest = setting.begin(start(model))
    step = programs(setting).one
    jaxpr = jax.make_jaxpr(step)(state, rest, X[:4], Y[:4], np.ones(4, np.float32), None)
    found = [e.invars for e in operations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    return [{var.aval.dtype.name for var in pair} for pair in found if pair[1].aval.ndim > 1]


@pytest.mark.parametrize(
    "model", [MODEL, NORMED, bp.chain(bp.dense(8), bp.batch_norm().inference(), bp.dense(3))]
)
def test_passes_are_in_the_dtype_that_is_asked_for(model):
    forward_and_back = products(model, "manual")
    assert len(forward_and_back) == 6  # with ∂C/∂x, which nobody asks for
    assert all(pair == {"bfloat16"} for pair in forward_and_back)
    # JAX gives a product that accumulates in float32 a δ in float32.
    by_autodiff = products(model, "autodiff")
    assert len(by_autodiff) == 5
    assert sum(pair == {"bfloat16"} for pair in by_autodiff) == 2
    assert all("bfloat16" in pair for pair in by_autodiff)


@pytest.mark.parametrize("method", ["manual", "autodiff"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": NORMED},
        {"model": NOISY, "key": jax.random.key(1), "ema": 0.9},
        {"microbatch": 2},
        {"frozen": lambda path: path[0] == 0},
        {"steps_per_call": 4, "ema": 0.9},
    ],
    ids=lambda given: ", ".join(given) or "plain",
)
def test_parameters_optimiser_and_state_stay_float32(method, given):
    run = fit(**given, method=method, compute_dtype=jnp.bfloat16)
    assert dtypes_of((run.params, run.opt_state, run.ema)) == {"float32"}
    plain = fit(**given, method=method)
    assert not np.array_equal(run.history.loss, plain.history.loss)
    np.testing.assert_allclose(run.history.loss, plain.history.loss, rtol=0.1, atol=0.05)


def test_training_in_bfloat16_lands_near_that_in_float32():
    measured = bp.evaluate(MODEL, LOSS)
    at = [measured(fit(epochs=20, compute_dtype=d).params, [(X, Y)]) for d in (None, "bfloat16")]
    assert at[1]["loss"] == pytest.approx(at[0]["loss"], rel=0.05)


def test_gradients_are_wider_than_the_passes():
    """Of more examples than bfloat16 can count."""
    model, loss = bp.dense(1), bp.losses.squared_error
    x, params = np.ones((1000, 1), np.float32), {"weight": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
    sgd = optax.sgd(1.0)
    run = bp.fit(model, loss, params, [(x, 1.001 * x)], sgd, steps=1, compute_dtype="bfloat16")
    assert run.history.loss[0] == pytest.approx(1.001**2 / 2, rel=1e-5)
    assert float(run.params["bias"][0]) == pytest.approx(1.001, rel=4e-3)


def test_a_cost_and_a_loss_with_parameters_are_cast_too():
    def cost(params, x, y):
        return ((params["w"] @ x - y) ** 2).sum()

    params = {"w": jnp.zeros((1, 6))}
    run = bp.fit(cost, None, params, [(X, X[:, :1])], ADAM, steps=3, compute_dtype="bfloat16")
    assert dtypes_of((run.params, run.opt_state)) == {"float32"}
    assert run.history.loss[0] == pytest.approx((X[:, 0] ** 2).mean(), rel=1e-4)
    head = bp.losses.loss(
        lambda params, a, y: LOSS.value(params["w"] @ a, y),
        lambda params, a, y: (
            params["w"].T @ LOSS.delta(params["w"] @ a, y),
            {"w": bp.factors.Outer(LOSS.delta(params["w"] @ a, y)[None], a[None])},
        ),
        init=lambda key, a, y: {"w": 0.1 * jax.random.normal(key, (3, *a.shape))},
        name="head",
    )
    params = bp.init(MODEL, head, jax.random.key(0), X[0], Y[0])
    runs = [
        bp.fit(MODEL, head, params, BATCHES, ADAM, epochs=1, compute_dtype=d)
        for d in (None, "bfloat16")
    ]
    assert dtypes_of(runs[1].params) == {"float32"}
    np.testing.assert_allclose(*[run.history.loss for run in runs], rtol=0.05)


def test_what_is_no_floating_point_input_stays_as_it_is():
    model = bp.chain(bp.embedding(300, 4), bp.gru(4, output="last"), bp.dense(2))
    ids = 257 + np.arange(8).reshape(4, 2)  # which bfloat16 does not tell apart
    params = model.init(jax.random.key(0), ids[0])
    run = bp.fit(model, LOSS, params, [(ids, Y[:4] % 2)], ADAM, steps=2, compute_dtype="bfloat16")
    moved = np.any(np.asarray(run.params[0]["weight"]) != params[0]["weight"], axis=-1)
    assert set(np.flatnonzero(moved)) == set(ids.ravel())


def test_a_run_in_another_dtype_is_said(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    how = {"checkpoints": tmp_path, "resume": True}
    fit(**how, steps=2)
    with pytest.warns(UserWarning, match="compute_dtype: it has none, this run has bfloat16"):
        fit(**how, compute_dtype="bfloat16", steps=4)
