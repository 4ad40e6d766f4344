"""State: leaves of the parameters that a batch renews, and that have no gradient.

Two layers with state are proven in every place: ``bp.batch_norm``, and a user's rule that does not
mix examples.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import check_equal, direction
from jax.flatten_util import ravel_pytree

import functional_bp as bp

KEY = jax.random.key(0)
LOSS = bp.losses.squared_error
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-2)  # made once, so that each model is compiled once
BOTH = ("manual", "autodiff")


def exactly(test):
    """In float64, operation by operation: nothing is compiled."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.enable_x64(True), jax.disable_jit():
            return test(*args, **kwargs)

    return run


def axes(x):
    return tuple(range(x.ndim - 1))


def tally(factor=1.0, count=float, **given):
    """y = factor · s ⊙ x; it counts batches and adds up the means of what it gave."""

    def init(key, x):
        zeros = jnp.zeros(x.shape[-1:], x.dtype)
        return {"s": zeros + 1, "count": jnp.zeros((), count), "sum": zeros}

    def forward(params, x, key=None):
        y = factor * params["s"] * x
        return y, (x, y)

    def backward(params, residuals, dy):
        return factor * params["s"] * dy, {"s": bp.factors.Summed(factor * residuals[0] * dy)}

    def renew(params, residuals):
        total = params["sum"] + residuals[1].mean(axes(residuals[1]))
        return params | {"count": params["count"] + 1, "sum": total}

    functions = {"init": init, "forward": forward, "backward": backward, "renew": renew}
    rule = {"name": "tally", "batched": True, "state": ("count", "sum")}
    return bp.rule(**functions | rule | given)


NORM, TALLY = bp.batch_norm(), tally(inference=tally(0.5, renew=lambda params, residuals: params))


def normalised(p, x):
    return p["scale"] * (x - x.mean(axes(x))) / np.sqrt(x.var(axes(x)) + 1e-5) + p["bias"]


def averaged(p, x):
    now = {"mean": x.mean(axes(x)), "var": x.var(axes(x), ddof=1)}
    return {k: 0.9 * p[k] + 0.1 * now[k] for k in now}


def tallied(p, x):
    return {"count": p["count"] + 1, "sum": p["sum"] + (p["s"] * x).mean(axes(x))}


# Each layer; its output for a batch and its state after that, by their definitions.
STATEFUL = {
    "batch_norm": (NORM, normalised, averaged),
    "a user's rule": (TALLY, lambda p, x: p["s"] * x, tallied),
}


def dense(p, x):
    return x @ p["weight"].T + p["bias"]


def tied_pair(layer):
    pair = bp.chain(bp.dense(3), layer, bp.dense(3), layer)
    return bp.tied(pair, {(2, "weight"): (0, "weight")})


def inputs_of_tied_pair(f, p, x):
    first = dense(p[0], x)
    return {(1,): first, (3,): dense(p[2] | {"weight": p[0]["weight"]}, f(p[1], first))}


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
    "tied": (tied_pair, inputs_of_tied_pair),
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
    "a model in a model": (
        lambda layer: bp.chain(bp.dense(3), bp.chain(layer, bp.residual(bp.chain(layer, bp.tanh)))),
        lambda f, p, x: {(1, 0): dense(p[0], x), (1, 1, 0, 0): f(p[1][0], dense(p[0], x))},
    ),
}
everywhere = pytest.mark.parametrize(
    ("place", "kind"), [(place, kind) for place in MODELS for kind in STATEFUL]
)


def drawn(model, x, seed=0):
    """Parameters for a batch: none is 0, and a variance is above it."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, KEY, jax.tree.map(lambda leaf: leaf[0], x))
    return jax.tree.map(lambda p: jnp.asarray(draw.uniform(0.4, 1.2, p.shape), p.dtype), shapes)


def batch(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


@functools.cache
def built(place, kind):
    """``(model, params, x, y)``: five sequences of two steps, in float64."""
    model, x = MODELS[place][0](STATEFUL[kind][0]), batch(5, 2, 3)
    x = {"x": x} if place == "at" else x
    params = drawn(model, x)
    return model, params, x, jnp.ones(jax.eval_shape(model.apply, params, x).shape)


@functools.cache
def renewing(place, kind, method="manual"):
    """``((cost, params), gradient)``."""
    model, *data = built(place, kind)
    return bp.value_and_grad(model, LOSS, method=method, renew=True)(*data)


def leaf_at(tree, path):
    return functools.reduce(lambda below, k: below[k], path, tree)


def named(tree):
    """Leaves by their paths, None among them."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path): v for path, v in pairs}


