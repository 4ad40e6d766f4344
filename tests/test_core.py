"""What users call: the same gradient by either method, whatever it is composed with."""

import functools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import COMBINED

import functional_bp as bp

KEY = jax.random.key(0)
LOSS = bp.losses.softmax_cross_entropy
MODEL = bp.chain(
    bp.dense(4),
    bp.tanh,
    bp.residual(bp.chain(bp.dense(4), bp.relu)),
    bp.repeat(bp.chain(bp.dense(4), bp.sigmoid), 2),
    bp.dense(3),
)
X = jax.random.normal(KEY, (5, 6))
Y = jnp.array([0, 1, 2, 0, 1])
PARAMS = MODEL.init(KEY, X[0])


HAND = bp.value_and_grad(MODEL, LOSS)
COMPILED = {  # once for all tests
    "manual": jax.jit(HAND),
    "autodiff": jax.jit(bp.value_and_grad(MODEL, LOSS, method="autodiff")),
}
EACH = jax.jit(bp.per_example_grads(MODEL, LOSS))
DELTAS = jax.jit(bp.deltas(MODEL, LOSS))


def by_hand(params=PARAMS, x=X, y=Y, **options):
    return COMPILED["manual"](params, x, y, **options)


def by_autodiff(params=PARAMS, x=X, y=Y, **options):
    return COMPILED["autodiff"](params, x, y, **options)


def assert_same(found, wanted, tolerance=5e-6):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
        assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-30)


def test_the_method_is_one_argument():
    assert_same(by_hand(), by_autodiff())


def test_outside_jit():
    model = bp.chain(bp.dense(4), bp.tanh, bp.dense(3))
    params = (PARAMS[0], (), PARAMS[4])
    assert_same(
        bp.value_and_grad(model, LOSS)(params, X, Y),
        bp.value_and_grad(model, LOSS, method="autodiff")(params, X, Y),
    )


def test_under_vmap_over_an_ensemble():
    ensemble = jax.tree.map(lambda p: np.stack([p, -p, p + np.float32(0.1)]), PARAMS)
    assert_same(jax.vmap(by_hand)(ensemble), jax.vmap(by_autodiff)(ensemble))
    norms = jax.jit(jax.vmap(lambda p: bp.per_example_grad_norms(MODEL, LOSS)(p, X, Y)))(ensemble)
    each = jax.tree.leaves(jax.vmap(EACH, (0, None, None))(ensemble, X, Y))
    assert_same(norms, jnp.sqrt(sum((g**2).sum(range(2, g.ndim)) for g in each)))


def test_inside_scan():
    def steps(value_and_grad):
        def step(params, _):
            cost, g = value_and_grad(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), cost

        return jax.lax.scan(step, PARAMS, None, length=3)

    assert_same(steps(by_hand), steps(by_autodiff), 2e-5)  # three steps of rounding


def test_with_donated_parameters():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(params):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, HAND(params, X, Y)[1])

    given = jax.tree.map(jnp.copy, PARAMS)
    assert_same(step(given), jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, by_autodiff()[1]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_equal_shapes_trace_once():
    traces = []

    @jax.jit
    def step(params, x, y):
        traces.append(1)
        return HAND(params, x, y)

    step(PARAMS, X, Y)
    step(jax.tree.map(lambda p: p + 1, PARAMS), X + 1, Y)
    assert len(traces) == 1


def test_forward_mode_through_it_is_the_hessian_vector_product():
    v = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), PARAMS)

    def product(value_and_grad):
        return jax.jvp(lambda params: value_and_grad(params)[1], (PARAMS,), (v,))[1]

    assert_same(product(by_hand), product(by_autodiff), 2e-5)  # second derivatives, in float32


def test_float32_stays_float32_under_x64():
    with jax.enable_x64(True):
        cost, g = by_hand()
        each = EACH(PARAMS, X, Y)
    assert {leaf.dtype for leaf in jax.tree.leaves((cost, g, each))} == {jnp.dtype("float32")}


def test_numpys_float64_is_taken_as_float32():
    stack = bp.chain(bp.repeat(bp.dense(6), 2), bp.dense(3))
    x = np.asarray(X, np.float64)
    params = stack.init(KEY, x[0])
    found = jax.jit(bp.value_and_grad(stack, LOSS))(params, x, Y)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, found))} == {jnp.dtype("float32")}


