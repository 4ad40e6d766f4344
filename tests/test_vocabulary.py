"""The loss over a vocabulary: equal to a dense layer and a cross-entropy, without their logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal, direction
from jax.flatten_util import ravel_pytree

import functional_bp as bp
from functional_bp.factors import softmax_outer
from functional_bp.losses import by_positions, linear_softmax_cross_entropy

WORDS, FEATURES, N, T = 11, 3, 4, 5
TIE = {(1, "weight"): (0, 0, "weight")}
WEIGHTS = jnp.array([2.0, 0.0, 1.0, 3.0])
ALSO = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["by positions", pytest.param("by rows", marks=ALSO)])
def in_blocks(request, monkeypatch):
    """Small blocks, the last of them smaller, in both ways of going over the logits."""
    monkeypatch.setattr(softmax_outer, "LEAST", 4)
    monkeypatch.setattr(softmax_outer, "NUMBERS", 0)
    monkeypatch.setattr(by_positions, "LEAST", 2 * N)
    monkeypatch.setattr(by_positions, "NUMBERS", 0)
    monkeypatch.setattr(by_positions, "ROWS", 4)
    if request.param == "by rows":
        monkeypatch.setattr(by_positions, "MOST", 0)


TARGETS = {
    "ids": lambda ids: ids,
    "length": lambda ids: {"y": ids, "length": jnp.array([5, 2, 1, 0])},
    "mask": lambda ids: {"y": ids, "mask": ids % 2 == 0},
}
CASES = {
    "plain": ({}, "ids", False),
    "tied": ({}, "ids", True),
    "smoothed, some": ({"smoothing": 0.2}, "length", True),
    "z": ({"z_loss": 0.1}, "mask", False),
    "all": ({"smoothing": 0.2, "z_loss": 0.1}, "ids", True),
}


def model_of(options, tied):
    model = bp.chain(bp.embedding(WORDS, FEATURES, dtype="float64"), bp.tanh)
    normal = jax.nn.initializers.normal(1.0)
    loss = linear_softmax_cross_entropy(WORDS, weight_init=normal, **options)
    return model, bp.tied(loss, TIE) if tied else loss


def data(model, loss, target):
    random = np.random.default_rng(0)
    x, ids = (jnp.asarray(random.integers(WORDS, size=(N, T))) for _ in range(2))
    x = x.at[:, 1].set(x[:, 0])  # a word twice, and one that is its own target
    y = TARGETS[target](ids.at[:, 2].set(x[:, 2]))
    one = jax.tree.map(lambda leaf: leaf[0], (x, y))
    return bp.init(model, loss, jax.random.key(0), *one), x, y


def definition(params, x, y, smoothing=0.0, z_loss=0.0):
    """C of one example, from its logits."""
    table = params[0][0]["weight"]
    weight = table if params[1]["weight"] is None else params[1]["weight"]
    z = jnp.tanh(table[x]) @ weight.T
    mask = jnp.ones(T, bool)
    if isinstance(y, dict):
        mask = y["mask"] if "mask" in y else jnp.arange(T) < y["length"]
        y = y["y"]
    q = (1 - smoothing) * jax.nn.one_hot(y, WORDS) + smoothing / WORDS
    costs = -(q * jax.nn.log_softmax(z)).sum(-1) + z_loss * jax.nn.logsumexp(z, -1) ** 2
    return jnp.where(mask, costs, 0).sum() / jnp.maximum(1, mask.sum())


@pytest.mark.parametrize(
    "name",
    [n if n in ("tied", "smoothed, some", "z") else pytest.param(n, marks=ALSO) for n in CASES],
)
def test_quantities_equal_autodiff_of_the_definition(name, in_blocks):
    options, target, tied = CASES[name]
    model, loss = model_of(options, tied)
    arrays = data(model, loss, target)
    w, bound = WEIGHTS, 0.3

    def ours(params, x, y):
        def of(quantity, *vector, **given):
            return quantity(model, loss, **given)(params, x, y, *vector)

        v = direction(params)
        return {
            "cost and gradient": bp.value_and_grad(model, loss)(params, x, y, weights=w),
            "in microbatches": of(bp.value_and_grad, microbatch=3)[1],
            "autodiff": bp.grad(model, loss, method="autodiff")(params, x, y, weights=w),
            "each": of(bp.per_example_grads),
            "norms": of(bp.per_example_grad_norms),
            "clipped": of(bp.clipped_grad, max_norm=bound),
            "second moment": of(bp.grad_second_moment),
            "Gram": of(bp.grad_gram),
            "dots": of(bp.grad_dots, v),
            "Hessian v": of(bp.hvp, v),
        }

    def wanted(params, x, y):
        def cost(params, x, y):
            return definition(params, x, y, **options)

        def mean(params, w=None):
            return jnp.average(jax.vmap(cost, (None, 0, 0))(params, x, y), weights=w)

        v = direction(params)
        each = jax.vmap(jax.grad(cost), (None, 0, 0))(params, x, y)
        rows = jnp.concatenate([g.reshape(N, -1) for g in jax.tree.leaves(each)], 1)
        norms = jnp.linalg.norm(rows, axis=1)
        scales = jnp.minimum(1, bound / jnp.maximum(norms, 1e-30)) / N
        return {
            "cost and gradient": jax.value_and_grad(mean)(params, w),
            "in microbatches": jax.grad(mean)(params),
            "autodiff": jax.grad(mean)(params, w),
            "each": each,
            "norms": norms,
            "clipped": jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), each),
            "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
            "Gram": rows @ rows.T,
            "dots": rows @ ravel_pytree(v)[0],
            "Hessian v": jax.jvp(jax.grad(mean), (params,), (v,))[1],
        }

    check_equal(jax.jit(ours)(*arrays), jax.jit(wanted)(*arrays), within=1e-11)


@pytest.mark.parametrize("name", ["tied", pytest.param("all", marks=ALSO)])
def test_curvature_is_that_of_the_logits(name):
    options, target, tied = CASES[name]
    model, loss = model_of(options, tied)
    params, x, y = data(model, loss, target)
    of_logits = bp.tied(
        bp.chain(model, bp.dense(WORDS, bias=False)), {(1, "weight"): TIE[1, "weight"]}
    )
    v = direction(params)
    given = jax.jit(bp.ggnvp(model, loss))(params, x, y, v)
    wanted = jax.jit(bp.ggnvp(of_logits, loss.head[1]))(params, x, y, v)
    check_equal({"GGN v": given}, {"GGN v": wanted}, within=1e-11)


@ALSO
def test_the_proof_holds_for_it():
    model, loss = model_of({"smoothing": 0.1}, tied=False)
    params, x, y = data(model, loss, "ids")
    bp.testing.check_model(model, loss, params, x[:2], y[:2])


def test_positions_may_be_on_two_axes():
    model, loss = model_of({}, tied=False)
    params, x, y = data(model, loss, "ids")
    square = jax.tree.map(lambda leaf: leaf[:, :4].reshape(N, 2, 2), (x, y))
    given = jax.jit(bp.value_and_grad(model, loss))(params, *square)
    wanted = jax.jit(bp.value_and_grad(model, loss))(params, x[:, :4], y[:, :4])
    check_equal({"step": given}, {"step": wanted}, within=1e-12)


def compiled(words, tokens=1024, features=16):
    model, loss = bp.identity, linear_softmax_cross_entropy(words)
    shapes = jax.eval_shape(lambda: ((), {"weight": jnp.zeros((words, features), "float32")}))
    h = jax.ShapeDtypeStruct((1, tokens, features), "float32")
    y = jax.ShapeDtypeStruct((1, tokens), "int32")
    step = jax.jit(bp.value_and_grad(model, loss)).lower(shapes, h, y).compile()
    return step.memory_analysis().temp_size_in_bytes


def test_its_logits_are_never_all_there():
    assert compiled(2**14) < 1024 * 2**14 * 4 / 3
    of_all = 1024 * 2**17 * 4
    few, many = compiled(2**17), compiled(2**18)
    assert many < 1.1 * few and few < of_all / 20


def test_sums_are_float32_where_the_model_is_bfloat16():
    loss = linear_softmax_cross_entropy(300)
    random = np.random.default_rng(0)
    h = jnp.asarray(random.normal(size=(2, 64, 16)), "bfloat16")
    y = jnp.asarray(random.integers(300, size=(2, 64)))
    params = (), {"weight": jnp.asarray(random.normal(size=(300, 16)), "bfloat16")}
    step = jax.jit(bp.value_and_grad(bp.identity, loss))
    cost, (_, gradient) = step(params, h, y)
    exact, (_, wanted) = step(*jax.tree.map(lambda a: a.astype("float64"), (params, h)), y)
    assert cost.dtype == jnp.float32 and gradient["weight"].dtype == jnp.bfloat16
    assert abs(cost - exact) < 2e-3 * exact
    largest = jnp.abs(wanted["weight"]).max()
    assert jnp.abs(gradient["weight"] - wanted["weight"]).max() < 0.01 * largest


H, Y = np.ones((2, 3, 4), np.float32), np.zeros((2, 3), int)
LOSS = linear_softmax_cross_entropy(7)
PARAMS = ((), {"weight": np.ones((7, 4), np.float32)})
MISTAKES = {
    "no features": (PARAMS, H[:, 0, 0], Y[:, 0], r"takes outputs \(…, features\)"),
    "outputs that are ids": (PARAMS, Y[..., None], Y, r"takes outputs \(…, features\)"),
    "probabilities": (PARAMS, H, np.ones((2, 3, 7), np.float32), "takes targets as ids"),
    "other targets": (PARAMS, H, Y[:, :2], r"class ids of shape \(3,\)"),
    "ids outside": (PARAMS, H, Y + 7, "class ids from 0 to 6, got 7 to 7"),
    "another's weight": (
        ((), {"weight": np.ones((6, 4), np.float32)}),
        H,
        Y,
        r"takes a weight of \(7, 4\), got .*another model's",
    ),
    "no pair": (PARAMS[1], H, Y, r"\(model's, loss's\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_named(name):
    params, h, y, told = MISTAKES[name]
    with pytest.raises(bp.ModelError, match=r"linear_softmax_cross_entropy\(7\):.*" + told):
        bp.value_and_grad(bp.identity, LOSS)(params, h, y)


def test_an_id_outside_that_is_traced_gives_nan():
    cost = jax.jit(bp.value_and_grad(bp.identity, LOSS))(PARAMS, H, Y + 7)[0]
    assert np.isnan(cost)