def none_in(tree):
    return {path for path, leaf in named(tree).items() if leaf is None}


def at_state(model, params):
    return {path for path, state in named(model.is_state(params)).items() if state}


def assert_close(a, b, within=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, within, within), a, b)


def assert_equal(a, b):
    """Bit for bit, in shape and in dtype."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


def assert_trained_equal(model, a, b):
    assert_equal(*(bp.trainable(params, model.is_state(params)) for params in (a, b)))


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@everywhere
@exactly
def test_a_batch_renews_state_as_its_definition_says_and_nothing_else(place, kind):
    model, params, x, _ = built(place, kind)
    _, f, after = STATEFUL[kind]
    inputs = MODELS[place][1](f, *jax.tree.map(np.asarray, (params, x)))
    by_definition = {
        (*path, name): value
        for path, given in inputs.items()
        for name, value in after(leaf_at(params, path), given).items()
    }
    assert at_state(model, params) == by_definition.keys()
    for method in BOTH:
        renewed = renewing(place, kind, method)[0][1]
        assert_close({path: leaf_at(renewed, path) for path in by_definition}, by_definition)
        assert_trained_equal(model, renewed, params)
        assert jax.eval_shape(lambda: renewed) == jax.eval_shape(lambda: params)  # noqa: B023


@everywhere
@exactly
def test_a_gradient_has_none_at_state_and_autodiffs_numbers_elsewhere(place, kind):
    model, params, *_ = built(place, kind)
    manual, autodiff = (renewing(place, kind, method) for method in BOTH)
    assert none_in(manual[1]) == at_state(model, params) | none_in(params)
    assert_close(manual, autodiff)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((3,), id="repeat"),
        pytest.param((2, 2), id="nested repeat", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("kind", STATEFUL)
@exactly
def test_a_stack_renews_its_state_as_the_chain_of_its_layers_does(counts, kind):
    """The user's rule ends the block: a stack keeps its residual as the input of the next."""
    block = bp.chain(bp.dense(3), bp.tanh, STATEFUL[kind][0])
    stack, n, x = functools.reduce(bp.repeat, counts, block), math.prod(counts), batch(4, 3)
    params = drawn(stack, x)
    rows = jax.tree.map(lambda p: p.reshape(n, *p.shape[len(counts) :]), params)
    layers = tuple(jax.tree.map(lambda p: p[i], rows) for i in range(n))  # noqa: B023  at once
    unrolled = bp.value_and_grad(bp.chain(*[block] * n), LOSS, renew=True)
    (cost, renewed), gradient = unrolled(layers, x, x)
    renewed, gradient = (
        jax.tree.map(lambda *p: jnp.stack(p).reshape(*counts, *p[0].shape), *tree)
        for tree in (renewed, gradient)
    )
    for method in BOTH:
        found = bp.value_and_grad(stack, LOSS, method=method, renew=True)(params, x, x)
        assert_close(found, ((cost, renewed), gradient))


@everywhere
@exactly
def test_at_inference_nothing_is_mixed_or_renewed_and_state_stays_state(place, kind):
    model, params, x, y = built(place, kind)
    inference = model.inference()
    assert inference.inference() is inference and not inference.mixes_examples
    assert at_state(inference, params) == at_state(model, params)
    a = model.apply(params, x)
    assert_equal(a, inference.forward(params, x)[0])
    assert_close(a[:1], model.apply(params, jax.tree.map(lambda leaf: leaf[:1], x)))
    (_, renewed), gradient = bp.value_and_grad(inference, LOSS, renew=True)(params, x, y)
    assert_equal(renewed, params)
    assert none_in(gradient) == at_state(model, params) | none_in(params)


@exactly
def test_apply_gives_the_outputs_of_the_inference_form_and_draws_with_a_key():
    model, x = bp.chain(NORM, TALLY, bp.dropout(0.5)), batch(16, 8)
    p, q, _ = params = drawn(model, x)
    normal = p["scale"] * (x - p["mean"]) / np.sqrt(p["var"] + 1e-5) + p["bias"]
    assert_close(model.apply(params, x), 0.5 * q["s"] * normal)
    assert 0.3 < (model.apply(params, x, KEY) == 0).mean() < 0.7


