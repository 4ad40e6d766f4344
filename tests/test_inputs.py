"""Whatever is given to a public function that it cannot take is named, in a message of ours.

The tables say what each kind of argument takes and by which name it goes. A new public function
is in these tests by itself; an argument of a new name fails until ``KINDS`` says what it is.
"""

import inspect
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import functional_bp as bp

KEY = jax.random.key(0)
MODEL = bp.chain(bp.dense(4), bp.tanh, bp.dense(3))
LOSS = bp.losses.softmax_cross_entropy
X = np.ones((4, 5), np.float32)
Y = np.array([0, 1, 2, 0])
PARAMS = MODEL.init(KEY, X[0])


def a_function(*args):
    return args[0]


CELL = bp.Cell("mine", 2, ("h",), *(a_function,) * 5)
NO_NUMBERS = ("3", None, 1j, [1.0], jnp.ones(2), math.nan, math.inf)
NO_WHOLE = ("3", 2.5, math.nan, [1], jnp.ones(2), True, 1j)
NO_SIZES = ("3", 2.5, None, math.nan, True, 1j, 0, -1, (), (0,), (2.5,), ("3",))
NO_SIDES = ("3", 2.5, None, math.nan, True, 1j, -1, (), (2.5,), (None,), ((1, 2, 3),), ((-1, 0),))
NO_LAYERS = (3, "relu", None, LOSS, a_function, X)

# What each kind of argument does not take. None is not taken unless the kind says so.
BAD = {
    "layer": NO_LAYERS,
    "layer or none": tuple(bad for bad in NO_LAYERS if bad is not None),
    "layer or loss": (3, "relu", None, a_function, X),
    "loss": (3, "relu", None, MODEL, a_function),
    "function": (3, "tanh", None),
    "function or none": (3, "tanh"),
    "whole from 1": (*NO_WHOLE, None, 0, -1),
    "whole from 1 or none": (*NO_WHOLE, 0, -1),
    "whole from 1 or flag": (*(bad for bad in NO_WHOLE if bad is not True), None, 0, -1),
    "whole from 0": (*NO_WHOLE, None, -1),
    "whole from 0 or none": (*NO_WHOLE, -1),
    "whole": (*NO_WHOLE, None),
    "1, 2 or none": (*NO_WHOLE, 0, 3),
    "finite": NO_NUMBERS,
    "above 0": (*NO_NUMBERS, 0.0, -1.0),
    "above 0 or none": tuple(bad for bad in (*NO_NUMBERS, 0.0, -1.0) if bad is not None),
    "from 0": (*NO_NUMBERS, -0.1),
    "from 0 below 1": (*NO_NUMBERS, -0.1, 1.0),
    "above 1 or none": tuple(bad for bad in (*NO_NUMBERS, 0.0, 1.0) if bad is not None),
    "above 0 to 1": (*NO_NUMBERS, 0.0, 1.1),
    "from 0 below 1 or none": tuple(bad for bad in (*NO_NUMBERS, -0.1, 1.0) if bad is not None),
    "from 0 to 1": (*NO_NUMBERS, -0.1, 1.1),
    "rate or schedule or none": tuple(bad for bad in (*NO_NUMBERS, -1.0) if bad is not None),
    "flag": (None, 1, "yes", 0.0),
    "flag or none": (1, "yes", 0.0),
    "choice": ("magic", "", 3, None),
    "text": (3, None, 2.5),
    "text or none": (3, 2.5),
    "names": ("h", (), ("c",), None, 3),
    "names or none": ("h", (3,), None, 3),
    "equations": (3, "y = x", ("y = x",), ("y = x", 3)),
    "head": (3, bp.dense(3), (bp.dense(3),), (bp.dense(3), 3), (3, LOSS)),
    "floating dtype": ("no dtype", "int32", int, None, 3),
    "floating dtype or none": ("no dtype", "int32", int, 3),
    "key": (3, "key", None, X),
    "key or none": (3, "key", X),
    "path": (3, None, 2.5, ""),
    "path or none": (3, 2.5, ""),
    "frozen": (3, "weight", {"weight": 1.0}),
    "frozen of parameters": (3, "weight", {"weight": 1.0}, (True,)),
    "ties": (3, "weight", None, {"weight": "bias"}, {("weight",): 3}),
    "arrays": (3, "weight", None, (1.0, 2.0)),
    "arrays or none": (3, "weight", (1.0, 2.0)),
    "inspection": (3, "found", None, X),
    "axes or none": (3, "axes"),
    "history": (3, "history", None),
    "norms": (3, "norms", None, X, [1j]),
    "part of arrays": (3, "weight", {"weight": 1}),
    "cell": (3, "lstm", None, bp.lstm(3)),
    "examples": ("x", None, 3, [1.0], X[0, 0]),
    "an example": ("x", None),
    "an array": ("x", None, 3, [1.0], X.astype(int), X[0, 0]),
    "sizes": NO_SIZES,
    "sizes or none": tuple(bad for bad in NO_SIZES if bad is not None),
    "sides": NO_SIDES,
    "padding": ("same", *NO_SIDES),
    "bools or none": ("x", 3, [True], X),
    "an array or none": ("x", 3, [1.0], X.astype(int)),
    "integers": ("ids", None, 3, [1], X, Y[:2]),
    "integers or none": ("lengths", 3, [1], X, Y[:2]),
    "metrics": (3, "accuracy", {"accuracy": 3}),
    "callbacks": (3, "print", [3], None),
    "batches": (3, "x", None, [3], [(X,)], [(X, Y, Y, Y)], [X]),
    "batches or none": (3, "x", [3], [(X,)], [X]),
    "a batch": (3, "x", None, (X,), X),
    "optimizer": (3, "adam", None, a_function),
    "parameters": (3, "weight", None, (), PARAMS[:2]),
    "batch's x": ("x", None, 3, [1.0], X[:2], X[:, 0], X.astype(complex), X[:, :2], X.astype(int)),
    "batch's y": ("y", None, 3, [1], Y[:2], Y.astype(float), Y + 3, X),
    "weights": (
        *("w", 3, [1.0] * 4, np.ones(3), np.ones((4, 1)), np.ones(4) * 1j),
        *(np.array([1, 1, 1, bad]) for bad in (-1, math.nan, math.inf)),
        np.array(["1"] * 4),
    ),
    "like parameters": (3, "v", None, PARAMS[:2], jax.tree.map(lambda p: p * 1j, PARAMS)),
    "other batch": (3, "x", (PARAMS,), (PARAMS, X, Y[:2]), (PARAMS[:2], X, Y)),
    "other x": (3, "x", X[:, 0], X[:, :2]),
    "flax": (3, "Dense", None, a_function),
    "options or none": (3, "train", ["train"]),
    "of one's own": (),  # whatever it is, it goes to the caller's own code
}

