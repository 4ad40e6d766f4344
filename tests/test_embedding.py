"""The embedding, its rows as a factored gradient, and losses over valid positions."""

import jax
import jax.numpy as jnp
import pytest
from definitions import check_equal

import functional_bp as bp
from functional_bp import contractions
from functional_bp.factors import Outer, Rows

key = jax.random.key(0)
softmax_cross_entropy = bp.losses.softmax_cross_entropy


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("other", ["rows", "outer"])
def test_rows_meet_other_factors_as_their_matrices_do(other):
    """The cross terms of a weight that is an embedding and an output layer at once."""
    ids, v = jax.random.randint(key, (3, 4), 0, 5), normal(1, 3, 4, 2)
    rows = Rows(ids, v, 5)
    if other == "rows":
        f = Rows(jax.random.randint(jax.random.key(2), (3, 6), 0, 5), normal(3, 3, 6, 2), 5)
    else:
        f = Outer(normal(2, 3, 6, 5), normal(3, 3, 6, 2))

    def both(a, b):
        matrices = a.each(), b.each()
        wanted = jnp.einsum("noi,noi->n", *matrices), jnp.einsum("noi,moi->nm", *matrices)
        return {"inner and Gram": (a.inner(b), a.gram(b))}, {"inner and Gram": wanted}

    for pair in ((rows, f), (f, rows)):
        check_equal(*jax.jit(both)(*pair), within=1e-12)


def test_a_tied_language_model_and_its_loss_over_valid_positions_are_proven():
    model = bp.tied(
        bp.chain(bp.embedding(5, 2), bp.tanh, bp.dense(5, bias=False)),
        {(2, "weight"): (0, "weight")},
    )
    x = jnp.array([[1, 4, 1], [0, 0, 2], [3, 3, 3]])
    y = {"y": jnp.roll(x, -1, 1), "length": jnp.array([3, 2, 0])}
    params = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, key, x[0]))
    bp.testing.check_model(model, softmax_cross_entropy, params, x, y)


def test_ids_have_no_delta():
    layer = bp.embedding(5, 2)
    ids = jnp.array([[0, 4]])
    params = layer.init(key, ids[0])
    _, residuals = layer.forward(params, ids)
    dx, _ = layer.backward(params, residuals, jnp.ones((1, 2, 2)), contractions.total)
    assert dx is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_have_the_dtype_asked_for(dtype):
    layer, ids = bp.embedding(5, 2, dtype=dtype), jnp.array([[0, 4]])
    assert layer.apply(layer.init(key, ids[0]), ids).dtype == dtype


def test_norms_of_a_large_vocabulary_never_have_it_as_an_axis():
    vocabulary, features = 100_000, 8
    f = Rows(jnp.zeros((4, 16), int), jnp.zeros((4, 16, features)), vocabulary)
    norms = jax.jit(lambda f: f.squared_norm()).lower(f).compile()
    assert norms.memory_analysis().temp_size_in_bytes < vocabulary


@pytest.mark.parametrize("where", ["length", "mask"])
def test_loss_is_the_mean_over_valid_positions(where):
    """And δ^L its derivative; the target of a position that does not count may be anything."""
    a, ids = normal(0, 2, 4, 3), jnp.array([[0, 2, 1, 9], [9, 9, -1, 9]])
    valid = jnp.array([[True, True, True, False], [False] * 4])
    y = {"y": ids} | ({"mask": valid} if where == "mask" else {"length": valid.sum(1)})

    def quantities(a, y):
        value, delta = softmax_cross_entropy.value, softmax_cross_entropy.delta
        return [jax.vmap(f)(a, y) for f in (value, delta, jax.grad(value))]

    costs, delta, by_autodiff = jax.jit(quantities)(a, y)
    cost = softmax_cross_entropy.value(a[0, :3], ids[0, :3])
    perplexities = [bp.losses.perplexity(logits, y) for logits in (a, jnp.zeros_like(a))]
    check_equal(
        {"costs": costs, "δ": delta, "perplexity": perplexities},
        {
            "costs": jnp.array([cost, 0]),
            "δ": by_autodiff,
            "perplexity": [jnp.exp(cost), jnp.array(3.0)],
        },
        within=1e-12,
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (jnp.array([[0, 5]]), r"embedding\(5, 2\): takes ids from 0 to 4, got 0 to 5"),
        (jnp.array([[-1, 0]]), "takes ids from 0 to 4, got -1 to 0"),
        (jnp.array([[0.0, 1.0]]), r"takes ids as integers, got float32\(1, 2\)"),
    ],
)
def test_bad_ids_are_named(ids, message):
    layer = bp.embedding(5, 2)
    params = layer.init(key, jnp.array([0, 1]))
    with pytest.raises(bp.ModelError, match=message):
        layer.apply(params, ids)


def test_traced_ids_outside_the_vocabulary_give_nan():
    layer = bp.embedding(5, 2)
    params = layer.init(key, jnp.array([0, 1]))
    y = jax.jit(layer.apply)(params, jnp.array([[-1, 5, 2]]))
    assert jnp.isnan(y[0, :2]).all() and not jnp.isnan(y[0, 2]).any()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ({"y": jnp.zeros((2, 4), int), "length": jnp.zeros(2)}, "length, an integer"),
        ({"y": jnp.zeros((2, 4), int), "mask": jnp.zeros((2, 4))}, r"bools of shape \(4,\)"),
        ({"y": jnp.full((2, 4), 3), "length": jnp.array([4, 1])}, "class ids from 0 to 2, got 3"),
    ],
)
def test_bad_masked_targets_are_named(y, message):
    with pytest.raises(bp.ModelError, match=message):
        softmax_cross_entropy.check(jnp.zeros((2, 4, 3)), y)


def test_a_layer_on_one_entry_names_what_it_got():
    with pytest.raises(bp.ModelError, match=r"at\('x', dense\(2\)\): takes a dict .* 'x', got"):
        bp.at("x", bp.dense(2)).init(key, {"y": jnp.zeros(3)})
    with pytest.raises(bp.ModelError, match=r"entry\('x'\): takes a dict with the entry 'x'"):
        bp.entry("x").apply((), jnp.zeros((2, 3)))