def test_inference_of_a_model_without_state_is_the_model():
    block = bp.chain(bp.dense(3), bp.tanh, bp.layer_norm())
    for model in (block, bp.repeat(block, 2), bp.residual(block), bp.tied(block, {}), bp.dense(2)):
        assert model.inference() is model
    dropout = bp.dropout(0.5)  # but for that it is random no more
    assert vars(dropout.inference()).items() - {("random", False)} <= vars(dropout).items()


@exactly
def test_inference_inside_a_chain_stops_renewal_there_and_frozen_does_not():
    model, x = bp.chain(NORM.inference(), TALLY.inference(), NORM), batch(5, 3)
    params = drawn(model, x)
    step = bp.value_and_grad(model, LOSS, renew=True, frozen=lambda path: path[0] == 2)
    (_, renewed), gradient = step(params, x, x)
    assert_equal(renewed[:2], params[:2])
    assert (renewed[2]["mean"] != params[2]["mean"]).all()
    assert none_in(gradient) == at_state(model, params) | {(2, "scale"), (2, "bias")}


@pytest.mark.parametrize(
    ("frozen", "more"),
    [
        (({"weight": True, "bias": False}, False, False), 1),
        ((True, {"scale": True, "bias": False, "mean": False, "var": True}, ()), 3),
        (lambda path: path[-1] in ("scale", "mean"), 1),
        (True, 4),
    ],
    ids=["tree", "prefix", "predicate", "all"],
)
@exactly
def test_frozen_parameters_join_the_state_and_it_is_renewed(frozen, more):
    model, *given = built("chain", "batch_norm")
    value, gradient = renewing("chain", "batch_norm")
    for method in BOTH:
        step = bp.value_and_grad(model, LOSS, method=method, frozen=frozen, renew=True)
        found_value, found = step(*given)
        assert len(none_in(found) - at_state(model, given[0])) == more
        assert_close(named(found), named(gradient) | dict.fromkeys(none_in(found)))
        assert_close(found_value, value)


@pytest.mark.parametrize(
    ("ties", "at"),
    [
        ({(1, "mean"): (0, "mean")}, (1, "mean")),
        ({(1, "bias"): (0, "var")}, (0, "var")),
        ({(2, "s"): (2, "sum")}, (2, "sum")),
    ],
)
def test_a_tie_to_state_is_refused(ties, at):
    model = bp.tied(bp.chain(NORM, NORM.inference(), bp.repeat(TALLY, 2)), ties)
    with pytest.raises(bp.ModelError, match="takes parameters that are trained") as error:
        model.init(KEY, jnp.ones(3))
    assert str(error.value).endswith(f"got the state at {at}")


def quantities(model, params, x, y):
    """Those that are trees of the parameters, and the others.

    Those along a vector are there twice, once with None at state.
    """

    def of(name, *v, **options):
        return getattr(bp, name)(model, LOSS, **options)(params, x, y, *v)

    names = ("grad", "grad_second_moment", "grad_variance", "ggn_diagonal", "kronecker_factors")
    trees = {name: of(name) for name in names}
    trees["per_example_grads"] = of("per_example_grads", microbatch=3)
    trees["norms"] = of("per_example_grad_norms", per="parameter")
    for per, n in itertools.product(("model", "layer", "parameter"), (1, 2)):
        trees[f"clipped {per}, {n}"] = of("clipped_grad", max_norm=0.3, per=per, recursions=n)
    names = ("grad_noise_scale", "grad_diversity", "grad_gram", "per_example_grad_norms", "deltas")
    others = {name: of(name) for name in names} | {"kernel": bp.empirical_ntk(model)(params, x)}
    others["norms of layers"] = of("per_example_grad_norms", per="layer")
    numbers = direction(params)
    for told, v in (("", numbers), (", None", bp.trainable(numbers, model.is_state(params)))):
        trees |= {f"{name}{told}": of(name, v) for name in ("hvp", "ggnvp")}
        others[f"grad_dots{told}"] = of("grad_dots", v)
    return trees, others