# What the public functions call their arguments, and what they are. The same name is the same kind
# of thing everywhere, but for those that ``IN`` names.
KINDS = {
    **dict.fromkeys(("model", "layer", "shortcut", "layers", "named"), "layer"),
    "loss": "loss",
    **dict.fromkeys(("sigma", "dsigma", "weight_init", "bias_init", "check"), "function"),
    **dict.fromkeys(("value", "delta", "local", "factors"), "function"),
    **dict.fromkeys(("init", "forward", "backward"), "function"),
    **dict.fromkeys(
        ("reference", "root", "sample", "mirrored", "rebuild", "unrolled"), "function or none"
    ),
    **dict.fromkeys(("features", "vocabulary", "hidden", "n", "size"), "whole from 1"),
    **dict.fromkeys(("estimate_every", "inverse_every", "batch"), "whole from 1"),
    "estimate_from": "above 0 to 1",
    **dict.fromkeys(
        ("microbatch", "samples", "truncate", "every", "steps_per_call"), "whole from 1 or none"
    ),
    **dict.fromkeys(("seed", "epochs", "steps"), "whole from 0 or none"),
    **dict.fromkeys(("heads", "length"), "whole from 1"),
    **dict.fromkeys(("kernel_size", "strides", "dilation", "factor"), "sizes"),
    **{"padding": "padding", "sides": "sides"},
    **dict.fromkeys(("kv_heads", "window"), "whole from 1 or none"),
    **dict.fromkeys(("causal", "alibi", "approximate"), "flag"),
    "rotary": "above 1 or none",
    "checkpoint": "whole from 1 or flag",
    "axis": "whole",
    "recursions": "1, 2 or none",
    **dict.fromkeys(("slope", "alpha"), "finite"),
    **dict.fromkeys(("max_norm", "threshold", "damping", "least_damping"), "above 0"),
    **dict.fromkeys(("normalize_by", "max_step", "tolerance"), "above 0 or none"),
    **dict.fromkeys(("rate", "decay", "momentum"), "from 0 below 1"),
    "smoothing": "from 0 to 1",
    "z_loss": "from 0",
    "learning_rate": "rate or schedule or none",
    **dict.fromkeys(("bias", "of_output", "random", "batched", "renew", "has_aux"), "flag"),
    **dict.fromkeys(("reverse", "trained_state", "stop_on_nan", "resume"), "flag"),
    **dict.fromkeys(("mixes_examples", "elementwise", "holds_deltas"), "flag"),
    **dict.fromkeys(("per", "method", "fisher", "shared", "activation", "output"), "choice"),
    "progress": "flag or none",
    "ema": "from 0 below 1 or none",
    "compute_dtype": "floating dtype or none",
    "name": "text",
    "entry": "text",
    "state": "names",
    "dtype": "floating dtype",
    "key": "key or none",
    "path": "path",
    "checkpoints": "path or none",
    "folder": "path",
    "frozen": "frozen",
    "ties": "ties",
    "params": "arrays",
    "like": "arrays",
    "trained": "part of arrays",
    "cell": "cell",
    **dict.fromkeys(("x", "y", "a"), "examples"),
    **dict.fromkeys(("h", "query", "weight", "weight_x", "weight_h", "bias_n"), "an array"),
    **dict.fromkeys(("h0", "c0"), "an array or none"),
    "ids": "integers",
    "lengths": "integers or none",
    "metrics": "metrics",
    "callbacks": "callbacks",
    "batches": "batches",
    "evaluation": "batches or none",
    "optimizer": "optimizer",
    "equations": "equations",
    "doc": "text",
    "groups": "whole from 1",
    "epsilon": "above 0",
    "is_state": "function",
    "in_inference": "layer or none",
    "inference": "layer or none",
    "head": "head",
    "options": "of one's own",
    "apply": "function",
    "module": "flax",
    "noisy": "options or none",
    "rng": "text",
    "parts": "of one's own",
    "found": "inspection",
    "axes": "axes or none",
    "history": "history",
    "norms": "norms",
}
IN = {
    ("bidirectional", "forward"): "layer",
    ("bidirectional", "backward"): "layer or none",
    ("activation", "name"): "text or none",
    ("attention", "size"): "whole from 1 or none",
    ("rule", "renew"): "function",
    ("Layer", "renew"): "function",
    ("rule", "state"): "names or none",
    ("batch_norm", "momentum"): "from 0 to 1",
    ("init", "key"): "key",
    ("tied", "layer"): "layer or loss",
    ("explain", "model"): "function",
    ("explain", "y"): "of one's own",
    ("from_function", "name"): "text or none",
    **dict.fromkeys((("init", "x"), ("init", "y")), "an example"),
    ("loss", "name"): "text or none",
    ("trainable", "frozen"): "frozen of parameters",
    **dict.fromkeys((("summary", "x"), ("equations", "x")), "an example"),
    ("ops.linear_softmax_cross_entropy", "weights"): "an array or none",
    ("ops.attention", "bias"): "an array or none",
    ("ops.attention", "mask"): "bools or none",
    **{(of, "window"): "sizes" for of in ("max_pool", "avg_pool")},
    **{(of, "strides"): "sizes or none" for of in ("max_pool", "avg_pool")},
    ("equations", "params"): "arrays or none",
    ("check_layer", "x"): "an example",
    **dict.fromkeys((("check_layer", "seed"), ("check_model", "seed")), "whole from 0"),
    ("kronecker_factors", "samples"): "whole from 1",
    ("kfac", "batch"): "a batch",
    ("perplexity", "a"): "examples",
    ("fit", "params"): "arrays",
    ("history", "rate"): "function or none",
    ("norms", "max_norm"): "above 0 or none",
    ("check_model", "params"): "parameters",
    **dict.fromkeys([("ops.attention", "key"), ("ops.attention", "value")], "an array"),
    **dict.fromkeys([(f"ops.{name}", "x") for name in ("lstm", "gru", "rnn")], "an array"),
    **dict.fromkeys([(f"ops.{name}", "bias") for name in ("lstm", "gru", "rnn")], "an array"),
}

