"""Recurrent layers: backpropagation through time by hand, against autodiff and PyTorch."""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp
from functional_bp import contractions
from functional_bp.recursion import with_loss

squared_error = bp.losses.squared_error
key = jax.random.key(0)
CELLS = {"rnn": bp.rnn, "lstm": bp.lstm, "gru": bp.gru}
N, D, H = 3, 3, 4


@pytest.fixture(autouse=True)
def float64_in_short_blocks(monkeypatch):
    """Blocks of 4 steps, so that the 9 of most tests are several, the last one shorter; and
    little optimisation, which would take most of the time."""
    monkeypatch.setattr(
        importlib.import_module("functional_bp.layers.recurrence.time_blocks"),
        "_block_size",
        lambda *_: 4,
    )
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def moved(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])


def drawn(model, x):
    """Parameters for a batch, moved from where they begin."""
    example = jax.tree.map(lambda leaf: leaf[0], x)
    return jax.jit(lambda example: moved(model.init(key, example)))(example)


def by_hand(model):
    """Costs, gradient and squared norms."""

    @jax.jit
    def found(params, x, y):
        cost = with_loss(model, squared_error)
        costs, residuals = cost.forward(params, (x, y))

        def asked(contract):
            return cost.backward(params, residuals, jnp.ones_like(costs), contract)[1]

        return costs, asked(contractions.total), asked(contractions.squared_norm)

    return found


def there_and_back(model):
    """Outputs, ∂C/∂(input) and totals, from ∂C/∂(outputs)."""

    @jax.jit
    def found(params, x, dy):
        y, residuals = model.forward(params, x)
        return y, *model.backward(params, residuals, dy, contractions.total)

    return found


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def error(found, wanted):
    """Largest relative error of a leaf, max|Δ| / max|leaf|; both trees have the same leaves."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(abs(f - w).max() / (abs(w).max() or 1)) for f, w in pairs)


def state(cell, seed, *axes):
    parts = ("h", "c") if cell == "lstm" else ("h",)
    return {part: normal(seed + i, *axes, H) for i, part in enumerate(parts)}


def prove(model, x):
    """Costs, gradient and norms against autodiff of the textbook, example by example."""
    params = drawn(model, x)
    y = normal(9, *jax.eval_shape(model.apply, params, x).shape)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def wanted(params, x, y):
        x, y = jax.tree.map(lambda leaf: leaf[None], (x, y))
        return bp.value_and_grad(model, squared_error, method="autodiff")(params, x, y)

    costs, gradients = wanted(params, x, y)
    total = jax.tree.map(lambda g: g.sum(0), gradients)
    squared_norms = jax.tree.map(lambda g: (g**2).sum(range(1, g.ndim)), gradients)
    # Rounding of 1e-16 grows over nine steps and back, and in sums of squares.
    assert error(by_hand(model)(params, x, y), (costs, total, squared_norms)) <= 1e-11


LENGTHS = jnp.array([0, 9, 6])


@pytest.mark.parametrize(
    "cell", ["lstm", *(pytest.param(cell, marks=pytest.mark.exhaustive) for cell in ("rnn", "gru"))]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True, "truncate": 3, "output": "last", "trained_state": True, "checkpoint": 2},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradient_equals_autodiff(cell, options):
    """With lengths, over several blocks of time, the last of them shorter than the others."""
    model = bp.chain(CELLS[cell](H, **options), bp.entry("x"))
    prove(model, {"x": normal(1, N, 9, D), "length": LENGTHS})


@pytest.mark.parametrize(
    "model",
    [
        bp.rnn(H, activation="relu", truncate=3),
        bp.chain(bp.lstm(H, checkpoint=True), bp.gru(H, reverse=True)),
    ],
    ids=str,
)
def test_gradient_without_lengths_equals_autodiff(model):
    prove(model, normal(1, N, 8, D))


def test_gradient_of_one_step_and_one_example_equals_autodiff():
    prove(bp.chain(bp.gru(H), bp.lstm(H, reverse=True)), normal(1, 1, 1, D))


# ---- PyTorch ----------------------------------------------------------------------------------

ARRAYS = np.load(pathlib.Path(__file__).parent / "reference" / "recurrent.npz")


def from_pytorch(kind, arrays, prefix="", suffix=""):
    """Our parameters from PyTorch's, or our gradients from its."""
    weight_x, weight_h, bias_x, bias_h = (
        arrays[f"{prefix}{name}_l0{suffix}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    params = {"weight_x": weight_x, "weight_h": weight_h}
    if prefix:  # the gradient of a sum is that of each term
        params["bias"] = bias_x
    else:
        params["bias"] = bias_x + bias_h
    if kind == "gru":
        *_, params["bias_n"] = np.split(bias_h, 3)
        if not prefix:
            params["bias"][-len(params["bias_n"]) :] = np.split(bias_x, 3)[-1]
    return params


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "both ways"])
def test_outputs_and_gradients_equal_pytorch(kind, both_ways):
    name = kind + ("_both" if both_ways else "")
    arrays = {k.split("/")[1]: v for k, v in ARRAYS.items() if k.startswith(f"{name}/")}
    parts = ("h", "c") if kind == "lstm" else ("h",)
    suffixes = ("", "_reverse") if both_ways else ("",)

    def states(of):
        return tuple(
            {part: arrays[f"{of}_{part}"][i] for part in parts} for i in range(len(suffixes))
        )

    def parameters(prefix=""):
        each = tuple(from_pytorch(kind, arrays, prefix, suffix) for suffix in suffixes)
        return each if both_ways else each[0]

    layer = CELLS[kind](arrays["weight_hh_l0"].shape[1])
    model = bp.bidirectional(layer) if both_ways else layer
    x = {"x": jnp.asarray(arrays["x"]), "state": jax.tree.map(jnp.asarray, states("state"))}
    dy = {"x": arrays["dy"], "state": states("dfinal")}
    y, dx, gradient = there_and_back(model)(parameters(), x, dy)
    assert error(y, {"x": arrays["y"], "state": states("final")}) <= 1e-12
    assert error(dx, {"x": arrays["dx"], "state": states("dstate")}) <= 1e-11
    assert error(gradient, parameters("d_")) <= 1e-11


