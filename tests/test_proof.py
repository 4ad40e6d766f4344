"""The proof itself: it catches every fault planted in a rule, a combinator, a class of factors, a
loss or a quantity, and says where."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import ACTIVATIONS, COMBINED, LAYERS, LOSSES, OF_FUNCTIONS, RULES, VECTOR

import functional_bp as bp
from functional_bp.contractions import contract_factors, is_factor, keep
from functional_bp.factors import (
    Factored,
    Itself,
    Outer,
    Rows,
    SoftmaxOuter,
    Stacked,
    Sum,
    Summed,
)
from functional_bp.factors.along import Along
from functional_bp.factors.arranged import Arranged, Part
from functional_bp.factors.convolved import Convolved
from functional_bp.testing import check_layer, check_model

# ---- faults in rules --------------------------------------------------------------------------


def planted(layer, fault):
    """The layer with a wrong ``backward``: ``fault(backward)``, up to the contraction."""
    faulty = fault(layer.backward)

    def backward(params, residuals, dy, contract=keep):
        dx, factors = faulty(params, residuals, dy)
        return dx, contract_factors(contract, factors)

    return dataclasses.replace(layer, backward=backward)


def is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def every_array(change):
    return lambda dx: jax.tree.map(change, dx)


def of_input(change):
    """A fault that changes ∂C/∂x."""

    def fault(backward):
        def faulty(params, residuals, dy):
            dx, factors = backward(params, residuals, dy)
            return change(dx), factors

        return faulty

    return fault


def of_factor(name, change):
    """A fault that changes one parameter's factors."""

    def fault(backward):
        def faulty(params, residuals, dy):
            dx, factors = backward(params, residuals, dy)
            return dx, {**factors, name: change(factors[name])}

        return faulty

    return fault


def first_array(change):
    """Changes the first of a factor's arrays of floating-point numbers."""

    def changed(factor):
        leaves, structure = jax.tree.flatten(factor)
        first = next(i for i, leaf in enumerate(leaves) if is_float(leaf))
        leaves[first] = change(leaves[first])
        return jax.tree.unflatten(structure, leaves)

    return changed


def a_step_late(factor):
    """h_{t+1} for h_t, in a factor whose v are the states before each step."""
    return Outer(factor.u, jnp.roll(factor.v, -1, -2))


