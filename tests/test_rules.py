"""Every layer against two oracles: autodiff of its textbook form, and central differences."""

import functools
import inspect
import math
import runpy
import typing

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from layers import COMBINED, LAYERS, LOSSES, RANDOM, RULES

import functional_bp as bp
from functional_bp import contractions

KEY = jax.random.key(1)


@pytest.mark.parametrize("name", LAYERS)
def test_backward_equals_autodiff_in_float64(name):
    bp.testing.check_layer(*LAYERS[name])


# In float32 every operation is compiled once more; what is special to it shows in these.
OFTEN = ("dense", "dense at positions", "gelu", "softmax", "embedding", "residual", "tied")
SELDOM = [name for name in (*RULES, "bidirectional", "at an entry") if name not in OFTEN]


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SELDOM)]
)
def test_backward_equals_autodiff_in_float32(name):
    bp.testing.check_layer(*LAYERS[name], dtype="float32")


@pytest.mark.parametrize("name", ["gelu", "tied"])
def test_backward_is_close_to_autodiff_in_bfloat16(name):
    """To the few of bfloat16's 8 bits that both sides have left."""
    bp.testing.check_layer(*LAYERS[name], dtype="bfloat16", tolerance=0.05)


@pytest.mark.parametrize("name", RANDOM)
def test_random_backward_equals_autodiff(name):
    bp.testing.check_layer(*RANDOM[name])
    bp.testing.check_layer(*RANDOM[name], key=KEY)


@pytest.mark.parametrize("name", LAYERS | RANDOM)
def test_backward_equals_central_differences(name):
    """⟨∇f, d⟩ ≈ (f(θ + h d) − f(θ − h d)) / 2h along random directions d, for
    f = Σ_n ⟨y_n, δ_n⟩ over a batch: an oracle that shares nothing with autodiff."""
    layer, x = (LAYERS | RANDOM)[name]
    key = KEY if name in RANDOM else None
    draw = np.random.default_rng(0)

    def batch_like(leaf):
        """Three examples: floats drawn, integers as they are."""
        if is_float(leaf):
            return jnp.asarray(draw.normal(size=(3, *leaf.shape)))
        return jnp.broadcast_to(leaf, (3, *jnp.shape(leaf)))

    def normal_like(leaf):
        return jnp.asarray(draw.normal(size=leaf.shape)) if is_float(leaf) else None

    with jax.enable_x64(True), jax.disable_jit():
        params = jax.tree.map(normal_like, jax.eval_shape(layer.init, KEY, x))
        is_state = layer.is_state(params)
        params = jax.tree.map(lambda s, p: abs(p) if s else p, is_state, params)  # a variance is
        xs = jax.tree.map(batch_like, x)
        y, residuals = layer.forward(params, xs, key)
        dy = jax.tree.map(normal_like, y)
        dx, gradient = layer.backward(params, residuals, dy, contractions.total)

        def f(leaves):
            learned, xs = jax.tree.unflatten(structure, leaves)
            y, _ = layer.forward(bp.merged(learned, params), xs, key)
            return inner(floats(y), floats(dy))

        leaves, structure = jax.tree.flatten((bp.trainable(params, is_state), xs))
        places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
        whole = math.sqrt(sum(np.linalg.norm(g) ** 2 for g in floats((gradient, dx))))
        for i, gradient_i in zip(places, floats((gradient, dx)), strict=True):
            for _ in range(2):
                direction, h = draw.normal(size=leaves[i].shape), 1e-5
                above, below = (
                    f([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]])
                    for step in (h, -h)
                )
                size = np.linalg.norm(gradient_i)
                if size <= 1e-12 * whole:  # 0 but for rounding, as of a key's bias in attention
                    size = whole
                scale = size * np.linalg.norm(direction)
                error = inner([gradient_i], [direction]) - (above - below) / (2 * h)
                # h² of the next term of the series, and 1e-16 / h of rounding, with some room.
                assert abs(error) <= 1e-8 * scale