def by_definition(model, params, x, y):
    """What some of them are, flat, of the trained parameters alone."""
    is_state = model.is_state(params)
    at, tree_of = ravel_pytree(bp.trainable(params, is_state))
    v, _ = ravel_pytree(bp.trainable(direction(params), is_state))

    def outputs(p, x):
        return model.apply(bp.merged(tree_of(p), params), x)

    def cost(p, x, y):
        return LOSS.value(outputs(p, x[None])[0], y)

    def mean_cost(p):
        return jax.vmap(cost, (None, 0, 0))(p, x, y).mean()

    g = jax.vmap(jax.grad(cost), (None, 0, 0))(at, x, y)
    J, norm = jax.jacrev(outputs)(at, x), jnp.linalg.norm(g, axis=1)
    return {
        "grad": g.mean(0),
        "per_example_grads": g,
        "grad_second_moment": (g**2).mean(0),
        "clipped model, 1": (g * jnp.minimum(1, 0.3 / norm)[:, None]).mean(0),
        "ggn_diagonal": (J**2).sum(1).mean(0),
        "hvp": jax.jvp(jax.grad(mean_cost), (at,), (v,))[1],
        "ggnvp": jnp.einsum("nkp,nkq,q->p", J, J, v) / len(x),
        "grad_dots": g @ v,
        "grad_gram": g @ g.T,
        "per_example_grad_norms": norm,
        "kernel": jnp.einsum("nkp,mlp->nkml", J, J),
    }


def test_quantities_at_inference_are_of_what_is_trained_and_have_none_at_state():
    model = bp.chain(bp.dense(3), NORM, bp.tanh, bp.repeat(TALLY, 2)).inference()
    with jax.enable_x64(True):
        given = drawn(model, batch(5, 3)), batch(5, 3), jnp.ones((5, 3))
        (trees, others), definitions = jax.jit(
            lambda *given: (quantities(model, *given), by_definition(model, *given))
        )(*given)
        state = at_state(model, given[0])
        assert {k: none_in(tree) for k, tree in trees.items()} == dict.fromkeys(trees, state)
        found = others | {k: ravel_pytree(tree)[0] for k, tree in trees.items()}
        found["per_example_grads"] = jax.vmap(lambda g: ravel_pytree(g)[0])(
            trees["per_example_grads"]
        )
        check_equal({k: found[k] for k in definitions}, definitions)
        for k in found.keys() & {f"{k}, None" for k in found}:
            assert_equal(found[k], found[k.removesuffix(", None")])
        for per in ("model", "layer", "parameter"):
            assert_close(found[f"clipped {per}, 1"], found[f"clipped {per}, 2"])
    assert [a.shape for a in jax.tree.leaves(others["norms of layers"])] == [(5,), (5,), (5, 2)]


@exactly
def test_the_hessian_of_the_training_form_is_that_of_what_is_trained():
    model, params, x, y = built("a model in a model", "batch_norm")
    numbers = direction(params)
    trained, v = (bp.trainable(tree, model.is_state(params)) for tree in (params, numbers))

    def cost(trained):
        a, _ = model.forward(bp.merged(trained, params), x)
        return jax.vmap(LOSS.value)(a, y).mean()

    for given in (numbers, v):
        found = bp.hvp(model, LOSS)(params, x, y, given)
        assert_close(found, jax.jvp(jax.grad(cost), (trained,), (v,))[1])


X = 2 + np.random.default_rng(2).normal(size=(20, 3)).astype(np.float32)
Y = np.ones((20, 2), np.float32)
# Without the bias that a norm takes off again: its gradient is rounding, which Adam makes a step.
MODEL = bp.chain(NORM, bp.dense(4, bias=False), NORM, bp.tanh, bp.dense(2))


@functools.cache
def start(model=MODEL):
    return drawn(model, X)


def fit(model=MODEL, batches=((X, Y),), optimizer=SGD, **given):
    return bp.fit(model, LOSS, start(model), batches, optimizer, **{"epochs": 1} | given)


def running(params):
    """The averages of the first layer, which depend on the data alone."""
    return {k: np.asarray(params[0][k]) for k in ("mean", "var")}


@pytest.mark.parametrize("model", [MODEL, bp.chain(TALLY, bp.dense(2))], ids=["mixes", "does not"])
def test_fit_is_the_bare_loop_and_leaves_the_callers_parameters(model):
    batches, params = [(X[:8], Y[:8]), (X[8:16], Y[8:16])], start(model)
    is_state, before = model.is_state(params), jax.tree.map(np.array, params)
    run = fit(model, batches, ADAM, epochs=2)

    @jax.jit
    def step(params, opt_state, x, y):
        (_, params), gradient = bp.value_and_grad(model, LOSS, renew=True)(params, x, y)
        trained = bp.trainable(params, is_state)
        updates, opt_state = ADAM.update(gradient, opt_state, trained)
        return bp.merged(optax.apply_updates(trained, updates), params), opt_state

    opt_state = ADAM.init(bp.trainable(params, is_state))
    for x, y in batches * 2:
        params, opt_state = step(params, opt_state, x, y)
    assert_close((run.params, run.opt_state), (params, opt_state), 1e-5)
    assert_equal(jax.tree.map(np.asarray, start(model)), before)