# What a function is called with where it must be given something.
GOOD = {
    **{"model": MODEL, "layer": bp.dense(3), "loss": LOSS, "n": 2, "cell": CELL, "groups": 2},
    **{"sigma": jnp.tanh, "dsigma": jnp.cos, "name": "mine", "value": a_function},
    **{"delta": a_function, "init": a_function, "forward": a_function, "backward": a_function},
    **{"local": a_function, "factors": a_function, "state": ("h",), "hidden": 2, "features": 3},
    **{"heads": 2, "length": 3, "kernel_size": 3, "window": 2, "factor": 2, "sides": 1},
    **{"vocabulary": 4, "size": 2, "max_norm": 1.0, "threshold": 1.0, "rate": 0.1},
    **{
        "smoothing": 0.1,
        "z_loss": 0.0,
        "learning_rate": 0.1,
        "entry": "x",
        "ties": {},
        "params": PARAMS,
    },
    **{"like": PARAMS, "trained": PARAMS, "frozen": None, "x": X, "y": Y, "key": KEY},
    **{"optimizer": optax.sgd(0.1), "batches": [(X, Y)], "weights": np.ones(4), "v": PARAMS},
    **{"path": "no-such-folder/params.safetensors", "folder": "no-such-folder"},
    **{"history": bp.History.of({}), "norms": np.ones(3)},
    **{"found": bp.inspect(MODEL, LOSS)(PARAMS, X, Y)},
    **{"apply": a_function, "other": (PARAMS, X, Y), "a": np.ones((4, 3), np.float32)},
}
GOOD_IN = {
    ("bidirectional", "forward"): bp.lstm(2),
    ("summary", "x"): X[0],
    ("init", "x"): X[0],
    ("init", "y"): Y[0],
    ("check_layer", "x"): X[0],
    ("check_layer", "layer"): MODEL,
    ("kfac", "batch"): (X, Y),
    ("dense", "features"): 3,
    ("explain", "model"): bp.from_function(lambda params, x: params[0]["weight"] @ x),
    ("from_flax", "module"): flax.linen.Dense(2),
    ("from_nnx", "module"): nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    ("empirical_ntk", "other"): X,
    **{("ops.attention", name): np.ones((5, 2, 3)) for name in ("query", "key", "value")},
    **{
        (f"ops.{name}", argument): np.ones((gates * 3, *shape))
        for name, gates in (("lstm", 4), ("gru", 3), ("rnn", 1))
        for argument, shape in (("weight_x", (5,)), ("weight_h", (3,)), ("bias", ()))
    },
    ("ops.gelu", "x"): X,
    ("ops.gru", "bias_n"): np.ones(3),
    ("ops.linear_softmax_cross_entropy", "h"): X,
    ("ops.linear_softmax_cross_entropy", "weight"): X[:3],
    ("ops.linear_softmax_cross_entropy", "ids"): Y,
}
# Records, which functions fill; pytrees, through which JAX passes whatever it likes; modules.
NOT_CALLED = {
    "History",
    "Run",
    "Kronecker",
    "ModelError",
    "Equations",
    "Inspected",
    "Inspection",
    "factors",
    "contractions",
}


