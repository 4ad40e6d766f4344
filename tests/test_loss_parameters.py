"""Losses with parameters: a loss that is a last layer too, alone and tied to the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import WEIGHTS, N, check_equal, direction
from jax.flatten_util import ravel_pytree

import functional_bp as bp

IDS, KEY = bp.losses.softmax_cross_entropy, jax.random.key(0)
# A run that is the same is gone on with in silence.
pytestmark = pytest.mark.filterwarnings("error:checkpoints:UserWarning")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def cross_entropy(z, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1).mean()


def softmax_regression(classes, **changed):
    """z = W a + b, C = mean over positions of the cross-entropy of softmax(z) with class ids."""

    def init(key, a, y):
        weight = jax.random.normal(key, (classes, a.shape[-1]), a.dtype)
        return {"weight": weight, "bias": jnp.zeros(classes, a.dtype)}

    def value(params, a, y):
        return cross_entropy(a @ params["weight"].T + params["bias"], y)

    def delta(params, a, y):
        p = jax.nn.softmax(a @ params["weight"].T + params["bias"])
        delta = (p - jax.nn.one_hot(y, classes, dtype=p.dtype)) / max(1, y.size)
        factors = {"weight": bp.factors.Outer(delta, a), "bias": bp.factors.Summed(delta)}
        return delta @ params["weight"], factors

    given = {"init": init, "name": "softmax_regression", "head": (bp.dense(classes), IDS)}
    return bp.losses.loss(**{"value": value, "delta": delta} | given | changed)


scale = bp.rule(
    lambda key, x: {"s": jnp.ones((), x.dtype)},
    lambda params, x, key=None: (params["s"] * x, x),
    lambda params, x, dy: (params["s"] * dy, {"s": bp.factors.Itself((x * dy).sum())}),
    name="scale",
)


def _tempered_delta(params, a, y):
    delta = IDS.delta(params["s"] * a, y)
    return params["s"] * delta, {"s": bp.factors.Itself((a * delta).sum())}


tempered = bp.losses.loss(
    lambda params, a, y: cross_entropy(params["s"] * a, y),
    _tempered_delta,
    name="tempered",
    init=lambda key, a, y: scale.init(key, a),
    head=(scale, IDS),
)


def _gaussian_delta(params, a, y):
    e = jnp.exp(-params["s"]) * (a - y)
    return e, {"s": bp.factors.Itself((1 - e * (a - y)) / 2)}


gaussian = bp.losses.loss(  # −log N(y; a, e^s) but for a constant; it states no head
    lambda params, a, y: (jnp.exp(-params["s"]) * (a - y) ** 2 + params["s"]).sum() / 2,
    _gaussian_delta,
    name="gaussian",
    init=lambda key, a, y: {"s": jnp.zeros(a.shape, a.dtype)},
)

MODEL, LOSS = bp.chain(bp.dense(5), bp.tanh), softmax_regression(3)
EMBEDDING = bp.chain(bp.embedding(7, 5, dtype="float64"), bp.tanh)
TIE = {(1, "weight"): (0, 0, "weight")}
DENSE, TABLE = "a dense weight", "an embedding's table"


def _hidden(params, x):
    first = params[0][0]
    return jnp.tanh(first["weight"][x] if x.ndim == 1 else x @ first["weight"].T + first["bias"])


def _logits(params, x):
    (first, _), last = params
    weight = first["weight"] if last["weight"] is None else last["weight"]
    return _hidden(params, x) @ weight.T + last["bias"]


# The model, the loss, how many targets there are, and z(θ, x) of C = cross_entropy(z, y).
CASES = {
    "a last layer": (MODEL, LOSS, 3, _logits),
    "a scale": (MODEL, tempered, 5, lambda params, x: params[1]["s"] * _hidden(params, x)),
    "no head": (MODEL, gaussian, None, None),
    TABLE: (EMBEDDING, bp.tied(softmax_regression(7), TIE), 7, _logits),
    DENSE: (bp.chain(bp.dense(4), bp.tanh), bp.tied(softmax_regression(4), TIE), 4, _logits),
}


def start(model, loss, x, y):
    """Parameters of which none is 0."""

    def make(key):
        params = bp.init(model, loss, key, x[0], y[0])
        return jax.tree.map(lambda p: p + 0.1 * direction(p), params)

    return jax.jit(make)(KEY)


@functools.cache
def data(name="a last layer"):
    """``(model, loss, params, x, y)``: two positions, or four ids, in each example."""
    model, loss, classes, _ = CASES[name]
    random = np.random.default_rng(0)
    x = random.integers(7, size=(N, 4)) if name == TABLE else random.normal(size=(N, 2, 4))
    y = random.normal(size=(N, 2, 5))
    y = y if classes is None else random.integers(classes, size=x.shape[:2])
    with jax.enable_x64(True):
        x, y = jnp.asarray(x), jnp.asarray(y)
        return model, loss, start(model, loss, x, y), x, y


@pytest.mark.parametrize("name", CASES)
def test_quantities_equal_autodiff_of_the_definition(name):
    model, loss, *arrays = data(name)
    logits, w, bound = CASES[name][-1], jnp.array(WEIGHTS), 0.3

    def ours(params, x, y):
        def of(quantity, *vector, weights=w, **options):
            given = {} if weights is None else {"weights": weights}
            return quantity(model, loss, **options)(params, x, y, *vector, **given)

        v = direction(params)
        clipped, seen = of(bp.clipped_grad, max_norm=bound, has_aux=True)
        return ({} if logits is None else {"GGN v": of(bp.ggnvp, v)}) | {
            "cost and gradient": of(bp.value_and_grad),
            "autodiff": of(bp.grad, method="autodiff", microbatch=4),
            "each": of(bp.per_example_grads, weights=None),
            "norms": (of(bp.per_example_grad_norms, weights=None), seen.norms),
            "clipped": (clipped, of(bp.clipped_grad, max_norm=bound, recursions=1)),
            "second moment": of(bp.grad_second_moment, weights=jnp.ones(N)),
            "Gram": of(bp.grad_gram, weights=None),
            "dots": of(bp.grad_dots, v, weights=None),
            "Hessian v": of(bp.hvp, v),
        }

    def wanted(params, x, y):
        def cost(params, x, y):
            if logits is None:
                return gaussian.value(params[1], _hidden(params, x), y)
            return cross_entropy(logits(params, x), y)

        def mean_cost(params):
            return jnp.average(jax.vmap(cost, (None, 0, 0))(params, x, y), weights=w)

        def ggn_v():
            z, pull = jax.vjp(lambda p: jax.vmap(logits, (None, 0))(p, x), params)
            _, zv = jax.jvp(lambda p: jax.vmap(logits, (None, 0))(p, x), (params,), (v,))
            of_z = jax.grad(lambda z: jnp.average(jax.vmap(cross_entropy)(z, y), weights=w))
            return pull(jax.jvp(of_z, (z,), (zv,))[1])[0]

        v = direction(params)
        each = jax.vmap(jax.grad(cost), (None, 0, 0))(params, x, y)
        rows = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
        norms = jnp.linalg.norm(rows, axis=1)
        scales = w * jnp.minimum(1, bound / norms) / N
        clipped = jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), each)
        gradient, hessian_v = jax.jvp(jax.grad(mean_cost), (params,), (v,))
        return ({} if logits is None else {"GGN v": ggn_v()}) | {
            "cost and gradient": (mean_cost(params), gradient),
            "autodiff": gradient,
            "each": each,
            "norms": (norms, norms),
            "clipped": (clipped, clipped),
            "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
            "Gram": rows @ rows.T,
            "dots": rows @ ravel_pytree(v)[0],
            "Hessian v": hessian_v,
        }

    check_equal(jax.jit(ours)(*arrays), jax.jit(wanted)(*arrays), within=1e-11)


def first_order(model, loss, params, x, y):
    """What is left out above, four examples at a time, under weights."""
    of, w, v = {"microbatch": 4}, {"weights": jnp.array(WEIGHTS)}, direction(params)
    averages = (bp.grad_variance, bp.grad_noise_scale, bp.grad_diversity)
    found = {q.__name__: q(model, loss, **of)(params, x, y, **w) for q in averages}
    leaves = (({"weight": True, "bias": False}, ()), False)
    for method, frozen in (("manual", leaves), ("autodiff", lambda path: path[0] == 1)):
        fn = bp.value_and_grad(model, loss, method=method, frozen=frozen, **of)
        found[f"frozen, {method}"] = fn(params, x, y, **w)
    for per, recursions in (("layer", 1), ("parameter", 2)):
        options = {"per": per, "recursions": recursions, "has_aux": True, "normalize_by": 7.0}
        fn = bp.clipped_grad(model, loss, 0.3, **options, **of)
        found[f"clipped per {per}"] = fn(params, x, y, **w)
    return found | {
        "norms": bp.per_example_grad_norms(model, loss, per="layer")(params, x, y),
        "Gram of two": bp.grad_gram(model, loss, **of)(params, x, y, other=(v, x[:5], y[:5])),
    }


def second_order(model, loss, params, x, y):
    """Curvature, what is sampled under one key; and the δ of the model's layers."""
    of, w = {"microbatch": 4}, {"weights": jnp.array(WEIGHTS)}
    kinds = {"empirical": ("expand", None), "exact": ("reduce", None), "sampled": ("expand", KEY)}
    found, deltas = {}, bp.deltas(model, loss)(params, x, y)
    for fisher, (shared, key) in kinds.items():
        fn = bp.kronecker_factors(model, loss, fisher=fisher, shared=shared)
        found[f"Kronecker, {fisher}"] = fn(params, x, y, **w, key=key)
    return found | {
        "GGN v": bp.ggnvp(model, loss, **of)(params, x, y, direction(params), **w),
        "diagonal": bp.ggn_diagonal(model, loss, **of)(params, x, y, **w),
        "sampled": bp.ggn_diagonal(model, loss, samples=2)(params, x, y, **w, key=KEY),
        "δ": deltas if loss.has_parameters else deltas[0],
    }