def parameters(layer, x):
    """The shapes of those that are trained."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return {k: shapes[k] for k in shapes if not layer.is_state(shapes)[k]} if shapes else shapes


FAULTS = {
    **{
        f"{name}: {what} ∂C/∂x": (name, of_input(every_array(change)))
        for name, (_, x) in RULES.items()
        if any(map(is_float, jax.tree.leaves(x)))
        for what, change in {"negative": jnp.negative, "no": jnp.zeros_like}.items()
    },
    **{
        f"{name}: {what} ∂C/∂{p}": (name, of_factor(p, first_array(change)))
        for name, (layer, x) in RULES.items()
        for p in parameters(layer, x)
        for what, change in {"negative": jnp.negative, "half of": lambda a: a / 2}.items()
    },
    **{
        f"{name}: no σ′": (name, lambda backward: lambda params, residuals, da: (da, ()))
        for name, layer in ACTIVATIONS.items()
        if not name.endswith("glu")  # their δ has half as many numbers as their input
    },
    **{
        f"{name}: the gate's gradient for the other's": (
            name,
            of_input(lambda dz: jnp.roll(dz, dz.shape[-1] // 2, -1)),
        )
        for name in ACTIVATIONS
        if name.endswith("glu")
    },
    "flatten: numbers in the wrong order": ("flatten", of_input(lambda dx: dx[..., ::-1])),
    "dense: W for Wᵀ": (
        "dense",
        lambda backward: (
            lambda params, a, delta: backward({**params, "weight": params["weight"].T}, a, delta)
        ),
    ),
    "dense: a δᵀ for δ aᵀ": ("dense", of_factor("weight", lambda f: Outer(f.v, f.u))),
    "dense: one position's weight gradient": (
        "dense at positions",
        of_factor("weight", lambda f: Outer(f.u[..., :1, :], f.v[..., :1, :])),
    ),
    "dense: one position's bias gradient": (
        "dense at positions",
        of_factor("bias", lambda f: Summed(f.g[..., :1, :])),
    ),
    "dense: δ of one position, a of the other": (
        "dense at positions",
        of_factor("weight", lambda f: Outer(f.u[..., ::-1, :], f.v)),
    ),
    "dense: the mean over positions": (
        "dense at positions",
        of_factor("weight", lambda f: Outer(f.u / 2, f.v)),
    ),
    "embedding: δ of the next position": (
        "embedding",
        of_factor("weight", lambda f: Rows(f.ids, jnp.roll(f.v, 1, -2), f.rows)),
    ),
    "rnn: h_t for h_{t−1}": ("rnn", of_factor("weight_h", a_step_late)),
    "concatenate: the parts exchanged": (
        "concatenate positions",
        of_input(lambda dx: (dx[1], dx[0])),
    ),
    "multiply: the last factor for each": ("multiply", of_input(lambda dx: (dx[2],) * 3)),
}


def once_more(fault):
    """Whether another fault in the same place shows as much."""
    return ": no ∂C" in fault or ": half of" in fault


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.exhaustive) if once_more(fault) else fault
        for fault in FAULTS
    ],
)
def test_a_fault_in_a_rule_is_caught(fault):
    name, plant = FAULTS[fault]
    layer, x = RULES[name]
    with pytest.raises(AssertionError, match=re.escape(layer.name)):
        check_layer(planted(layer, plant), x)


# ---- faults in combinators, in factors, in losses, in what users call ---------------------------


def combined(layer, faulty):
    """A combinator with a wrong ``backward``."""

    def backward(params, residuals, dy, contract=keep):
        return faulty(layer, params, residuals, dy, contract)

    return dataclasses.replace(layer, backward=backward)


def without_the_shortcut(layer, params, residuals, dy, contract):
    dx, results = layer.backward(params, residuals, dy, contract)
    return dx - dy, results


def layers_in_the_wrong_order(layer, params, residuals, dy, contract):
    swapped = jax.tree.map(lambda p: p[::-1], params)
    return layer.backward(swapped, residuals, dy, contract)


def ends_exchanged(layer, params, residuals, dy, contract):
    return layer.backward((params[2], params[1], params[0]), residuals, dy, contract)


@pytest.mark.parametrize(
    ("layer", "faulty"),
    [
        (COMBINED["residual"][0], without_the_shortcut),
        (bp.repeat(bp.dense(4), 2), layers_in_the_wrong_order),
        (bp.chain(bp.dense(4), bp.tanh, bp.dense(4)), ends_exchanged),
    ],
)
def test_a_fault_in_a_combinator_is_caught(layer, faulty):
    with pytest.raises(AssertionError, match="gradient"):
        check_layer(combined(layer, faulty), VECTOR)


def methods(kind):
    """The public methods that a class of factors defines itself."""
    return [n for n, f in vars(kind).items() if n[0] != "_" and inspect.isfunction(f)]


METHODS = methods(Factored)
MET_IN = {
    Factored: ["a user's factors"],
    Itself: ["a user's rule"],
    Summed: ["dense at positions"],
    # Vectors without positions; few positions; so many that gₙ is cheaper multiplied out.
    Outer: ["dense", "dense at positions", "dense to one at positions"],
    Rows: ["embedding"],
    Sum: ["tied"],
    Stacked: ["repeat"],
    Arranged: ["a kernel"],
    Part: ["blocks"],
    Convolved: ["a convolution"],
    Along: ["decayed"],
    SoftmaxOuter: ["a vocabulary"],
}
OWN = {
    (Factored, "each"),  # what every class must bring
    (Factored, "scaled"),
    (Factored, "as_outer"),  # None: few factors are outer products
    (Arranged, "total"),  # a function's totals are autodiff's
    (Part, "total"),
    (Along, "total"),
}


def test_every_class_of_factors_and_every_method_is_in_the_lists():
    """A new class, or a method of one alone, has faults planted in it too."""
    modules = [bp.factors, *(m for m in vars(bp.factors).values() if inspect.ismodule(m))]
    classes = {c for m in modules for c in vars(m).values() if inspect.isclass(c)}
    assert set(MET_IN) == {c for c in classes if issubclass(c, Factored)}
    for kind in MET_IN:
        assert set(methods(kind)) <= set(METHODS), kind


def same(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()


def prove(name):
    """The proof of a layer, and what its factors say of themselves that no contraction asks."""
    layer, x = (LAYERS | OF_FUNCTIONS)[name]
    check_layer(layer, x)
    draw = np.random.default_rng(0)

    def drawn(leaf, *axes):
        if is_float(leaf):
            return jnp.asarray(draw.normal(size=(*axes, *leaf.shape)))
        return jnp.broadcast_to(leaf, (*axes, *leaf.shape))

    with jax.enable_x64(True), jax.disable_jit():
        params = jax.tree.map(drawn, jax.eval_shape(layer.init, jax.random.key(0), x))
        y, residuals = layer.forward(params, jax.tree.map(lambda leaf: drawn(leaf, 3), x))
        _, factors = layer.backward(params, residuals, jax.tree.map(drawn, y))
        for factor in jax.tree.leaves(factors, is_leaf=is_factor):
            each, outer = factor.each(), factor.as_outer()
            last = each.shape[-1] - 1
            same(factor.columns(last, 1).each(), each[..., last:])
            same(factor.examples(1, 2).each(), each[1:])
            same(factor.second_moment(), (each**2).mean(0))  # a stack's is asked of its layers
            if outer is not None:
                same(outer.each().reshape(each.shape), each)


@pytest.mark.parametrize("name", dict.fromkeys(n for names in MET_IN.values() for n in names))
def test_factors_in_another_form_are_the_same_gradients(name):
    prove(name)


@pytest.mark.parametrize(
    ("kind", "method", "name"),
    [
        (kind, method, name)
        for kind, names in MET_IN.items()
        for method in METHODS
        if method in vars(kind) and (kind, method) not in OWN
        for name in names
    ],
)
def test_a_fault_in_factors_is_caught(monkeypatch, kind, method, name):
    right = getattr(kind, method)

    def off(leaf):
        return leaf * 1.0001 if is_float(leaf) else leaf

    monkeypatch.setattr(kind, method, lambda *args: jax.tree.map(off, right(*args)))
    with pytest.raises(AssertionError):
        prove(name)


def test_a_dropped_cross_term_of_a_tied_parameter_is_caught(monkeypatch):
    monkeypatch.setattr(
        Sum, "inner", lambda f, g: sum(a.inner(b) for a, b in zip(f.parts, g.parts))
    )
    with pytest.raises(AssertionError, match=r"squared_norm, leaf \[0\]\['weight'\]"):
        check_layer(*LAYERS["tied"])


def test_a_dropped_use_of_a_tied_parameter_is_caught(monkeypatch):
    monkeypatch.setattr(Sum, "total", lambda f: f.parts[0].total())
    with pytest.raises(AssertionError, match="keep, then total"):
        check_layer(*LAYERS["tied"])


X = np.random.default_rng(0).normal(size=(3, 4))


def dense_params():
    return {"weight": np.zeros((4, 4)), "bias": np.zeros(4)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "change", [jnp.negative, lambda d: d / 2, jnp.zeros_like], ids=["negative", "half", "zero"]
)
def test_a_fault_in_a_loss_is_caught(name, change):
    loss, y = LOSSES[name]
    wrong = dataclasses.replace(loss, delta=lambda a, y: change(loss.delta(a, y)))
    with pytest.raises(AssertionError, match=r"dense\(4\): grad"):
        check_model(bp.dense(4), wrong, dense_params(), X, y)


@pytest.mark.parametrize(
    "quantity",
    ["value_and_grad", "clipped_grad", "per_example_grads", "per_example_grad_norms", "deltas"],
)
def test_a_fault_in_a_quantity_is_caught(monkeypatch, quantity):
    right = getattr(bp.testing.models, quantity)

    def wrong(*args):
        return lambda *a, **kw: jax.tree.map(lambda q: q * 1.0001, right(*args)(*a, **kw))

    monkeypatch.setattr(bp.testing.models, quantity, wrong)
    with pytest.raises(AssertionError, match=quantity.removesuffix("_and_grad")):
        check_model(bp.dense(4), *of_loss("squared_error"))


@pytest.mark.parametrize("quantity", ["value_and_grad", "clipped_grad"])
def test_ignored_weights_are_caught(monkeypatch, quantity):
    right = getattr(bp.testing.models, quantity)

    def unweighted(*args):
        return lambda params, x, y, *, weights, key: right(*args)(params, x, y, key=key)

    monkeypatch.setattr(bp.testing.models, quantity, unweighted)
    with pytest.raises(AssertionError, match="with weights"):
        check_model(bp.dense(4), *of_loss("squared_error"))


def of_loss(name):
    """What ``check_model`` takes after the model, for a dense layer of four units."""
    loss, y = LOSSES[name]
    return loss, dense_params(), X, y


# ---- what the proof takes and says --------------------------------------------------------------


def test_a_failure_names_the_layer_the_leaf_the_error_and_where_it_is():
    layer = bp.chain(bp.dense(4), planted(bp.dense(4), of_factor("bias", first_array(second_off))))
    with pytest.raises(AssertionError) as failure:
        check_layer(layer, VECTOR)
    assert re.fullmatch(
        r"chain\(dense\(4\), dense\(4\)\): total, leaf \[1\]\['bias'\]: "
        r"relative error [\d.e-]+, at most 1e-12; largest at \(1,\): "
        r"[-\d.e]+ by hand, [-\d.e]+ wanted",
        str(failure.value),
    )


def second_off(g):
    return g.at[..., 1].add(1e-3)


def test_an_error_where_the_gradient_is_zero_is_absolute():
    layer = planted(bp.activation(jnp.zeros_like, jnp.zeros_like, name="zero"), of_input(one_more))
    with pytest.raises(AssertionError, match="absolute error 1,"):
        check_layer(layer, VECTOR)


def one_more(dx):
    return dx + 1


def test_nan_is_an_error():
    layer = planted(bp.tanh, of_input(lambda dx: dx * jnp.nan))
    with pytest.raises(AssertionError, match="nan by hand"):
        check_layer(layer, VECTOR)


def test_a_number_widened_to_float64_is_caught():
    widening = bp.rule(
        bp.identity.init,
        lambda params, x, key=None: (x, ()),
        lambda params, residuals, dy: (dy * np.float64(1), ()),
        name="widening",
    )
    check_layer(widening, VECTOR)
    with pytest.raises(AssertionError, match="float64 by hand, float32 was given"):
        check_layer(widening, VECTOR, dtype="float32")


def test_a_layer_that_jit_would_refuse_is_caught():
    def forward(params, x, key=None):
        return (x if float(x.sum()) < jnp.inf else 2 * x), ()

    branching = bp.rule(bp.identity.init, forward, lambda params, r, dy: (dy, ()), batched=True)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        check_layer(branching, VECTOR)


def power():
    """y = s ⊙ x^n for a tree of x and an integer n, which y passes on."""

    def forward(params, inputs, key=None):
        x, n = inputs["x"], inputs["n"]
        return {"x": params["s"] * x**n, "n": n}, (x, n)

    def backward(params, residuals, dy):
        x, n = residuals
        dx = params["s"] * n * x ** (n - 1) * dy["x"]
        return {"x": dx, "n": None}, {"s": Itself(x**n * dy["x"])}

    return bp.rule(lambda key, x: {"s": jnp.ones(x["x"].shape)}, forward, backward, name="power")


def test_trees_and_integers_are_proven_at_the_integers_given():
    x = {"x": VECTOR, "n": jnp.array(3)}
    check_layer(power(), x)
    check_layer(bp.chain(power(), power()), x)
    with pytest.raises(AssertionError, match="input gradient, leaf \\['x'\\]"):
        check_layer(planted(power(), of_input(lambda dx: {**dx, "x": -dx["x"]})), x)
    with pytest.raises(AssertionError, match="input gradient, leaf \\['x'\\] is missing"):
        check_layer(planted(power(), of_input(lambda dx: {**dx, "x": None})), x)


def centred(sign=1, said=True):
    """y = x − mean of the batch: a layer that mixes examples."""

    def centre(x):
        return x - x.mean(0)

    return bp.rule(
        bp.identity.init,
        lambda params, x, key=None: (centre(x), ()),
        lambda params, residuals, dy: (sign * centre(dy), ()),
        name="centred",
        batched=True,
        mixes_examples=said,
    )


def test_a_layer_that_mixes_examples_is_proven_over_a_batch():
    check_layer(bp.chain(bp.dense(4), centred()), VECTOR)
    check_model(centred(), LOSSES["squared_error"][0], (), X, X + 1)
    with pytest.raises(AssertionError, match="centred: input gradient"):
        check_layer(centred(sign=-1), VECTOR)


def test_a_layer_that_mixes_examples_unsaid_is_caught():
    with pytest.raises(AssertionError, match=r"centred: .*say mixes_examples"):
        check_layer(centred(said=False), VECTOR)


def test_a_backward_that_mixes_examples_is_caught():
    layer = planted(bp.dense(4), of_factor("bias", first_array(lambda g: g[::-1])))
    with pytest.raises(AssertionError, match="each, leaf"):
        check_layer(layer, VECTOR)


def test_the_reference_is_what_a_rule_is_proven_against():
    """A loop with a dynamic bound has no vjp; its textbook formula has."""

    def forward(params, x, key=None):
        steps = jnp.array(3)
        return jax.lax.while_loop(
            lambda s: s[0] < steps, lambda s: (s[0] + 1, s[1] * x), (0, jnp.ones_like(x))
        )[1], x

    def cube(reference):
        return bp.rule(
            bp.identity.init,
            forward,
            lambda params, x, dy: (3 * x**2 * dy, ()),
            reference=reference,
            name="cube",
        )

    check_layer(cube(lambda params, x, key=None: x**3), VECTOR)
    with pytest.raises(AssertionError, match="cube: output"):
        check_layer(cube(lambda params, x, key=None: x**2), VECTOR)


def test_the_proof_changes_no_global_setting():
    check_layer(bp.tanh, VECTOR)
    with pytest.raises(AssertionError):
        check_layer(planted(bp.tanh, of_input(jnp.negative)), VECTOR)
    assert jnp.ones(1, float).dtype == jnp.float32
    assert not jax.config.jax_disable_jit


def test_a_layer_that_says_elementwise_is():
    summed = bp.rule(
        init=lambda key, x: (),
        forward=lambda params, x, key=None: (jnp.cumsum(x), ()),
        backward=lambda params, residuals, dy: (jnp.cumsum(dy[::-1])[::-1], ()),
        name="cumsum",
    )
    bp.testing.check_layer(summed, jnp.ones(3))
    with pytest.raises(AssertionError, match=r"cumsum: .*is it elementwise"):
        bp.testing.check_layer(dataclasses.replace(summed, elementwise=True), jnp.ones(3))