def public_functions():
    for name in bp.__all__:
        item = getattr(bp, name)
        if name in NOT_CALLED or isinstance(item, bp.Layer):
            continue
        if inspect.ismodule(item):
            for inner, function in vars(item).items():
                ours = getattr(function, "__module__", "").startswith(item.__name__)
                if inspect.isfunction(function) and ours and not inner.startswith("_"):
                    is_named_twice = hasattr(bp, inner) or name == "ops"
                    yield f"{name}.{inner}" if is_named_twice else inner, function
        else:
            yield name, item


FUNCTIONS = dict(public_functions())


def kind_of(function, argument):
    kind = IN.get((function, argument)) or KINDS.get(argument)
    assert kind, f"{function}: say in KINDS or IN what the argument {argument} takes"
    return kind


def call(function, given):
    """The function with what it must be given, and with ``given`` by name."""
    positional, named = [], {}
    for argument in inspect.signature(FUNCTIONS[function]).parameters.values():
        if argument.kind is argument.VAR_POSITIONAL:
            positional = [] if "named" in given else [given.get(argument.name, GOOD["layer"])]
        elif argument.kind is argument.VAR_KEYWORD:
            named |= {"one": given[argument.name]} if argument.name in given else {}
        elif argument.name in given:
            named[argument.name] = given[argument.name]
        elif (function, argument.name) in GOOD_IN:
            named[argument.name] = GOOD_IN[function, argument.name]
        elif argument.default is argument.empty or argument.name in ("loss", "max_norm"):
            named[argument.name] = GOOD[argument.name]
    if function == "fit" and "steps" not in named:
        named["epochs"] = named.get("epochs", 1)
    return FUNCTIONS[function](*positional, **named)


CASES = [
    (name, argument)
    for name, function in FUNCTIONS.items()
    for argument in inspect.signature(function).parameters
]