@pytest.mark.parametrize("quantities", [first_order, second_order])
def test_quantities_are_those_of_the_same_numbers_in_a_last_layer(quantities):
    model, loss, *arrays = data()
    given = jax.jit(functools.partial(quantities, model, loss))(*arrays)
    whole = bp.chain(model, loss.head[0])
    wanted = jax.jit(functools.partial(quantities, whole, IDS))(*arrays)
    check_equal(given, wanted)
    assert jax.tree.structure(given) == jax.tree.structure(wanted)


def test_the_empirical_fisher_needs_no_head():
    model, loss, params, x, y = data("no head")

    def value(a, y):
        return loss.value(params[1], a, y)

    fixed = bp.losses.loss(value, jax.grad(value))
    given, own = bp.kronecker_factors(model, loss)(params, x, y)
    check_equal({"A, G": given}, {"A, G": bp.kronecker_factors(model, fixed)(params[0], x, y)})
    assert own == {"s": None}  # its gradient is no δ aᵀ


@pytest.mark.parametrize("name", [TABLE, DENSE])
def test_a_tied_parameter_is_none_and_its_curvature_that_of_a_tied_last_layer(name):
    model, loss, params, x, y = data(name)
    whole = bp.tied(bp.chain(model, loss.head[0]), TIE)
    assert params[1]["weight"] is None

    def both(params, x, y):
        def of(model, loss):
            factors = bp.kronecker_factors(model, loss)(params, x, y)
            return bp.ggn_diagonal(model, loss)(params, x, y), factors

        by_tree = bp.grad(model, loss, frozen=(True, False))(params, x, y)
        by_path = bp.grad(model, loss, frozen=lambda path: path == (0, 0, "weight"))
        return of(model, loss), of(whole, IDS), by_tree, by_path(params, x, y)

    ours, theirs, *frozen = jax.jit(both)(params, x, y)
    check_equal({"curvature": ours}, {"curvature": theirs})
    assert (ours[1][0][0]["weight"] is None) == (name == TABLE)  # rows of a table are no δ aᵀ
    assert all(g[0][0]["weight"] is g[1]["weight"] is None for g in frozen)
    assert all(g[1]["bias"].any() for g in frozen)


