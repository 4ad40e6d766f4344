"""What does not fit is named: the layer by its place, what was given, what is taken."""

import dataclasses
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
SEQUENCE = {"x": np.ones((5, 3), np.float32), "length": np.int32(2)}
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
    "a dict for ids": (
        lambda: bp.chain(bp.embedding(4, 2), bp.lstm(3)).init(KEY, {"x": Y, "length": Y[0]}),
        r"chain\[0\] embedding\(4, 2\): takes one array, got .*'length'.*bp\.at\(\"x\", …\)",
    ),
    "a sequence's dict for an array": (
        lambda: bp.chain(bp.lstm(3), bp.dense(2)).init(KEY, SEQUENCE),
        r"chain\[1\] dense\(2\): takes one array, got .*'length'.*bp\.entry\(\"x\"\)",
    ),
    "a sequence's dict for an array, deep inside": (
        lambda: bp.chain(bp.lstm(6), bp.repeat(bp.residual(bp.dense(6)), 2)).init(KEY, SEQUENCE),
        r"chain\[1\] repeat residual\[0\] dense\(6\): takes one array.*bp\.entry\(\"x\"\)",
    ),
    "a sequence's dict for a loss": (
        lambda: bp.grad(bp.identity, bp.losses.squared_error)((), {"x": X, "length": Y}, X),
        r"squared_error: takes one array of outputs.*bp\.entry\(\"x\"\)",
    ),
    "a tuple for an array": (
        lambda: bp.chain(bp.parallel(bp.relu, bp.tanh), bp.dense(2)).init(KEY, X[0]),
        r"chain\[1\] dense\(2\): takes one array.*bp\.concatenate\(\)",
    ),
    "one class": (
        lambda: bp.grad(bp.dense(1), LOSS)(bp.dense(1).init(KEY, X[0]), X, Y * 0),
        r"softmax_cross_entropy: takes .*two classes or more, got \(1,\).*sigmoid_cross_entropy",
    ),
    "one class, smoothed": (
        lambda: bp.grad(bp.identity, bp.losses.smoothed_softmax_cross_entropy(0.1))(
            (), X[:, :1], Y * 0
        ),
        r"smoothed_softmax_cross_entropy\(0.1\): takes .*two classes or more, got \(1,\)",
    ),
    "one class's probabilities": (
        lambda: bp.grad(bp.identity, bp.losses.kl_divergence)((), X[:, :1], X[:, :1]),
        r"kl_divergence: takes .*two classes or more, got \(1,\)",
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


FLAX = bp.from_flax(flax.linen.Dense(2))
PLAIN = bp.from_function(
    lambda w, x: w @ x, init=lambda key, x: jax.random.normal(key, (2, *x.shape)), name="plain"
)
ONE_EXAMPLE = {
    "a vector": (MODEL, X[0], "float32(n, 6)"),
    "a sequence": (bp.lstm(3), SEQUENCE["x"], "float32(n, 5, 3)"),
    "a dict": (bp.lstm(3), SEQUENCE, "{'length': int32(n), 'x': float32(n, 5, 3)}"),
    "an id": (bp.embedding(4, 2), np.int32(1), "int32(n)"),
    "ids": (bp.chain(bp.embedding(4, 2), bp.lstm(3)), np.array([1, 2], np.int32), "int32(n, 2)"),
    "of a function": (PLAIN, X[0], "float32(n, 6)"),
    "of Flax": (FLAX, X[0], "float32(n, 6)"),
}


@pytest.mark.parametrize("given", ONE_EXAMPLE)
def test_one_example_in_place_of_a_batch_is_named_as_such(given):
    model, x, batch = ONE_EXAMPLE[given]
    taken = re.escape(f"as one example x fits: apply takes a batch, {batch}, and ")
    with pytest.raises(bp.ModelError, match=f"takes .*, got .*; {taken}.* is a batch of one$"):
        model.apply(model.init(KEY, x), x)


def test_a_batch_that_would_not_fit_as_one_example_either_is_not_called_one():
    with pytest.raises(bp.ModelError) as error:
        MODEL.apply(PARAMS, X[:, :2])
    assert "one example" not in str(error.value)


def test_a_batch_of_one_made_as_the_message_says_is_taken():
    model, x, _ = ONE_EXAMPLE["a dict"]
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], x)
    assert model.apply(model.init(KEY, x), batch)["x"].shape == (1, 5, 3)


TAKES_KEY = {
    "init": lambda key: MODEL.init(key, X[0]),
    "init of a layer": lambda key: bp.dense(2).init(key, X[0]),
    "init of a function": lambda key: PLAIN.init(key, X[0]),
    "init of Flax": lambda key: FLAX.init(key, X[0]),
    "init with a loss": lambda key: bp.init(MODEL, LOSS, key, X[0], Y[0]),
    "apply": lambda key: MODEL.apply(PARAMS, X, key),
    "grad": lambda key: grad(key=key),
    "norms": lambda key: bp.per_example_grad_norms(MODEL, LOSS)(PARAMS, X, Y, key=key),
    "fit": lambda key: bp.fit(MODEL, LOSS, PARAMS, [(X, Y)], optax.sgd(0.1), epochs=1, key=key),
}


@pytest.mark.parametrize("where", TAKES_KEY)
@pytest.mark.parametrize("bad", [0, "seed", np.array([0, 1]), X])
def test_a_seed_in_place_of_a_key_is_named(where, bad):
    with pytest.raises(bp.ModelError, match=r"key: takes one key .*, got .*; jax.random.key\(0\)"):
        TAKES_KEY[where](bad)


CALLS = {
    "an unknown option": (
        lambda: bp.lstm(3, dropout=0.1),
        r"lstm: takes hidden, output, reverse, .*checkpoint: .*'dropout'",
    ),
    "a misspelt option": (
        lambda: bp.gru(3, ouput="last"),
        r"gru: takes hidden, output.*got .*'ouput'",
    ),
    "an option of another library": (
        lambda: bp.dense(3, activation="relu"),
        r"dense: takes features, bias.*got .*'activation'",
    ),
    "an option of a loss": (lambda: bp.losses.huber(delta=1.0), r"huber: takes threshold.*'delta'"),
    "nothing": (lambda: bp.embedding(3), r"embedding: takes vocabulary, features.*'features'"),
    "too much": (lambda: bp.dropout(0.1, 0.2), r"dropout: takes rate: too many"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_there_is_not_is_named_with_those_that_there_are(call):
    act, message = CALLS[call]
    with pytest.raises(bp.ModelError, match=f"^{message}"):
        act()


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
    a_function = "bp.losses.loss(C, jax.grad(C)) makes a loss of a function C(a, y)"
    for given, way in {
        (loss, model): "bp.from_function makes a layer",
        (model, lambda a, y: 0.0): a_function,
        (model, optax.l2_loss): a_function,
        (model, bp.losses.huber): "bp.losses.huber(…) makes a loss",
    }.items():
        with pytest.raises(bp.ModelError, match=f"takes a layer and a loss.*{re.escape(way)}"):
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


def test_a_rules_function_of_other_arguments_is_named():
    """A forward without a key, the likeliest slip, before anything runs."""
    with pytest.raises(
        bp.ModelError, match=r"mine: forward: takes a function of \(params, x, key\)"
    ):
        bp.rule(
            lambda key, x: (), lambda params, x: (x, ()), lambda p, r, dy: (dy, ()), name="mine"
        )
    with pytest.raises(
        bp.ModelError, match=r"backward: takes a function of \(params, residuals, dy\)"
    ):
        bp.rule(lambda key, x: (), lambda params, x, key: (x, ()), lambda p, dy: (dy, ()))
