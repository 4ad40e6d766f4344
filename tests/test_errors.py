"""What does not fit is named: the layer by its place, what was given, what is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp

KEY = jax.random.key(0)
MODEL = bp.chain(bp.dense(4), bp.relu, bp.residual(bp.chain(bp.dense(4), bp.tanh)), bp.dense(3))
LOSS = bp.losses.softmax_cross_entropy
X = np.ones((5, 6), np.float32)
Y = np.array([0, 1, 2, 0, 1])
PARAMS = MODEL.init(KEY, X[0])


def grad(params=PARAMS, x=X, y=Y, model=MODEL, loss=LOSS, **options):
    return bp.grad(model, loss)(params, x, y, **options)


OTHER = bp.chain(bp.dense(4), bp.dense(3)).init(KEY, X[0])
WIDER = (bp.dense(8).init(KEY, X[0]), *PARAMS[1:])
STACK = bp.repeat(bp.dense(6), 3)
STACK_PARAMS = {"weight": np.ones((3, 6, 6), np.float32), "bias": np.ones((3, 6), np.float32)}
TIED = bp.tied(bp.chain(bp.dense(6), bp.dense(6)), {(1, "weight"): (0, "weight")})
PLACED = {
    "a wrong feature count": (lambda: grad(x=X[:, :2]), r"chain\[0\] dense\(4\):.*6.*\(2,\)"),
    "integers for numbers": (lambda: grad(x=X.astype(int)), r"chain\[0\] dense\(4\):.*int"),
    "examples without axes": (lambda: grad(x=X[:, 0]), r"chain\[0\] dense\(4\):"),
    "parameters of a shorter chain": (lambda: grad(OTHER), r"chain: .*4 layers.*got 2"),
    "parameters of a wider layer": (lambda: grad(WIDER), r"chain\[0\] dense\(4\):.*another model"),
    "no parameters": (lambda: grad(((),) * 4), r"chain\[0\] dense\(4\):.*weight.*another model"),
    "a missing bias": (
        lambda: grad(({"weight": PARAMS[0]["weight"]}, *PARAMS[1:])),
        r"chain\[0\] dense\(4\):.*bias",
    ),
    "a layer deep inside": (
        lambda: grad((*PARAMS[:2], ((OTHER[0], ()), ()), PARAMS[3])),
        r"chain\[2\] .*\[0\] chain\[0\] dense\(4\):",
    ),
    "a shortcut of another shape": (
        lambda: bp.chain(bp.relu, bp.residual(bp.dense(4))).init(KEY, X[0]),
        r"chain\[1\] residual:.*\(4,\).*\(6,\)",
    ),
    "a repeated layer that changes its input": (
        lambda: bp.chain(bp.repeat(bp.dense(4), 3)).init(KEY, X[0]),
        r"chain\[0\] repeat.*\(6,\).*\(4,\)",
    ),
    "a target with features": (lambda: grad(y=X), r"softmax_cross_entropy:.*\(3,\).*\(6,\)"),
    "class ids as floats": (lambda: grad(y=Y.astype(float)), r"softmax_cross_entropy:.*integers"),
    "class ids out of range": (lambda: grad(y=Y + 7), r"softmax_cross_entropy:.*0 to 2.*7 to 9"),
    "negative class ids": (lambda: grad(y=Y - 1), r"softmax_cross_entropy:.*-1"),
    "a target of another length": (
        lambda: grad(y=X, loss=bp.losses.squared_error),
        r"squared_error:.*\(3,\).*\(6,\)",
    ),
    "more examples than targets": (lambda: grad(y=Y[:2]), r"x and y:.*5 examples.*2 targets"),
    "an empty batch": (lambda: grad(x=X[:0], y=Y[:0]), r"x:.*at least one example"),
    "weights of another length": (lambda: grad(weights=np.ones(2)), r"weights:.*\(5,\).*\(2,\)"),
    "an odd number of gated features": (
        lambda: bp.chain(bp.dense(3), bp.glu).init(KEY, X[0]),
        r"chain\[1\] glu:.*even.*3",
    ),
    "factors that are not factored": (
        lambda: bp.testing.check_layer(
            bp.rule(
                lambda key, x: {"w": jnp.ones(3)},
                lambda p, x, key=None: (p["w"] * x, x),
                lambda p, x, dy: (p["w"] * dy, {"w": x * dy}),
                name="mine",
            ),
            jnp.ones(3),
        ),
        r"mine:.*factored",
    ),
    "a tie to nowhere": (
        lambda: bp.tied(MODEL, {(0, "weight"): (9, "weight")}).init(KEY, X[0]),
        r"tied:.*9",
    ),
    "a tie of unequal shapes": (
        lambda: bp.tied(MODEL, {(3, "weight"): (0, "weight")}).init(KEY, X[0]),
        r"tied:.*\(3, 4\).*\(4, 6\)",
    ),
    "a tree for an array": (lambda: grad(x={"x": X}), r"chain\[0\] dense\(4\):.*one array.*'x'"),
    "a list of numbers": (lambda: grad(x=X.tolist()), r"x: takes a batch.*float"),
    "targets as a list": (lambda: grad(y=Y.tolist()), r"y: takes a batch.*int"),
    "one number": (lambda: grad(x=np.float32(1)), r"x: takes a batch.*float32\(\)"),
    "too many axes for the targets": (
        lambda: grad(x=X[:, None]),
        r"softmax_cross_entropy:.*ids of shape \(1,\).*got int64\(\)",
    ),
    "one target for the whole batch": (
        lambda: grad(y=X[0, :3], loss=bp.losses.squared_error),
        r"x and y:.*5 examples.*3 targets",
    ),
    "outputs without classes": (
        lambda: bp.grad(bp.identity, LOSS)((), X[:, 0], Y),
        r"softmax_cross_entropy:.*\(\.\.\., classes\).*\(\)",
    ),
    "a tree of targets": (
        lambda: grad(y={"a": X}, loss=bp.losses.squared_error),
        r"squared_error:.*float32\(5, 3\).*'a': float32\(5, 6\)",
    ),
    "a cost that is no scalar": (
        lambda: grad(loss=bp.losses.loss(lambda a, y: a, lambda a, y: a, name="mine")),
        r"mine: .*scalar.*\(3,\)",
    ),
    "a delta of another shape": (
        lambda: grad(loss=bp.losses.loss(lambda a, y: a.sum(), lambda a, y: a.sum(), name="mine")),
        r"mine: .*delta.*\(3,\).*\(\)",
    ),
    "parameters as a list": (lambda: grad(list(PARAMS)), r"chain: .*tuple.*got list"),
    "parameters for a layer without": (
        lambda: grad((PARAMS[0], PARAMS[0], *PARAMS[2:])),
        r"chain\[1\] relu: takes no parameters.*weight.*another model",
    ),
    "integer parameters": (
        lambda: grad((jax.tree.map(lambda p: p.astype(int), PARAMS[0]), *PARAMS[1:])),
        r"chain\[0\] dense\(4\):.*floating-point.*int32",
    ),
    "a stack of another depth": (
        lambda: STACK.apply(jax.tree.map(lambda p: p[:2], STACK_PARAMS), X),
        r"repeat: .*3 layers.*float32\(2, 6\)",
    ),
    "a stack of another width": (
        lambda: STACK.apply({"weight": np.ones((3, 6, 5)), "bias": np.ones((3, 6))}, X),
        r"repeat dense\(6\):.*\(\.\.\., 5\).*\(6,\)",
    ),
    "a stack of no layers": (
        lambda: bp.repeat(bp.relu, 0),
        r"repeat: n: takes a whole number from 1, got 0",
    ),
    "parameters of the untied model": (
        lambda: TIED.apply(({"weight": np.ones((6, 6)), "bias": np.ones(6)},) * 2, X),
        r"tied: takes None at \(1, 'weight'\).*float64",
    ),
    "a tie to what is tied": (
        lambda: bp.tied(MODEL, {(1, "w"): (0, "w"), (2, "w"): (1, "w")}),
        r"tied: .*not tied themselves.*\(2, 'w'\)",
    ),
    "a tie of whole layers": (
        lambda: bp.tied(bp.chain(bp.dense(6), bp.dense(6)), {(1,): (0,)}).init(KEY, X[0]),
        r"tied: .*single parameters.*\(1,\).*weight",
    ),
    "a tie into an array": (
        lambda: bp.tied(MODEL, {(3, "weight", 0): (0, "weight")}).init(KEY, X[0]),
        r"tied: .*\(3, 'weight', 0\) does not exist",
    ),
    "a path that is no tuple": (lambda: bp.tied(MODEL, {"w": "v"}), r"tied: .*tuples.*'w'"),
    "no units": (lambda: bp.dense(0), r"dense: features: takes a whole number from 1, got 0"),
    "what is no layer": (lambda: bp.chain(bp.relu, bp.dense), r"chain\[1\]: takes a bp.Layer"),
    "an example that is a list": (
        lambda: MODEL.init(KEY, [1.0, 2.0]),
        r"chain\[0\] dense\(4\):.*one array",
    ),
    "frozen layers of another model": (
        lambda: bp.grad(MODEL, LOSS, frozen=(True, False))(PARAMS, X, Y),
        r"frozen:",
    ),
}


@pytest.mark.parametrize("given", PLACED)
def test_what_does_not_fit_is_named_with_its_place(given):
    call, message = PLACED[given]
    with pytest.raises(bp.ModelError, match=f"(?s)^{message}"):
        call()


@pytest.mark.parametrize("given", ["a wrong feature count", "parameters of a shorter chain"])
def test_it_is_named_inside_jit_and_by_autodiff_too(given):
    bad = {"a wrong feature count": (PARAMS, X[:, :2]), "parameters of a shorter chain": (OTHER, X)}
    for method in ("manual", "autodiff"):
        with pytest.raises(bp.ModelError, match=f"(?s)^{PLACED[given][1]}"):
            jax.jit(bp.grad(MODEL, LOSS, method=method))(*bad[given], Y)


ARGUMENTS = {
    "method": lambda: bp.grad(MODEL, LOSS, method="magic"),
    "max_norm": lambda: bp.clipped_grad(MODEL, LOSS, 0.0),
    "rate": lambda: bp.dropout(1.0),
    "threshold": lambda: bp.losses.huber(0.0),
    "smoothing": lambda: bp.losses.smoothed_softmax_cross_entropy(1.5),
    "microbatch": lambda: bp.grad(MODEL, LOSS, microbatch=0),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_out_of_range_is_named(argument):
    with pytest.raises(ValueError, match=argument):
        ARGUMENTS[argument]()


SEPARATE = """per_example_grads per_example_grad_norms clipped_grad grad_second_moment
    grad_variance grad_noise_scale grad_diversity grad_gram grad_dots ggnvp ggn_diagonal
    kronecker_factors"""


@pytest.mark.parametrize("quantity", SEPARATE.split())
def test_a_layer_that_mixes_examples_has_no_quantities_of_one(quantity):
    mixing = dataclasses.replace(bp.dense(3), mixes_examples=True)
    bound = (1.0,) if quantity == "clipped_grad" else ()
    with pytest.raises(bp.ModelError, match=r"mixes the examples .* use a layer that does not"):
        getattr(bp, quantity)(bp.chain(bp.relu, mixing), LOSS, *bound)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_not_above_zero_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm: takes a finite number above 0"):
        bp.clipped_grad(MODEL, LOSS, max_norm)


def test_an_error_inside_a_users_rule_says_where_it_was():
    broken = bp.rule(
        lambda key, x: (),
        lambda params, x, key=None: (x @ jnp.ones((99, 1)), x),
        lambda params, x, dy: (dy, ()),
        name="broken",
    )
    with pytest.raises(TypeError) as raised:
        bp.chain(bp.relu, broken).apply(((), ()), X)
    assert [note for note in raised.value.__notes__ if "broken" in note]
    assert [note for note in raised.value.__notes__ if "chain[1]" in note]


def test_what_is_not_a_layer_or_a_loss_is_named():
    model, loss = bp.dense(2), bp.losses.squared_error
    for given in ((loss, model), (model, lambda a, y: 0.0)):
        with pytest.raises(bp.ModelError, match="takes a layer and a loss"):
            bp.value_and_grad(*given)
    with pytest.raises(bp.ModelError, match="relu: is a layer, not a function"):
        bp.relu()
    for layer in (lambda: bp.dense(2.5), lambda: bp.repeat(model, 2.0)):
        with pytest.raises(bp.ModelError, match="takes a whole number from 1"):
            layer()


@pytest.mark.parametrize(
    "around",
    [
        lambda layer: bp.chain(layer),
        lambda layer: bp.parallel(bp.relu, layer),
        lambda layer: bp.residual(layer),
        lambda layer: bp.repeat(layer, 2),
        lambda layer: bp.tied(layer, {}),
        lambda layer: bp.at("x", layer),
        lambda layer: bp.bidirectional(layer, layer),
        lambda layer: bp.bidirectional(bp.lstm(2), layer),
    ],
)
def test_what_is_built_around_a_layer_that_mixes_examples_mixes_them(around):
    mixing = dataclasses.replace(bp.lstm(2), mixes_examples=True)
    assert around(mixing).mixes_examples
    assert not around(bp.lstm(2)).mixes_examples