@pytest.mark.parametrize(
    "name",
    ["value_and_grad", "per_example_grads", "grad_gram", "hvp", "ggnvp", "kronecker_factors"],
)
def test_a_key_draws_the_same_noise_in_every_quantity(name):
    noise, _, params, x, y = under_noise()
    quantity = getattr(bp, name)
    v = [direction(params)] if name in ("hvp", "ggnvp") else []

    def both(params, x, y):
        masked = noise.forward((), x, KEY)[0]
        without = quantity(bp.identity, LOSS)(params, masked, y, *v)
        return quantity(noise, LOSS)(params, x, y, *v, key=KEY), without

    ours, theirs = jax.jit(both)(params, x, y)
    check_equal({name: ours}, {name: theirs})


def under_noise():
    return bp.dropout(0.5), LOSS, ((), data()[2][1]), jnp.ones((N, 2, 5)), data()[4]


ALSO = pytest.mark.exhaustive


@pytest.mark.parametrize("name", [pytest.param("noise", marks=ALSO), TABLE])
def test_check_model_proves_a_model_with_such_a_loss(name):
    model, loss, params, x, y = under_noise() if name == "noise" else data(name)
    key = KEY if name == "noise" else None
    bp.testing.check_model(model, loss, params, x[:2], y[:2], key=key)