def test_float64_is_exact():
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype("float64"), (PARAMS, X))
        assert_same(by_hand(params, x), by_autodiff(params, x), 1e-12)


@pytest.mark.parametrize("method", ["manual", "autodiff"])
def test_bfloat16_stays_bfloat16_and_is_close(method):
    model = bp.chain(bp.dense(4), bp.relu, bp.dense(3))
    value_and_grad = jax.jit(bp.value_and_grad(model, LOSS, method=method))
    params = (PARAMS[0], (), PARAMS[4])
    low = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), (params, X))
    cost, g = value_and_grad(*low, Y)
    assert cost.dtype == jnp.float32
    _, g_float32 = value_and_grad(params, X, Y)
    wanted = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), g_float32)
    assert_same(g, wanted, 0.05)  # bfloat16 has 8 bits, of which two layers use up three


def test_bfloat16_sums_over_the_batch_in_float32():
    layer, n = bp.dense(1, bias=False), 4096
    x = jnp.ones((n, 1), "bfloat16")
    g = bp.grad(layer, bp.losses.squared_error)(
        {"weight": jnp.zeros((1, 1), "bfloat16")}, x, jnp.ones((n, 1), "bfloat16")
    )
    assert float(g["weight"][0, 0]) == -1.0  # a sum in bfloat16 stops growing at 256 terms


WEIGHTS = {
    "some": jnp.array([1.0, 0.0, 2.0, 0.5, 1.0]),
    "one": jnp.array([0.0, 0.0, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_a_weighted_mean(name):
    w = WEIGHTS[name]
    cost, g = by_hand(weights=w)
    assert_same((cost, g), by_autodiff(weights=w))
    each = EACH(PARAMS, X, Y)
    assert_same(g, jax.tree.map(lambda leaf: jnp.tensordot(w / w.sum(), leaf, 1), each), 1e-5)


def test_weight_zero_is_absence():
    padded = jnp.concatenate([X, 9 * X[:2]]), jnp.concatenate([Y, Y[:2]])
    w = jnp.array([1.0] * 5 + [0.0] * 2)
    assert_same(by_hand(PARAMS, *padded, weights=w), by_hand())


def test_weights_of_zero_alone_give_zero():
    cost, g = by_hand(weights=jnp.zeros(5))
    assert cost == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(g))


@pytest.mark.parametrize("name", ["residual of repeats", "tied inside repeat", "sum of branches"])
def test_a_model_and_its_loss_are_proven(name):
    model, x = COMBINED[name]
    params = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, KEY, x))
    bp.testing.check_model(model, LOSS, params, X[:3, :4], Y[:3])


def test_deltas_of_dense_layers_are_their_biases_gradients():
    delta, each = DELTAS(PARAMS, X, Y), EACH(PARAMS, X, Y)
    assert len(delta) == 5
    for ours, theirs in (
        (delta[0], each[0]["bias"]),
        (delta[2][0][0], each[2][0][0]["bias"]),
        (delta[3][0], each[3][0]["bias"]),
        (delta[4], each[4]["bias"]),
    ):
        assert_same(ours, theirs)


def test_the_last_delta_is_p_minus_y():
    p_minus_y = jax.nn.softmax(MODEL.apply(PARAMS, X)) - jax.nn.one_hot(Y, 3)
    assert_same(DELTAS(PARAMS, X, Y)[4], p_minus_y)


def test_a_shortcut_carries_delta_past_its_layer():
    """δ behind a residual layer is that of both its ways."""
    _, _, (of_layer, of_shortcut), *_ = DELTAS(PARAMS, X, Y)
    assert_same(of_layer[-1], of_shortcut)


def test_deltas_of_a_repeat_are_those_of_the_chain_of_its_layers():
    unrolled = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], PARAMS[3]) for i in range(2))
    model = bp.chain(*MODEL.parts[:3], bp.chain(*MODEL.parts[3].parts * 2), MODEL.parts[4])
    layers = jax.jit(bp.deltas(model, LOSS))((*PARAMS[:3], unrolled, PARAMS[4]), X, Y)[3]
    assert_same(DELTAS(PARAMS, X, Y)[3], jax.tree.map(lambda *d: jnp.stack(d, 1), *layers))