# ---- lengths, states, truncation, deltas ------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reverse": True, "truncate": 4}], ids=str)
def test_padding_changes_nothing(options):
    """Outputs, gradients and norms of a padded sequence are those of the sequence; not even NaN
    in the padding is seen, and truncation counts the steps that are valid."""
    layer = bp.gru(H, **options)
    model = bp.chain(layer, bp.entry("x"))
    x, y = normal(1, N, 6, D), normal(2, N, 6, H)
    params = drawn(model, {"x": x})
    padded = jnp.concatenate([x, jnp.full((N, 3, D), jnp.nan)], 1)
    padded = {"x": padded, "length": jnp.full(N, 6)}
    target = jnp.concatenate([y, jnp.zeros((N, 3, H))], 1)
    found = by_hand(model)
    assert error(found(params, padded, target), found(params, {"x": x}, y)) <= 1e-12


def test_last_output_is_that_of_the_last_valid_step():
    x = {"x": normal(1, N, 9, D), "length": LENGTHS}
    params = drawn(bp.lstm(H), x)
    layers = bp.lstm(H), bp.lstm(H, output="last")
    every, last = jax.jit(lambda *data: [layer.apply(*data)["x"] for layer in layers])(params, x)
    assert error(last[1:], jnp.stack([every[1, 8], every[2, 5]])) == 0
    assert not last[0].any()


def test_a_way_around_a_recurrent_layer_leaves_length_and_states_to_it():
    layer = bp.lstm(D)
    around = bp.residual(layer)
    state = ({"h": normal(2, N, D), "c": normal(3, N, D)},)
    x = {"x": normal(1, N, 9, D), "length": LENGTHS, "state": state}
    params = drawn(around, x)

    def outputs(params, x):
        return around.apply(params, x), layer.apply(params[0], x)

    got, inside = jax.jit(outputs)(params, x)
    assert error(got["x"], inside["x"] + x["x"]) == 0
    assert (got["length"] == LENGTHS).all()
    assert error(got["state"][0]["c"], inside["state"][0]["c"]) == 0