def changed(change):
    """The loss with another δ and other factors."""
    return softmax_regression(3, delta=lambda params, a, y: change(*LOSS.delta(params, a, y)))


def twice(factors, name):
    return factors | {name: jax.tree.map(lambda f: 2 * f, factors[name])}


BIAS = "[0][0]['bias']"  # the first leaf of the model's gradient
FAULTS = {
    "value": (softmax_regression(3, value=lambda *given: 2 * LOSS.value(*given)), BIAS),
    "delta": (changed(lambda d, factors: (-d, factors)), BIAS),
    "weight": (changed(lambda d, factors: (d, twice(factors, "weight"))), "[1]['weight']"),
    "bias": (changed(lambda d, factors: (d, twice(factors, "bias"))), "[1]['bias']"),
}


@pytest.mark.parametrize(
    "fault", ["weight", *(pytest.param(f, marks=ALSO) for f in FAULTS if f != "weight")]
)
def test_check_model_finds_a_fault(fault):
    (model, _, params, x, y), (loss, leaf) = data(), FAULTS[fault]
    with pytest.raises(AssertionError) as told:
        bp.testing.check_model(model, loss, params, x[:2], y[:2])
    assert f"grad, leaf {leaf}" in str(told.value)


W = np.arange(20.0)
X = np.random.default_rng(0).normal(size=(20, 4))
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]
ADAMW = optax.adamw(0.05, weight_decay=0.1)
OUTPUTS = {"outputs": lambda a, y: jnp.full(len(y), a.shape[-1])}


@functools.cache
def untrained():
    with jax.enable_x64(True):
        return start(MODEL, LOSS, X, Y)


def fit(steps, folder=None, loss=LOSS, **given):
    if folder is not None:
        given |= {"checkpoints": folder, "resume": True}
    return bp.fit(MODEL, loss, untrained(), BATCHES, ADAMW, steps=steps, every=2, **given)


def by_hand(steps, frozen):
    """The loop that fit stands for."""
    gradient = bp.value_and_grad(MODEL, LOSS, frozen=frozen)

    @jax.jit
    def step(trained, state, x, y):
        cost, grads = gradient(bp.merged(trained, untrained()), x, y)
        updates, state = ADAMW.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, cost

    trained, costs = bp.trainable(untrained(), frozen), []
    state = jax.jit(ADAMW.init)(trained)
    for i in range(steps):
        trained, state, cost = step(trained, state, *BATCHES[i % 3])
        costs.append(cost)
    return bp.merged(trained, untrained()), np.array(costs)


@pytest.mark.parametrize("frozen", [None, (False, True), lambda path: path == (1, "weight")])
def test_fit_trains_the_pair_as_the_bare_loop_does(frozen):
    run = fit(30, frozen=frozen, evaluation=[(X, Y)], metrics=OUTPUTS)
    params, costs = by_hand(30, frozen)
    check_equal({"params": run.params, "loss": run.history.loss}, {"params": params, "loss": costs})
    assert run.history.evaluation["loss"][-1] < 0.6 * run.history.evaluation["loss"][0]
    assert (run.history.evaluation["outputs"] == 5).all()  # the model's, not the logits
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), run.params[1], untrained()[1])
    assert moved == {"weight": frozen is None, "bias": frozen != (False, True)}