def is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def inner(a, b):
    return sum(np.vdot(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RANDOM)
def test_what_a_random_layer_gives_depends_on_its_key(name):
    layer, x = RANDOM[name]
    with jax.disable_jit():
        params = jax.tree.map(lambda p: jnp.ones(p.shape), jax.eval_shape(layer.init, KEY, x))
        xs = jax.tree.map(lambda leaf: jnp.ones((3, *jnp.shape(leaf)), jnp.result_type(leaf)), x)
        without, one, other = (
            jnp.concatenate([leaf.ravel() for leaf in floats(layer.apply(params, xs, key))])
            for key in (None, KEY, jax.random.key(2))
        )
    assert not jnp.array_equal(without, one)
    assert not jnp.array_equal(one, other)


# ---- in bfloat16 ------------------------------------------------------------------------------

ADDING = {"dot_general", "conv_general_dilated", "reduce_sum", "scatter-add", "cumsum"}


def operations(jaxpr):
    """Every operation of a traced function, those inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inside in jaxprs_in_params(equation.params):
            yield from operations(inside)


OF_FUNCTIONS = ("a function", "a Flax module")  # whose own sums run as they say


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in OF_FUNCTIONS])
def test_sums_of_bfloat16_run_in_float32(name):
    """As the program says it: what a CPU computes would not show it, for there a product of
    bfloat16 is summed in float32 whatever it is asked for."""
    layer, x = LAYERS[name]

    def low(leaf, *axes):
        dtype = jnp.bfloat16 if is_float(leaf) else jnp.result_type(leaf)
        return jax.ShapeDtypeStruct((*axes, *jnp.shape(leaf)), dtype)

    params = jax.tree.map(low, jax.eval_shape(layer.init, KEY, x))
    xs = jax.tree.map(lambda leaf: low(leaf, 3), x)

    def there_and_back(params, xs):
        y, residuals = layer.forward(params, xs)
        dy = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, y)
        asked = (contractions.total, contractions.each, contractions.squared_norm)
        return y, [layer.backward(params, residuals, dy, c) for c in asked]

    found, (y, results) = jax.make_jaxpr(there_and_back, return_shape=True)(params, xs)
    for operation in operations(found.jaxpr):
        if operation.primitive.name in ADDING:
            assert jnp.bfloat16 not in [v.aval.dtype for v in operation.outvars], operation
    given_back = floats(y) + [leaf for dx, _ in results for leaf in floats(dx)]
    assert {leaf.dtype for leaf in given_back} == {jnp.dtype("bfloat16")}


# ---- what is in the lists ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS | RANDOM)
def test_no_rule_promotes_a_dtype_or_a_rank(name):
    """So that it works where a user has JAX refuse both."""
    layer, x = (LAYERS | RANDOM)[name]
    params = layer.init(KEY, x)
    xs = jax.tree.map(lambda leaf: jnp.zeros((3, *np.shape(leaf)), leaf_dtype(leaf)), x)
    key = KEY if name in RANDOM else None

    def there_and_back(params, xs, contract):
        y, residuals = layer.forward(params, xs, key)
        dy = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, y)
        return layer.backward(params, residuals, dy, contract)

    asked = ("total", "each", "squared_norm", "squared_norms", "gram", "second_moment")
    contracts = [getattr(contractions, name) for name in asked]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for contract in (*contracts, jax.tree.map(contractions.dot, params)):
            jax.eval_shape(there_and_back, params, xs, contract)


def leaf_dtype(leaf):
    return jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", np.asarray(leaf).dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_no_quantity_promotes_a_dtype_or_a_rank(name):
    loss, y = LOSSES[name]
    model = bp.chain(bp.dense(4), bp.tanh, bp.repeat(bp.dense(4), 2))
    x = jnp.ones((3, 4))
    params = model.init(KEY, x[0])
    asked = {
        "by hand": bp.value_and_grad(model, loss),
        "by autodiff": bp.value_and_grad(model, loss, method="autodiff"),
        "in microbatches": bp.value_and_grad(model, loss, microbatch=2),
        "clipped": bp.clipped_grad(model, loss, 1.0, has_aux=True),
        "clipped by layer": bp.clipped_grad(model, loss, 1.0, per="layer"),
        "variance": bp.grad_variance(model, loss),
        "noise scale": bp.grad_noise_scale(model, loss),
        "Gram": bp.grad_gram(model, loss),
        "deltas": bp.deltas(model, loss),
        "Kronecker": bp.kronecker_factors(model, loss, shared="reduce"),
    }
    along = {"dots": bp.grad_dots, "Hessian": bp.hvp, "Gauss–Newton": bp.ggnvp}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for quantity in asked.values():
            jax.eval_shape(quantity, params, x, jnp.asarray(y))
        for quantity in along.values():
            jax.eval_shape(quantity(model, loss), params, x, jnp.asarray(y), params)
        if loss.sample is not None:
            diagonal = functools.partial(bp.ggn_diagonal(model, loss, samples=2), key=KEY)
            jax.eval_shape(diagonal, params, x, jnp.asarray(y))


def makers(module, kind):
    """The public functions of a module that return a layer or a loss, by name."""
    functions = {n: f for n, f in vars(module).items() if n[0] != "_" and inspect.isfunction(f)}

    def returned(function):
        function = inspect.unwrap(function)
        forms = typing.get_overloads(function) or [function]
        return [typing.get_type_hints(form).get("return") for form in forms]

    def makes(function):
        return any(inspect.isclass(r) and issubclass(r, kind) for r in returned(function))

    return {name: function for name, function in functions.items() if makes(function)}


def values(module, kind):
    """The public layers or losses of a module, by name."""
    return {n: v for n, v in vars(module).items() if n[0] != "_" and isinstance(v, kind)}


@pytest.fixture
def made(monkeypatch):
    """The lists of tests/layers.py made anew, and for each layer and loss which public function
    made it."""
    names = {}

    def noting(name, function):
        def noted(*args, **options):
            result = function(*args, **options)
            names[result] = name
            return result

        return noted

    for module, kind in ((bp, bp.Layer), (bp.losses, bp.losses.Loss)):
        for name, function in makers(module, kind).items():
            monkeypatch.setattr(module, name, noting(name, function))
    lists = runpy.run_path(layers.__file__)
    monkeypatch.undo()
    return lists, names


def with_parts(listed):
    """The layers of a list, and all that they are made of."""
    found = [layer for layer, _ in listed.values()]
    for layer in found:
        found.extend(layer.parts)
    return found


def test_every_public_layer_is_in_the_lists(made):
    """A new layer is proven because it is in a list: tests/layers.py says in which."""
    lists, names = made
    listed = with_parts(lists["RULES"] | lists["COMBINED"] | lists["RANDOM"])
    assert {n for n, v in values(bp, bp.Layer).items() if v not in listed} == set()
    assert set(makers(bp, bp.Layer)) - {names.get(layer) for layer in listed} == set()


def test_every_public_loss_is_in_the_list(made):
    lists, names = made
    listed = [loss for loss, _ in lists["LOSSES"].values()]
    assert {n for n, v in values(bp.losses, bp.losses.Loss).items() if v not in listed} == set()
    with_parameters = {"linear_softmax_cross_entropy"}  # in tests/test_vocabulary.py
    made_by = {names.get(loss) for loss in listed} | with_parameters
    assert set(makers(bp.losses, bp.losses.Loss)) - made_by == set()


def test_every_combinator_is_proven_around_a_random_layer(made):
    lists, names = made
    combinators = {names.get(layer) for layer in with_parts(lists["COMBINED"]) if layer.parts}
    assert combinators >= {"chain", "residual", "parallel", "repeat", "tied"}
    assert combinators - {names.get(layer) for layer in with_parts(lists["RANDOM"])} == set()


def test_rules_are_no_combinations_and_combinations_are():
    assert not any(layer.parts for layer, _ in RULES.values())
    assert all(layer.parts for layer, _ in COMBINED.values())