def test_averages_are_renewed_each_step_and_weight_decay_does_not_touch_them():
    run = fit(optimizer=optax.adamw(1e-2, weight_decay=0.5), epochs=3)
    by_definition = functools.reduce(lambda p, _: averaged(p, X), range(3), running(start()))
    assert_close(running(run.params), by_definition, 1e-5)
    assert none_in(run.opt_state[0].mu) == at_state(MODEL, start())


@pytest.mark.parametrize("method", BOTH)
def test_frozen_everything_still_renews_state(method):
    run = fit(frozen=True, method=method)
    assert_trained_equal(MODEL, run.params, start())
    assert_close(running(run.params), averaged(running(start()), X), 1e-5)


def test_evaluation_is_of_the_inference_form():
    run = fit(evaluation=[(X[:12], Y[:12]), (X[12:], Y[12:])])
    a, _ = MODEL.inference().forward(run.params, X)
    cost = pytest.approx(float(jax.vmap(LOSS.value)(a, Y).mean()), rel=1e-5)
    assert run.history.evaluation["loss"][-1] == cost
    assert bp.evaluate(MODEL, LOSS)(run.params, [(X, Y)])["loss"] == cost


@pytest.mark.parametrize("layer", [NORM, NORM.inference(), TALLY], ids=["mixes", "still", "rule"])
def test_a_smaller_batch_is_filled_up_unless_examples_are_mixed(layer):
    sizes = set()

    def noted(params, x, key=None):
        sizes.add(len(x))
        return x, ()

    note = bp.rule(lambda key, x: (), noted, lambda params, kept, dy: (dy, ()), batched=True)
    model = bp.chain(note, layer, bp.dense(2))
    run = fit(model, bp.minibatches(X, Y, 16), epochs=2)
    assert sizes - {2} == ({16, 4} if layer is NORM else {16})  # init is traced for two
    if layer is TALLY:
        assert run.params[1]["count"] == start(model)[1]["count"] + 4


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    how = {"batches": bp.minibatches(X, Y, 8, seed=1), "optimizer": ADAM, "epochs": None}
    whole, _, resumed = (
        fit(steps=5, **how),
        *(fit(steps=steps, checkpoints=tmp_path, resume=True, **how) for steps in (2, 5)),
    )
    assert_equal((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    assert_equal(vars(resumed.history), vars(whole.history))


def test_state_is_saved_by_name_and_listed(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    bp.save_params(tmp_path / "file", start())
    assert {"0.mean", "0.var", "2.mean"} <= safetensors.load_file(tmp_path / "file").keys()
    assert_equal(bp.load_params(tmp_path / "file", like=start()), start())
    assert "bias (4,), mean (4,), scale (4,), var (4,)  16\n" in bp.summary(MODEL, X[0])


def test_kfac_trains_a_model_with_an_inference_form_inside():
    model = bp.chain(NORM.inference(), bp.dense(4), bp.tanh, bp.dense(2))
    run = fit(model, optimizer=bp.kfac(model, LOSS, 0.1, batch=(X, Y)), epochs=3, key=KEY)
    assert run.history.loss[-1] < run.history.loss[0]
    assert_equal(running(run.params), running(start(model)))


def test_steps_of_renewed_parameters_are_traced_once_and_an_ensemble_is_renewed_apart():
    traces = []

    @jax.jit
    def step(params):
        traces.append(1)
        return bp.value_and_grad(MODEL, LOSS, renew=True)(params, X, Y)

    members = [start()]
    for _ in range(2):
        members.append(step(members[-1])[0][1])
    apart = [step(params) for params in members]
    assert len(traces) == 1
    assert_close(jax.vmap(step)(stacked(members)), stacked(apart), 1e-5)


@pytest.mark.parametrize("method", BOTH)
def test_running_averages_of_a_bfloat16_model_stay_float32(method):
    x, y = X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    shapes = jax.eval_shape(MODEL.init, KEY, x[0])
    step = bp.value_and_grad(MODEL, LOSS, method=method, renew=True)
    (_, renewed), gradient = jax.eval_shape(step, shapes, x, y)
    float32 = {path for path, leaf in named(shapes).items() if leaf.dtype == jnp.float32}
    assert renewed == shapes and float32 == at_state(MODEL, shapes)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)} == {"bfloat16"}


def mixing(params, x, key=None):
    return params["s"] * (x - x.mean(0)), (x - x.mean(0), x)


def wrong_back(params, xy, dy):
    return params["s"] * dy, {"s": bp.factors.Summed(2 * xy[0] * dy)}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (tally(renew=lambda p, r: p | {"s": p["s"] + 1}), r"renew, leaf \['s'\]"),
        (tally(renew=lambda p, r: p | {"sum": p["sum"].astype("float32")}), "renew, .*float32"),
        (tally(inference=tally(backward=wrong_back)), "at inference: total, leaf"),
        (tally(inference=tally(forward=mixing)), "at inference: output of an example beside"),
        (tally(forward=mixing), "output of an example beside others"),
    ],
)
def test_check_layer_catches_what_is_wrong_with_state(layer, message):
    bp.testing.check_layer(TALLY, jnp.ones(3))
    with pytest.raises(AssertionError, match=f"^tally:? {message}"):
        bp.testing.check_layer(layer, jnp.ones(3))