def test_a_run_goes_on_from_its_checkpoints_and_another_loss_is_refused(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    whole = fit(6)
    fit(3, tmp_path)
    run = fit(6, tmp_path, softmax_regression(3))  # the same function, made anew
    parts = [(r.params, r.opt_state, r.step, vars(r.history)) for r in (run, whole)]
    jax.tree.map(np.testing.assert_array_equal, *parts)
    for another in ("value", "weight"):
        with pytest.raises(bp.ModelError, match="compute something else"):
            fit(7, tmp_path, FAULTS[another][0])


def test_parameters_go_to_a_file_by_name(tmp_path):
    safetensors, path = pytest.importorskip("safetensors.numpy"), tmp_path / "pair.safetensors"
    bp.save_params(path, untrained())
    names = ["0.0.bias", "0.0.weight", "1.bias", "1.weight"]
    assert sorted(safetensors.load_file(path)) == names
    shapes = jax.eval_shape(lambda: bp.init(MODEL, LOSS, KEY, X[0], Y[0]))
    jax.tree.map(np.testing.assert_array_equal, bp.load_params(path, shapes), untrained())
    bp.save_params(path, data(TABLE)[2])
    assert sorted(safetensors.load_file(path)) == ["0.0.weight", "1.bias"]


def test_kfac_trains_the_pair():
    optimizer = bp.kfac(MODEL, LOSS, 0.3, batch=(X, Y))
    run = bp.fit(MODEL, LOSS, untrained(), [(X, Y)], optimizer, steps=10, key=KEY)
    assert run.history.loss[-1] < 0.6 * run.history.loss[0]


def test_a_batch_norm_keeps_its_state_in_the_models_part():
    model = bp.chain(bp.dense(5, bias=False), bp.batch_norm(), bp.tanh)
    params, both = start(model, LOSS, X, Y), ((model, LOSS), (bp.chain(model, LOSS.head[0]), IDS))
    ours, theirs = (jax.jit(bp.value_and_grad(*of, renew=True))(params, X, Y) for of in both)
    check_equal({"all": ours}, {"all": theirs})
    (_, renewed), gradient = ours
    assert gradient[0][1]["mean"] is None
    assert (renewed[0][1]["mean"] != params[0][1]["mean"]).all()
    run = bp.fit(model, LOSS, params, [(X, Y)], optax.sgd(0.0), steps=1)
    check_equal({"params": run.params}, {"params": renewed})
    costs = LOSS.costs(renewed[1], model.apply(renewed[0], X), Y)
    measured = bp.evaluate(model, LOSS)(renewed, [(X, Y, W)])["loss"]
    np.testing.assert_allclose(measured, np.average(costs, weights=W), rtol=1e-12)
    with pytest.raises(bp.ModelError, match="mixes the examples of a batch"):
        bp.ggnvp(model, LOSS)


def test_an_ensemble_and_a_donated_pair():
    keys, norms = jax.random.split(KEY, 2), bp.per_example_grad_norms(MODEL, LOSS)
    ensemble = jax.vmap(lambda key: bp.init(MODEL, LOSS, key, X[0], Y[0]))(keys)
    second = jax.tree.map(lambda p: p[1], ensemble)
    together = jax.jit(jax.vmap(norms, (0, None, None)))(ensemble, X, Y)
    np.testing.assert_allclose(together[1], jax.jit(norms)(second, X, Y), rtol=1e-12)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params):
        return jax.tree.map(lambda p, g: p - g, params, bp.grad(MODEL, LOSS)(params, X, Y))

    assert jax.tree.structure(step(second)) == jax.tree.structure(untrained())
    assert all(p.is_deleted() for p in jax.tree.leaves(second))


def test_bfloat16_parameters_of_a_loss_have_bfloat16_gradients():
    model, loss, (of_model, of_loss), x, y = data()
    low = (of_model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), of_loss))
    high = jax.tree.map(lambda p: p.astype(float), low)
    found, wanted = (jax.jit(bp.grad(model, loss))(params, x, y) for params in (low, high))
    assert [g.dtype for g in jax.tree.leaves(found)] == [p.dtype for p in jax.tree.leaves(low)]
    check_equal({"g": found}, {"g": wanted}, within=2**-7)


def of(change, model=None, quantity=bp.grad):
    """A quantity under other parameters than (a dense layer's, the loss's)."""
    (layer, _), of_loss = untrained()
    return quantity(model or bp.dense(5), LOSS)(change((layer, of_loss)), X, Y)


def measured(model, loss):
    return lambda params, x, y: bp.evaluate(model, loss)(params, [(x, y)])


def norms(loss=LOSS, **given):
    loss = softmax_regression(3, **given) if given else loss
    return bp.per_example_grad_norms(MODEL, loss)(untrained(), X, Y)


def tie(path, source):
    _, _, _, ids, y = data(TABLE)
    return bp.init(EMBEDDING, bp.tied(softmax_regression(7), {path: source}), KEY, ids[0], y[0])