def test_a_stream_in_chunks_carries_its_states():
    """Two layers over two chunks of 4 give the outputs of 8 steps, and truncation at 4 gives the
    sum of the chunks' gradients."""
    model = bp.chain(bp.lstm(H), bp.gru(H))
    x, dy = normal(1, N, 8, D), normal(2, N, 8, H)
    params, of_chunk = drawn(model, x), there_and_back(model)
    states = jax.tree.map(
        lambda s: jnp.zeros_like(s, shape=(N, H)), (state("lstm", 0), state("gru", 0))
    )
    gradients, outputs = [], []
    for begin in (0, 4):
        chunk = {"x": x[:, begin : begin + 4], "state": states}
        d_out = {"x": dy[:, begin : begin + 4], "state": jax.tree.map(jnp.zeros_like, states)}
        y, _, gradient = of_chunk(params, chunk, d_out)
        states = y["state"]
        gradients.append(gradient)
        outputs.append(y["x"])

    truncated = bp.chain(bp.lstm(H, truncate=4), bp.gru(H, truncate=4))
    y, _, gradient = there_and_back(truncated)(params, x, dy)
    assert error(jnp.concatenate(outputs, 1), y) <= 1e-12
    assert error(gradient, jax.tree.map(jnp.add, *gradients)) <= 1e-12


def test_every_layer_of_a_chain_has_its_states_and_their_deltas():
    """Two directions take two states; one that is given takes the place of a trained one."""
    model = bp.chain(bp.bidirectional(bp.rnn(H)), bp.rnn(H, trained_state=True))
    x = {"x": normal(1, N, 3, D), "state": tuple(state("rnn", seed, N) for seed in (2, 3, 4))}
    dy = {"x": normal(5, N, 3, H), "state": tuple(state("rnn", seed, N) for seed in (6, 7, 8))}
    params = drawn(model, x)

    def wanted(params, x, dy):
        _, back = jax.vjp(model.apply, params, x)
        below = {"x": x["x"], "state": x["state"][:2]}
        between = bp.bidirectional(bp.rnn(H)).apply(params[0], below)
        above = {"x": between["x"], "state": x["state"][2:]}
        top = bp.rnn(H, trained_state=True).apply(params[1], above)
        gradient, dx = back(dy)
        return {"x": top["x"], "state": between["state"] + top["state"]}, dx, gradient

    found = there_and_back(model)(params, x, dy)
    assert error(found, jax.jit(wanted)(params, x, dy)) <= 1e-11


def test_truncation_longer_than_the_sequence_cuts_nothing():
    """Not even what reaches a trained initial state."""
    x, y = normal(1, N, 3, D), normal(2, N, 3, H)
    cut, whole = (bp.rnn(H, trained_state=True, truncate=k) for k in (3, None))
    params = drawn(whole, x)
    assert error(by_hand(cut)(params, x, y), by_hand(whole)(params, x, y)) <= 1e-12


def test_deltas_are_those_of_the_states_through_time():
    """∂C/∂h_t is the gradient of a zero added to h_t, here at the first step alone."""
    model = bp.rnn(H)
    x, y = normal(1, N, 5, D), normal(2, N, 5, H)
    params = drawn(model, x)

    def cost_of_state(h):
        after = {"x": x[:, 1:], "state": ({"h": h},)}
        a = bp.rnn(H).apply(params, after)["x"]
        return 0.5 * ((a - y[:, 1:]) ** 2).sum() + 0.5 * ((h - y[:, 0]) ** 2).sum()

    def both():
        at_first = jax.grad(cost_of_state)(model.apply(params, x)[:, 0])
        return bp.deltas(model, squared_error)(params, x, y), at_first

    deltas, at_first = jax.jit(both)()
    assert deltas.shape == (N, 5, H)
    assert error(deltas[:, 0], at_first) <= 1e-12