def test_a_frozen_parameter_has_no_gradient_by_either_method():
    def frozen(path):
        return path[0] in (0, 3)

    def grad(frozen, method="manual"):
        return jax.jit(bp.grad(MODEL, LOSS, frozen=frozen, method=method))(PARAMS, X, Y)

    found = grad(frozen)
    assert found[0] == {"weight": None, "bias": None}
    assert_same(found, grad(frozen, "autodiff"))
    assert_same(found, grad((True, (), False, True, False)))
    assert_same(bp.merged(bp.trainable(PARAMS, frozen), PARAMS), PARAMS)


def test_a_frozen_model_does_less_work():
    def flops(frozen):
        f = jax.jit(bp.grad(MODEL, LOSS, frozen=frozen))
        return f.lower(PARAMS, X, Y).compile().cost_analysis()["flops"]

    assert flops((True, (), True, True, False)) < 0.7 * flops(None)


def test_dropout_draws_a_mask_for_each_example_and_none_without_a_key():
    model = bp.chain(bp.dense(64), bp.dropout(0.5))
    params = model.init(KEY, X[0])
    same = jnp.tile(X[:1], (2, 1))
    y = model.apply(params, same, jax.random.key(1))
    assert (y == 0).mean() == pytest.approx(0.5, abs=0.15)
    assert not (y[0] == y[1]).all()
    assert_same(model.apply(params, same), bp.dense(64).apply(params[0], same))


def test_repeat_is_the_chain_of_its_layers():
    layer = bp.chain(bp.dense(6), bp.tanh)
    stack = bp.repeat(layer, 3)
    params = stack.init(KEY, X[0])
    unrolled = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(3))
    assert_same(stack.apply(params, X), bp.chain(*[layer] * 3).apply(unrolled, X))


def test_repeat_compiles_one_layer_whatever_its_depth():
    def size(n):
        stack = bp.chain(bp.repeat(bp.chain(bp.dense(6), bp.relu), n), bp.dense(3))
        params = stack.init(KEY, X[0])
        return len(jax.jit(bp.grad(stack, LOSS)).lower(params, X, Y).as_text().splitlines())

    assert size(40) == size(4)


def test_repeat_keeps_what_two_rules_share_once():
    """A tanh network's only residuals are its activations, each the next layer's input."""
    n, width, batch = 32, 64, 128
    stack = bp.repeat(bp.chain(bp.dense(width), bp.tanh), n)
    x = jnp.ones((batch, width))
    params = stack.init(KEY, x[0])
    f = jax.jit(bp.grad(stack, bp.losses.squared_error))
    temp = f.lower(params, x, x).compile().memory_analysis().temp_size_in_bytes
    assert temp < 1.5 * 4 * n * width * batch


def test_summary_lists_each_layer_with_its_place_and_counts():
    text = bp.summary(MODEL, X[0])
    assert "[2][0][0]" in text
    assert "weight (4, 6)" in text
    count = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert text.splitlines()[-1].split() == ["total", str(count)]


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    batch=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    positions=st.lists(st.integers(1, 2), max_size=1),
    seed=st.integers(0, 9),
)
def test_any_shape_is_proven(batch, sizes, positions, seed):
    model = bp.chain(*[layer for size in sizes for layer in (bp.dense(size), bp.tanh)])
    shape = (*positions, sizes[0])
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(batch, *shape)), rng.normal(size=(batch, *positions, sizes[-1]))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, KEY, x[0])
        params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
        found, wanted = (
            jax.jit(bp.value_and_grad(model, bp.losses.squared_error, method=method))(params, x, y)
            for method in ("manual", "autodiff")
        )
        assert_same(found, wanted, 1e-12)


def test_the_package_imports_nothing_that_is_an_extra():
    code = "import functional_bp, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    loaded = {name.partition(".")[0] for name in modules.split()}
    extras = {"tqdm", "orbax", "safetensors", "sklearn", "matplotlib", "torch", "dp_accounting"}
    assert "functional_bp" in loaded
    assert not loaded & extras