PAIR = "softmax_regression: takes parameters as the tuple (model's, loss's), as bp.init makes them"
FACTORS = "gives one factored gradient (bp.factors) "
OWN = "takes ties of a loss from its own parameters, (1, …), to the model's, (0, …), got "
HEAD = "softmax_regression: head: takes "
NO_HEAD = "gaussian: has parameters, and does not state of which outputs its Hessian is; give head="


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: of(lambda p: p[0]), PAIR + ", got {'bias': float64(5,)"),
        (lambda: of(lambda p: (*p, ())), PAIR),
        (lambda: of(lambda p: p[::-1]), "dense(5): takes a weight of (5, in) and a bias of (5,)"),
        (lambda: of(list), PAIR),
        (lambda: of(lambda p: None), PAIR),
        (lambda: of(lambda p: (p[0], ()), MODEL), "chain: takes parameters as a tuple"),
        (lambda: of(lambda p: (p[0], {})), LOSS.name + ": takes parameters {'bias'"),
        (lambda: of(lambda p: p[0], quantity=measured), PAIR),
        (lambda: norms(changed(lambda d, f: d)), "gives (∂C/∂a, factors), got float64(5,)"),
        (lambda: norms(changed(lambda d, f: (d, ()))), FACTORS),
        (lambda: norms(changed(lambda d, f: (d, {"bias": f["bias"]}))), FACTORS),
        (lambda: norms(changed(lambda d, f: (d, f | {"bias": d}))), FACTORS),
        (lambda: norms(changed(lambda d, f: (d[1:], f))), "outputs' shape, float64(5,), got"),
        (
            lambda: norms(value=lambda p, a, y: a),
            "takes a value that is a scalar, floating-point, got float64(5",
        ),
        (lambda: norms(value=lambda p, a, y: {"C": a.sum()}), "scalar"),
        (lambda: tie((0, 0, "weight"), (1, "weight")), OWN + "(0, 0, 'weight'): (1, 'weight')"),
        (lambda: tie((1, "w"), (0, 0, "weight")), "got (1, 'w'), of which (1, 'w') does not"),
        (lambda: tie((1, "weight"), (0, 3)), "got (0, 3), of which (0, 3) does not exist"),
        (lambda: tie((1, "bias"), (0, 0, "weight")), "of equal shapes, got float64(7,) at (1, 'bi"),
        (lambda: bp.tied(IDS, TIE), "takes a loss that has parameters"),
        (lambda: bp.ggnvp(MODEL, gaussian), NO_HEAD),
        (lambda: bp.kronecker_factors(MODEL, gaussian, fisher="exact"), NO_HEAD),
        (
            lambda: softmax_regression(3, head=bp.dense(3)),
            HEAD + "a layer and a loss, got dense(3)",
        ),
        (lambda: softmax_regression(3, head=(jnp.tanh, IDS)), HEAD + "a bp.Layer, got"),
        (lambda: softmax_regression(3, head=(bp.dense(3), LOSS)), HEAD + "a loss without"),
        (
            lambda: softmax_regression(3, init={"bias": 0}),
            "loss: init: takes a function, got {'bias': 0}",
        ),
        (lambda: bp.init(MODEL, LOSS, KEY, X[0], None), "y: takes arrays of numbers, got None"),
        (lambda: bp.grad(MODEL, LOSS)(untrained(), X[:0], Y[:0]), "takes at least one example"),
    ],
)
def test_what_does_not_fit_is_told(call, message):
    with pytest.raises(bp.ModelError) as told:
        call()
    assert message in str(told.value)


def test_check_model_finds_a_head_that_is_another_loss():
    model, _, params, x, y = data()
    thrice = bp.losses.loss(lambda z, y: 3 * IDS.value(z, y), lambda z, y: 3 * IDS.delta(z, y))
    loss = softmax_regression(3, head=(bp.dense(3), thrice))
    with pytest.raises(AssertionError, match="value of the head"):
        bp.testing.check_model(model, loss, params, x[:2], y[:2])


def test_a_cost_that_is_a_whole_number_is_refused():
    whole = bp.losses.loss(lambda a, y: jnp.round(a.sum()).astype(int), lambda a, y: a)
    with pytest.raises(bp.ModelError, match="a scalar, floating-point"):
        bp.grad(bp.tanh, whole)((), X, Y)