def assert_named(act, what):
    """Raises unless it raises an error of ours."""
    try:
        result = act()
    except bp.ModelError as error:
        assert "takes" in str(error) and "got" in str(error), f"{what}: {error}"
    except ValueError as error:  # of training: an argument out of range
        assert "takes" in str(error) and "got" in str(error), f"{what}: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{what}: accepted, {result!r:.100}")


@pytest.mark.parametrize(("function", "argument"), CASES, ids=lambda part: part)
def test_a_bad_argument_is_named(function, argument):
    if argument in ("checkpoints", "resume"):
        pytest.importorskip("orbax.checkpoint")
    pytest.importorskip("safetensors")
    for bad in BAD[kind_of(function, argument)]:
        assert_named(lambda bad=bad: call(function, {argument: bad}), f"{argument}={bad!r:.60}")


# ---- what the returned functions are called with ------------------------------------------------

DATA = {
    "params": "parameters",
    "x": "batch's x",
    "y": "batch's y",
    "weights": "weights",
    "key": "key or none",
    "v": "like parameters",
    "other": "other batch",
}
DATA_IN = {("empirical_ntk", argument): "other x" for argument in ("x", "other")}
PROTOCOLS = ("OfBatch", "OfExamples", "AlongVector", "GramOfBatch", "DotsOfBatch", "KernelOf")
QUANTITIES = [
    name
    for name, function in FUNCTIONS.items()
    if "model" in inspect.signature(function).parameters
    and any(kind in str(inspect.signature(function).return_annotation) for kind in PROTOCOLS)
    and name != "evaluate"  # takes batches, as fit does
]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_bad_data_is_named(quantity):
    fn = call(quantity, {})
    arguments = inspect.signature(fn).parameters
    for argument in arguments:
        for bad in BAD[DATA_IN.get((quantity, argument)) or DATA[argument]]:
            given = {
                name: GOOD_IN.get((quantity, name), GOOD.get(name))
                for name, parameter in arguments.items()
                if parameter.default is parameter.empty
            }
            assert_named(
                lambda g=given, b=bad, a=argument: fn(**g | {a: b}), f"{argument}={bad!r:.60}"
            )


def test_quantities_are_found():
    assert len(QUANTITIES) >= 16


@pytest.mark.parametrize(
    "bad",
    [bad for bad in BAD["weights"] if not isinstance(bad, list)],
    ids=lambda bad: f"{bad!r:.30}",
)
def test_bad_weights_are_named_where_batches_are_evaluated(bad):
    assert_named(lambda: bp.evaluate(MODEL, LOSS)(PARAMS, [(X, Y, bad)]), f"weights={bad!r}")


LAYERS_USED = {
    "chain": MODEL,
    "parallel": bp.parallel(bp.dense(3), bp.dense(2)),
    "residual": bp.residual(bp.dense(5)),
    "repeat": bp.repeat(bp.dense(5), 2),
    "tied": bp.tied(bp.chain(bp.dense(5), bp.dense(5)), {(1, "weight"): (0, "weight")}),
    "at": bp.at("x", bp.dense(3)),
    "lstm": bp.lstm(3),
    "bidirectional": bp.bidirectional(bp.gru(2)),
    "embedding": bp.embedding(4, 2),
    "dropout": bp.dropout(0.5),
}


@pytest.mark.parametrize("name", LAYERS_USED)
def test_what_init_and_apply_cannot_take_is_named(name):
    layer = LAYERS_USED[name]
    x = {"lstm": X, "bidirectional": X, "embedding": Y, "at": {"x": X[0]}}.get(name, X[0])
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * 2), x)
    params = layer.init(KEY, x)
    for bad in BAD["key"]:
        if params != ():
            assert_named(lambda b=bad: layer.init(b, x), f"init, key={bad!r:.60}")
    for bad in BAD["key or none"]:
        assert_named(lambda b=bad: layer.apply(params, batch, b), f"apply, key={bad!r:.60}")
    for bad in ("x", None, 3):
        if name not in ("embedding", "dropout") or bad != 3:  # of which one number is an example
            assert_named(lambda b=bad: layer.init(KEY, b), f"init, x={bad!r}")
        assert_named(lambda b=bad: layer.apply(params, b), f"apply, x={bad!r}")
    for bad in ("weight", None, 3, {"no": X}):
        assert_named(lambda b=bad: layer.apply(b, batch), f"apply, params={bad!r:.60}")