def step_of(layer, params=None):
    """A step of the layer behind another; without parameters, those of its ``init``."""
    model, x = bp.chain(bp.dense(3), layer), jnp.ones((4, 3))
    made = model.init(KEY, x[0])
    given = made if params is None else (made[0], params)
    return bp.value_and_grad(model, LOSS, renew=True)(given, x, x)


def factors_everywhere(params, xy, dy):
    return dy, dict.fromkeys(params, bp.factors.Summed(dy))


@pytest.mark.parametrize(
    ("layer", "params", "message"),
    [
        (tally(state=("no",)), None, r"tally: takes a dict with the state \['no'\], got .*sum"),
        (TALLY, {"s": jnp.ones(3), "sum": jnp.ones(3)}, r"the state \['count', 'sum'\], got .*'s'"),
        (NORM, {"scale": jnp.ones(3)}, r"chain\[1\] batch_norm\(\): takes scale, bias, mean, var"),
        (
            tally(backward=factors_everywhere),
            None,
            r"chain\[1\] tally: takes a backward that gives",
        ),
    ],
)
def test_what_does_not_fit_a_layer_with_state_is_named(layer, params, message):
    with pytest.raises(bp.ModelError, match=message):
        step_of(layer, params)


@pytest.mark.parametrize("layer", [NORM, TALLY], ids=["mixes", "does not"])
def test_renewal_takes_no_microbatches(layer):
    model = bp.chain(layer, bp.dense(2))
    with pytest.raises(bp.ModelError, match="microbatch: takes None where a layer's state is"):
        bp.value_and_grad(model, LOSS, renew=True, microbatch=2)
    with pytest.raises(bp.ModelError, match=r"microbatch: takes None|mixes the examples"):
        fit(model, microbatch=4)


@pytest.mark.parametrize("quantity", [bp.hvp, bp.ggnvp])
def test_state_may_be_whole_numbers(quantity):
    model, x = tally(count=int), jnp.ones((4, 3))
    params = model.init(KEY, x[0])
    assert quantity(model, LOSS)(params, x, x, params)["count"] is None


def test_an_entry_of_state_may_be_a_tree():
    def init(key, x):
        return {"s": jnp.ones(3), "count": {"batches": jnp.zeros(())}, "sum": jnp.zeros(3)}

    gradient = step_of(tally(init=init, renew=lambda params, residuals: params))[1]
    assert gradient[1]["count"] == {"batches": None}


@pytest.mark.parametrize(
    ("layer", "params"),
    [
        (tally(renew=lambda params, residuals: {"s": params["s"]}), None),
        (tally(renew=lambda params, residuals: params | {"sum": jnp.ones(5)}), None),
        (TALLY, {"s": jnp.ones(3)}),
    ],
)
def test_what_renew_gives_and_takes_is_named_with_the_layers_place(layer, params):
    with pytest.raises(bp.ModelError, match=r"chain\[1\] tally"):
        step_of(layer, params)


def test_state_that_init_does_not_make_is_refused_by_init():
    with pytest.raises(bp.ModelError, match=r"tally: .*no"):
        tally(state=("no",)).init(KEY, jnp.ones(3))