def test_parameters_have_the_dtype_of_the_input():
    x = jnp.zeros((5, D), jnp.bfloat16)
    params = jax.jit(
        lambda: [cell(H, trained_state=True).init(key, x) for cell in CELLS.values()]
    )()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_compiled_program_does_not_grow_with_time():
    def size(steps):
        model = bp.lstm(H)
        x = jax.ShapeDtypeStruct((2, steps, D), jnp.float32)
        params = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, D), jnp.float32)))
        y = jax.ShapeDtypeStruct((2, steps, H), jnp.float32)
        return len(jax.jit(bp.grad(model, squared_error)).lower(params, x, y).as_text().split("\n"))

    assert size(40) == size(4000)


def test_with_checkpoints_no_array_has_the_whole_of_time():
    """Neither what the steps saved nor their δ: states are recomputed block by block, and totals
    are folded on the way back."""
    steps, hidden = 900, 64
    model = bp.rnn(hidden, output="last", checkpoint=True)
    x, y = jax.ShapeDtypeStruct((2, steps, 1), float), jax.ShapeDtypeStruct((2, hidden), float)
    params = jax.eval_shape(model.init, key, jax.ShapeDtypeStruct((steps, 1), float))
    program = jax.jit(bp.grad(model, squared_error)).lower(params, x, y).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * 2 * steps * hidden


# ---- bad input --------------------------------------------------------------------------------

X = jnp.zeros((2, 5, D), jnp.float32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            {"x": X, "length": jnp.array([3, 6])},
            r"lstm\(4\): length: takes 0 to the 5 steps.* 3 to 6",
        ),
        (
            {"x": X, "length": jnp.array([-1, 5])},
            r"length: takes 0 to the 5 steps of x, got -1 to 5",
        ),
        ({"x": X, "length": jnp.array([1.0, 5])}, r"length: takes one integer for each example"),
        ({"x": X, "state": ({"h": jnp.zeros((2, 3)), "c": jnp.zeros((2, 3))},)}, "state: takes"),
        ({"x": X, "state": ({"h": jnp.zeros((2, 4))},)}, r"state: takes .*'c'"),
        ({"x": X, "lengths": jnp.array([3, 5])}, "x, length and state, got .*lengths"),
        (X[..., :2], r"lstm\(4\): takes, for examples float32\(5, 2\), parameters"),
        (X[:, 0], r"takes examples of shape \(time, features\)"),
        (X[:, :0], "at least one step"),
        (X.astype(int), "floating-point"),
    ],
)
def test_bad_input_is_named(x, message):
    model = bp.lstm(4)
    params = model.init(key, X[0])
    with pytest.raises(bp.ModelError, match=message):
        model.apply(params, x)


@pytest.mark.parametrize(
    "options",
    [{"output": "first"}, {"truncate": 0}, {"checkpoint": -1}],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bp.gru(4, **options)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation: takes one of tanh, relu, got 'sigmoid'"):
        bp.rnn(4, activation="sigmoid")


@pytest.mark.parametrize("make", [bp.lstm, bp.gru, bp.rnn])
def test_batches_of_one_under_vmap(make):
    """XLA's CPU compiler has been wrong about four of them."""
    with jax.enable_x64(True):
        layer, random = make(5), np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(4, 1, 6, 4)))
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x[0, 0])
        params = jax.tree.map(lambda p: jnp.asarray(0.4 * random.normal(size=p.shape)), shapes)

        def of_each(method):
            gradient = bp.grad(layer, bp.losses.squared_error, method=method)
            return jax.jit(jax.vmap(lambda x: gradient(params, x, jnp.zeros((1, 6, 5)))))(x)

        by_hand, by_autodiff = of_each("manual"), of_each("autodiff")
        for name, right in by_autodiff.items():
            assert jnp.abs(by_hand[name] - right).max() <= 1e-11 * jnp.abs(right).max()
