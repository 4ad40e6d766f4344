"""Rules as functions of arrays: they are what the textbook says, they go through JAX's own
transformations, and a traced layer keeps their factors."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal, direction, first_order, first_order_by_vmap
from jax import lax

import functional_bp as bp
from functional_bp import ops
from functional_bp.layers.attention import streamed
from functional_bp.losses import by_positions

N, T, D, H, V = 5, 6, 3, 4, 11
WITHIN = 1e-11


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return 0.5 * np.random.default_rng(seed).normal(size=shape)


def ids_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape)


def drawn(**shapes):
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


# ---- the textbook's formulas, of one example


def lstm_of_one(x, weight_x, weight_h, bias, h0, c0):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(weight_x @ x + bias + weight_h @ h, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    last, h = lax.scan(step, (h0, c0), x)
    return h, last


def gru_of_one(x, weight_x, weight_h, bias, bias_n, h0):
    def step(h, x):
        (p_r, p_z, p_n), (q_r, q_z, q_n) = (
            jnp.split(p, 3) for p in (weight_x @ x + bias, weight_h @ h)
        )
        r, z = jax.nn.sigmoid(p_r + q_r), jax.nn.sigmoid(p_z + q_z)
        h = (1 - z) * jnp.tanh(p_n + r * (q_n + bias_n)) + z * h
        return h, h

    return lax.scan(step, h0, x)[::-1]


def rnn_of_one(x, weight_x, weight_h, bias, h0):
    def step(h, x):
        h = jnp.tanh(weight_x @ x + bias + weight_h @ h)
        return h, h

    return lax.scan(step, h0, x)[::-1]


def cost_of_one(h, weight, ids, smoothing=0.0, z_loss=0.0):
    z = h @ weight.T
    log_p = jax.nn.log_softmax(z)
    q = (1 - smoothing) * jax.nn.one_hot(ids, len(weight)) + smoothing / len(weight)
    return -(q * log_p).sum(-1) + z_loss * jax.nn.logsumexp(z, axis=-1) ** 2


def attention_of_one(
    query, key, value, lengths=None, mask=True, bias=0.0, causal=True, window=None, alibi=False
):
    (t, heads, d), s = query.shape, len(key)
    k, v = (jnp.repeat(a, heads // key.shape[1], 1) for a in (key, value))
    e = jnp.einsum("thd,shd->hts", query, k) / math.sqrt(d) + bias
    back = np.arange(t)[:, None] - np.arange(s)
    if alibi:
        e -= 2.0 ** (-8 * np.arange(1, heads + 1) / heads)[:, None, None] * abs(back)
    seen = (back >= 0) if causal else np.full((t, s), True)
    if window is not None:
        seen &= (back < window) & (-back < window)
    seen = seen if lengths is None else seen & (np.arange(s) < lengths)
    p = jax.nn.softmax(jnp.where(seen & mask, e, -1e300), axis=-1)
    return jnp.einsum("hts,shd->thd", p, v)


def weights(gates):
    return drawn(weight_x=(gates * H, D), weight_h=(gates * H, H), bias=(gates * H,))


X = normal(1, N, T, D)
STATE = {name: normal(i, N, H) for i, name in enumerate(("h0", "c0"), 40)}
Q, K, VALUES = (normal(i, N, T, heads, D) for i, heads in ((2, 4), (3, 2), (4, 2)))
CONTEXT = {"key": normal(5, N, 9, 2, D), "value": normal(6, N, 9, 2, D)}
LENGTHS = np.array([T, 1, 3, 2, T])
SEEN = np.random.default_rng(14).random((N, 4, T, T)) < 0.7
SEEN |= np.eye(T, dtype=bool)
HIDDEN, IDS = normal(7, N, T, H), ids_of(8, N, T)

ATTENTION = {"query": Q, "key": K, "value": VALUES}
SHARED = {"weight_x", "weight_h", "bias", "bias_n", "weight"}
LSTM = {"x": X, **weights(4), **STATE}
GRU = {"x": X, **weights(3), **drawn(bias_n=(H,)), "h0": STATE["h0"]}
RNN = {"x": X, **weights(1), "h0": STATE["h0"]}
VOCABULARY = {"h": HIDDEN, "weight": normal(9, V, H)}

FORMULAS = {
    "lstm": (ops.lstm, lstm_of_one, LSTM, {}),
    "gru": (ops.gru, gru_of_one, GRU, {}),
    "rnn": (ops.rnn, rnn_of_one, RNN, {}),
    "vocabulary": (
        lambda **a: ops.linear_softmax_cross_entropy(ids=IDS[0], **a),
        lambda h, weight: cost_of_one(h, weight, IDS[0]),
        *(VOCABULARY, {}),
    ),
    "vocabulary, options": (
        lambda **a: ops.linear_softmax_cross_entropy(ids=IDS[0], smoothing=0.1, z_loss=0.2, **a),
        lambda h, weight: cost_of_one(h, weight, IDS[0], 0.1, 0.2),
        *(VOCABULARY, {}),
    ),
    "attention": (ops.attention, attention_of_one, ATTENTION, {}),
    "attention, context": (
        functools.partial(ops.attention, causal=False),
        functools.partial(attention_of_one, causal=False),
        *({"query": Q, **CONTEXT}, {}),
    ),
    "attention, window, alibi": (
        functools.partial(ops.attention, window=3, alibi=True),
        functools.partial(attention_of_one, window=3, alibi=True),
        *(ATTENTION, {}),
    ),
    "attention, mask, bias": (
        functools.partial(ops.attention, causal=False),
        functools.partial(attention_of_one, causal=False),
        *(ATTENTION, {"bias": normal(13, N, 4, T, T), "mask": SEEN[:, :1]}),
    ),
    "attention, mask of heads": (ops.attention, attention_of_one, ATTENTION, {"mask": SEEN}),
    "attention, lengths": (
        functools.partial(ops.attention, causal=False, window=2 * T),
        functools.partial(attention_of_one, causal=False),
        *(ATTENTION, {"lengths": LENGTHS}),
    ),
}


def of_one(formula):
    def one(arrays, given):
        return formula(**arrays, **given)

    return one


def batched(formula, arrays):
    axes = {name: None if name in SHARED else 0 for name in arrays}
    return jax.vmap(of_one(formula), (axes, 0))


def with_gradients(function, arrays):
    """The outputs, and the gradients of a sum of them with weights that differ."""

    def summed(arrays):
        found = jax.tree.leaves(function(arrays))
        return sum((jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a).sum() for a in found)

    return {"outputs": function(arrays), "gradients": jax.grad(summed)(arrays)}


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_the_formulas(name):
    op, formula, arrays, given = FORMULAS[name]
    if name.startswith("vocabulary"):
        op = jax.vmap(lambda h, weight, op=op: op(h=h, weight=weight), (0, None))
        ours = with_gradients(jax.jit(lambda arrays: op(arrays["h"], arrays["weight"])), arrays)
    else:
        ours = with_gradients(jax.jit(lambda arrays: op(**arrays, **given)), arrays)
    wanted = with_gradients(jax.jit(lambda a: batched(formula, arrays)(a, given)), arrays)
    check_equal(ours, wanted, WITHIN)


@pytest.mark.parametrize("shape", [(T, T), (4, T, T), (N, 1, T, T), (1, 4, T, T)])
def test_a_bias_and_a_mask_that_some_share_are_those_of_each(shape, monkeypatch):
    """Over many blocks; the bias's gradient is the sum over those who share it."""
    monkeypatch.setattr(streamed, "LEAST", 4)
    monkeypatch.setattr(streamed, "MOST", 4)
    bias, keys_seen = normal(15, *shape), SEEN[:, :1, 2:3]

    def op(a):
        return ops.attention(**a["of"], bias=a["bias"], mask=keys_seen, causal=False)

    def formula(a):
        of_each = jnp.broadcast_to(a["bias"], SEEN.shape)
        one = functools.partial(attention_of_one, causal=False)
        of = (a["of"][name] for name in ("query", "key", "value"))
        return jax.vmap(lambda q, k, v, b, m: one(q, k, v, bias=b, mask=m))(*of, of_each, keys_seen)

    arrays = {"of": ATTENTION, "bias": bias}
    check_equal(with_gradients(jax.jit(op), arrays), with_gradients(formula, arrays), WITHIN)


@pytest.mark.parametrize("name", ["gru", "attention, lengths"])
def test_any_leading_axes_and_vmap_give_the_same(name):
    op, _, arrays, given = FORMULAS[name]
    together = with_gradients(lambda arrays: op(**arrays, **given), arrays)
    axes = {name: None if name in SHARED else 0 for name in arrays}
    one_by_one = jax.vmap(lambda arrays, given: op(**arrays, **given), (axes, 0))
    check_equal(with_gradients(lambda arrays: one_by_one(arrays, given), arrays), together, WITHIN)

    def two(a, name):
        return a if name in SHARED else a.reshape(1, N, *a.shape[1:])

    more = {name: two(a, name) for name, a in arrays.items()}
    more_given = {name: two(a, name) for name, a in given.items()}
    found = with_gradients(lambda arrays: op(**arrays, **more_given), more)
    shaped = jax.tree.map(lambda a, b: a.reshape(b.shape), found, together)
    check_equal(shaped, together, WITHIN)


def test_without_a_state_it_begins_at_zeros():
    for op, arrays in ((ops.lstm, LSTM), (ops.gru, GRU), (ops.rnn, RNN)):
        zeros = {name: 0 * a if name in STATE else a for name, a in arrays.items()}
        given = {name: a for name, a in arrays.items() if name not in STATE}
        check_equal({"": op(**given)}, {"": op(**zeros)}, 0)


def test_they_are_the_layers_rules():
    params = {name: LSTM[name] for name in ("weight_x", "weight_h", "bias")}
    check_equal({"": ops.lstm(X, **params)[0]}, {"": bp.lstm(H).apply(params, X)}, WITHIN)
    params = {name: GRU[name] for name in ("weight_x", "weight_h", "bias", "bias_n")}
    check_equal({"": ops.gru(X, **params)[0]}, {"": bp.gru(H).apply(params, X)}, WITHIN)
    loss = bp.losses.linear_softmax_cross_entropy(V, smoothing=0.1, z_loss=0.2)
    weight = VOCABULARY["weight"]
    costs = ops.linear_softmax_cross_entropy(HIDDEN, weight, IDS, smoothing=0.1, z_loss=0.2)
    wanted = bp.value_and_grad(bp.identity, loss)(((), {"weight": weight}), HIDDEN, IDS)[0]
    check_equal({"": costs.mean()}, {"": wanted}, WITHIN)


def test_positions_that_are_left_out_by_where_have_no_gradient():
    """Also where their ids are none, as padding of −1 is."""
    mask = jnp.arange(T) < 4

    def cost(arrays, ids):
        costs = ops.linear_softmax_cross_entropy(ids=ids, **arrays)
        return jnp.where(mask, costs, 0).sum()

    gradient = jax.jit(jax.grad(cost))
    check_equal(
        {"": gradient(VOCABULARY, jnp.where(mask, IDS, -1))}, {"": gradient(VOCABULARY, IDS)}, 0
    )


@pytest.mark.parametrize("at_once", [True, False])
def test_a_weighted_sum_over_positions_is_the_formulas(at_once, monkeypatch):
    """With the gradients of all that it takes, made at once or where logits are too many."""
    if not at_once:
        monkeypatch.setattr(by_positions, "MOST", 0)
    options = {"smoothing": 0.1, "z_loss": 0.2}
    of_positions = normal(12, N, T)
    of_positions[:, 2] = 0
    arrays = {**VOCABULARY, "weights": of_positions}

    def formula(h, weight, weights):
        return (weights * cost_of_one(h, weight, IDS, 0.1, 0.2)).sum()

    def op(ids=IDS, **arrays):
        return ops.linear_softmax_cross_entropy(ids=ids, **arrays, **options)

    ours = with_gradients(jax.jit(lambda arrays: op(**arrays)), arrays)
    check_equal(ours, with_gradients(lambda arrays: formula(**arrays), arrays), WITHIN)
    padded = IDS.copy()
    padded[:, 2] = -1
    counted = jax.jit(lambda a, ids: op(ids=ids, weights=of_positions, **a))
    found, wanted = (
        with_gradients(lambda a, ids=ids: counted(a, ids), VOCABULARY) for ids in (padded, IDS)
    )
    check_equal(found, wanted, 0)
    mean = ops.linear_softmax_cross_entropy(HIDDEN, VOCABULARY["weight"], IDS, 1 / IDS.size)
    costs = ops.linear_softmax_cross_entropy(ids=IDS, **VOCABULARY)
    check_equal({"": mean}, {"": costs.mean()}, WITHIN)


def test_they_go_through_scan():
    def layers(op, weights, x):
        return lax.scan(lambda h, w: (op(h, **w)[0], None), x, weights)[0]

    stacked = {name: np.stack([a, -a]) for name, a in weights(1).items()}
    stacked["weight_x"] = stacked["weight_h"]
    zeros = jnp.zeros(H)
    one = lambda x, weight_x, weight_h, bias: rnn_of_one(x, weight_x, weight_h, bias, zeros)  # noqa: E731
    found, wanted = (
        with_gradients(lambda a, op=op: layers(op, a, HIDDEN), stacked)
        for op in (
            ops.rnn,
            lambda x, **w: jax.vmap(lambda x: one(x, **w))(x),
        )
    )
    check_equal(found, wanted, WITHIN)


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_in_bfloat16_they_are_the_formulas_but_for_rounding(name):
    op, _, arrays, _ = FORMULAS[name]
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays)
    found = with_gradients(lambda arrays: op(**arrays), small)
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), small)
    wanted = with_gradients(lambda arrays: op(**arrays), wide)
    check_equal(jax.tree.map(lambda a: a.astype(jnp.float64), found), wanted, 0.1)


@pytest.mark.parametrize("approximate", [True, False])
def test_gelu_is_jaxs_and_keeps_its_input_alone(approximate):
    both = ops.gelu, jax.nn.gelu
    ours, wanted = (
        with_gradients(lambda a, gelu=gelu: gelu(a["x"], approximate=approximate), {"x": 3 * X})
        for gelu in both
    )
    check_equal(ours, wanted, WITHIN)
    given = jax.ShapeDtypeStruct(X.shape, X.dtype)
    _, pull = jax.eval_shape(lambda x: jax.vjp(ops.gelu, x), given)
    assert [a.shape for a in jax.tree.leaves(pull)] == [X.shape]


def test_costs_of_bfloat16_are_in_float32():
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), VOCABULARY)
    costs = ops.linear_softmax_cross_entropy(ids=IDS, **small)
    assert costs.dtype == jnp.float32
    gradients = jax.grad(lambda a: ops.linear_softmax_cross_entropy(ids=IDS, **a).sum())(small)
    assert gradients["weight"].dtype == jnp.bfloat16


def test_attentions_memory_is_linear_in_the_length():
    def temporary(t):
        a = jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32)
        gradient = jax.jit(jax.grad(lambda q: ops.attention(q, q, q).sum()))
        return gradient.lower(a).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 4.4 * temporary(4096) < 4.4 * 4.4 * temporary(1024)


# ---- in traced layers


def kernels(p, x):
    """An LSTM's weights as Flax keeps them, (in, out) and kernels of gates, here of two at once."""
    weight_x = jnp.concatenate([p["xif"], p["xgo"]], 1).T
    h, (last, c) = ops.lstm(x, weight_x, p["h"].T, p["b"])
    return h + last * c


def logits_cost(h, table, ids, **options):
    return ops.linear_softmax_cross_entropy(h, table, ids, **options).mean()


def squared(apply):
    return lambda p, x, y: ((apply(p, x) - y) ** 2).sum()


def projected(p, x):
    q, k, v = (jnp.einsum("ti,ihd->thd", x, p[name]) for name in "qkv")
    return jnp.einsum("thd,hdo->to", ops.attention(q, k, v), p["o"])


def learned_keys(p, x):
    q = jnp.einsum("ti,ihd->thd", x, p["q"])
    return ops.attention(q, p["k"], jnp.tanh(p["v"]), causal=False).reshape(len(x), -1)[:, :H]


def in_scan(p, x):
    """Weights of each turn, and those of every turn."""

    def turn(h, w):
        return ops.rnn(h, p["wx"], w["wh"], w["b"])[0], None

    return lax.scan(turn, x @ p["in"], {"wh": p["wh"], "b": p["b"]})[0]


def attention_in_scan(p, x):
    """With learned values, which are not followed into the loop."""

    def turn(h, w):
        return h + ops.attention((h @ w)[:, None], h[:, None], p["v"])[:, 0], None

    return lax.scan(turn, x @ p["in"], p["w"])[0]


def by_chunks(p, x, y):
    h = jnp.tanh(p["e"][x] @ p["w"]).reshape(2, T // 2, H)

    def turn(total, chunk):
        return total + logits_cost(*chunk[:1], p["e"], chunk[1]), None

    return lax.scan(turn, 0.0, (h, y.reshape(2, -1)))[0]


def of_every_head(p, x, y):
    """A table of each turn."""
    h = jnp.tanh(p["e"][x])
    return lax.scan(lambda total, w: (total + logits_cost(h, w, y), None), 0.0, p["w"])[0]


def two_sequences(p, x):
    both = jnp.stack([x, x[::-1]])
    return ops.rnn(both, p["wx"], p["wh"], p["b"], p["h0"] * x.mean())[0].sum(0)


def chosen(p, x):
    branches = (lambda x: ops.rnn(x, p["wx"], p["wh"], p["b"])[0], lambda x: x @ p["wx"].T)
    return lax.cond(x[0, 0] > 0, *branches, x)


def again(p, x):
    return jax.checkpoint(lambda x: ops.rnn(x, p["wx"], p["wh"], p["b"])[0])(x)


RECURRENT = {"wx": (H, D), "wh": (H, H), "b": (H,)}
Y = normal(10, N, T, H)
GIVEN_IDS = ids_of(11, N, T)
KERNELS = {"xif": (D, 2 * H), "xgo": (D, 2 * H), "h": (H, 4 * H)}
HEADS = {"q": (D, 4, D), "k": (D, 2, D), "v": (D, 2, D)}
COSTS = {
    "lstm": (squared(kernels), drawn(**KERNELS, b=(4 * H,)), X, Y),
    "gru": (
        squared(lambda p, x: ops.gru(x, p["wx"], p["wh"], p["b"], p["bn"], p["h0"])[0]),
        drawn(wx=(3 * H, D), wh=(3 * H, H), b=(3 * H,), bn=(H,), h0=(H,)),
        *(X, Y),
    ),
    "two sequences": (squared(two_sequences), drawn(**RECURRENT, h0=(2, H)), X, Y),
    "vocabulary": (
        lambda p, x, y: logits_cost(jnp.tanh(x @ p["w"]), 2 * p["e"].T, y),
        *(drawn(w=(D, H), e=(H, V)), X, IDS),
    ),
    "tied": (
        lambda p, x, y: logits_cost(
            jnp.tanh(p["e"][x] @ p["w"]), p["e"], y, smoothing=0.1, z_loss=0.1
        ),
        *(drawn(e=(V, H), w=(H, H)), GIVEN_IDS, IDS),
    ),
    "a sum": (
        lambda p, x, y: ops.linear_softmax_cross_entropy(
            ops.gelu(p["e"][x] @ p["w"]), p["e"], y, p["p"], smoothing=0.1
        ),
        *(drawn(e=(V, H), w=(H, H), p=(T,)), GIVEN_IDS, IDS),
    ),
    "learned vectors": (
        lambda p, x, y: logits_cost(p["h"], p["e"], y),
        *(drawn(e=(V, H), h=(T, H)), GIVEN_IDS, IDS),
    ),
    "attention": (squared(projected), drawn(**HEADS, o=(4, D, H)), X, Y),
    "learned keys": (
        squared(learned_keys),
        *(drawn(q=(D, 4, D), k=(7, 2, D), v=(7, 2, D)), X, Y),
    ),
    "in a scan": (
        squared(in_scan),
        drawn(**{"in": (D, H), "wx": (H, H), "wh": (2, H, H), "b": (2, H)}),
        *(X, Y),
    ),
    "attention in a scan": (
        squared(attention_in_scan),
        drawn(**{"in": (D, H), "w": (2, H, H), "v": (T, 1, H)}),
        *(X, Y),
    ),
    "by chunks": (by_chunks, drawn(e=(V, H), w=(H, H)), GIVEN_IDS, IDS),
    "of every head": (of_every_head, drawn(e=(V, H), w=(2, V, H)), GIVEN_IDS, IDS),
    "a branch": (squared(chosen), drawn(**RECURRENT), X, Y),
    "a checkpoint": (squared(again), drawn(**RECURRENT), X, Y),
    "a weight of the example's": (
        squared(lambda p, x: ops.rnn(x, p["wx"], p["wh"] * x.mean(), p["b"])[0]),
        *(drawn(**RECURRENT), X, Y),
    ),
    "vmap inside": (
        squared(
            lambda p, x: jax.vmap(lambda x: ops.rnn(x, p["wx"], p["wh"], p["b"])[0])(
                jnp.stack([x, -x])
            ).sum(0)
        ),
        *(drawn(**RECURRENT), X, Y),
    ),
    "a gradient inside": (
        squared(
            lambda p, x: jax.grad(lambda x: ops.rnn(x, p["wx"], p["wh"], p["b"])[0].sum())(x)[:, :1]
        ),
        *(drawn(**RECURRENT), X, Y),
    ),
    "of parameters alone": (
        squared(lambda p, x: x @ p["o"] + ops.rnn(p["x"], p["wx"], p["wh"], p["b"])[0]),
        *(drawn(**RECURRENT, x=(T, D), o=(D, H)), X, Y),
    ),
}
OFTEN = ("lstm", "gru", "tied", "a sum", "learned keys", "in a scan", "by chunks")


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in COSTS]
)
def test_quantities_of_what_calls_them_equal_their_definitions(name):
    cost, params, x, y = COSTS[name]
    v = direction(params)
    ours = jax.jit(lambda: first_order(cost, None, v, params, x, y))()
    wanted = jax.jit(lambda: first_order_by_vmap(cost, v, params, x, y))()
    check_equal(ours, wanted, WITHIN)


def test_a_branch_that_is_not_taken_leaves_nothing_that_is_not_finite():
    def cost(p, x, y):
        branches = (
            lambda x: ops.rnn(jnp.log(x), p["wx"], p["wh"], p["b"])[0],
            lambda x: x @ p["wx"].T,
        )
        return ((lax.cond(x[0, 0] > 0, *branches, x) - y) ** 2).sum()

    x, params = np.abs(X), drawn(**RECURRENT)
    x[1] = 0
    norms = bp.per_example_grad_norms(cost, None)(params, x, Y)
    for n in range(2):  # one by one: under vmap, JAX takes the branch's 0 · ∞ up
        gradient = jax.grad(cost)(params, x[n], Y[n])
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(norms[n], norm, rtol=1e-12)


def test_a_traced_layer_is_the_layer_by_hand():
    """Also where factors are asked for their vectors, and δ comes in from a loss above."""
    params = {name: GRU[name] for name in ("weight_x", "weight_h", "bias", "bias_n")}
    traced = bp.from_function(lambda params, x: ops.gru(x, **params)[0])

    def quantities(model):
        kronecker = bp.kronecker_factors(model, bp.losses.squared_error, fisher="empirical")
        return {
            "K-FAC": kronecker(params, X, Y),
            "GGN": bp.ggnvp(model, bp.losses.squared_error)(params, X, Y, params),
            "kernel": bp.empirical_ntk(model)(params, X),
        }

    ours, wanted = (jax.jit(functools.partial(quantities, m))() for m in (traced, bp.gru(H)))
    check_equal(ours, wanted, WITHIN)


def sizes(function, *arrays):
    """Of the arrays in a compiled function, but for what it is given and returns."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    shapes = re.findall(r"(?:f64|f32)\[([\d,]+)\]", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


LEAN = {
    "lstm": (
        squared(lambda p, x: ops.lstm(x, p["k"].T, p["wh"], p["b"])[0]),
        drawn(k=(32, 256), wh=(256, 64), b=(256,)),
        *(normal(1, N, 4, 32), np.zeros((N, 4, 64))),
    ),
    "gru": (
        squared(lambda p, x: ops.gru(x, p["k"].T, p["wh"], p["b"], p["bn"])[0]),
        drawn(k=(32, 192), wh=(192, 64), b=(192,), bn=(64,)),
        *(normal(1, N, 4, 32), np.zeros((N, 4, 64))),
    ),
    "tied": (COSTS["tied"][0], drawn(e=(512, 32), w=(32, 32)), GIVEN_IDS[:, :4], IDS[:, :4]),
}


@pytest.mark.parametrize(
    "name", ["lstm", "tied", pytest.param("gru", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("quantity", [bp.per_example_grad_norms, bp.grad, bp.clipped_grad])
def test_no_example_has_a_weight_of_its_own(name, quantity):
    cost, params, x, y = LEAN[name]
    options = {"max_norm": 0.5} if quantity is bp.clipped_grad else {}
    largest = max(sizes(quantity(cost, None, **options), params, x, y))
    assert largest < N * max(p.size for p in params.values())
    each = max(sizes(bp.per_example_grads(cost, None), params, x, y))  # which must have
    assert each >= N * max(p.size for p in params.values())


def test_explain_says_what_is_kept():
    cost, params, x, y = COSTS["tied"]
    row = bp.explain(cost, params, x, y).rows[0]
    assert row.meets == ("look-up", "ops.linear_softmax_cross_entropy(smoothing=0.1, z_loss=0.1)")
    assert row.kept == "a sum of 2: 6 rows of 11, Σ δ aᵀ over 6, δ made anew"
    assert row.unknown == () and 0 < row.share < 4
    cost, params, x, y = COSTS["gru"]
    rows = {row.parameter: row for row in bp.explain(cost, params, x, y).rows}
    assert rows["['wx']"].meets == ("ops.gru",)
    assert rows["['wx']"].kept == rows["['wh']"].kept == "Σ δ aᵀ over 6"
    assert not any(row.unknown for row in rows.values())


def test_the_hessian_goes_through_them():
    for name in ("two sequences", "tied", "a sum"):
        cost, params, x, y = COSTS[name]
        v = direction(params)
        found = jax.jit(bp.hvp(cost, None))(params, x, y, v)

        def mean(params, cost=cost, x=x, y=y):
            return jax.vmap(cost, (None, 0, 0))(params, x, y).mean()

        gradient = jax.jit(jax.grad(mean))
        ends = [
            gradient(jax.tree.map(lambda p, v, step=step: p + step * v, params, v))
            for step in (1e-5, -1e-5)
        ]
        wanted = jax.tree.map(lambda a, b: (a - b) / 2e-5, *ends)
        check_equal({"": found}, {"": wanted}, 1e-7)


# ---- other libraries' parameters


def test_flax_attention_takes_it():
    linen = pytest.importorskip("flax.linen")

    def attention_fn(query, key, value, **_):
        return ops.attention(query, key, value, causal=False)

    plain, ours = (
        linen.MultiHeadDotProductAttention(2, param_dtype=jnp.float64, **how)
        for how in ({}, {"attention_fn": attention_fn})
    )
    params = plain.init(jax.random.key(0), HIDDEN)
    check_equal({"": ours.apply(params, HIDDEN)}, {"": plain.apply(params, HIDDEN)}, 1e-7)


def test_flax_lstm_parameters_fit():
    linen = pytest.importorskip("flax.linen")
    module = linen.RNN(linen.OptimizedLSTMCell(H, param_dtype=jnp.float64))
    params = module.init(jax.random.key(0), X)
    p = params["params"]["cell"]
    weight_x, weight_h = (
        jnp.concatenate([p[k + gate]["kernel"] for gate in "ifgo"], 1).T for k in "ih"
    )
    bias = jnp.concatenate([p["h" + gate]["bias"] for gate in "ifgo"])
    found, _ = ops.lstm(X, weight_x, weight_h, bias)
    check_equal({"": found}, {"": module.apply(params, X)}, WITHIN)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_equinox_parameters_fit(name):
    nn = pytest.importorskip("equinox").nn
    cell = getattr(nn, name)(D, H, key=jax.random.key(0), dtype=jnp.float64)
    arrays = (cell.weight_ih, cell.weight_hh, cell.bias)
    zeros = jnp.zeros(H)

    def step(state, x):
        state = cell(x, state)
        return state, state[0] if isinstance(state, tuple) else state

    if name == "LSTMCell":
        found, begin = ops.lstm(X, *arrays)[0], (zeros, zeros)
    else:
        found, begin = ops.gru(X, *arrays, cell.bias_n)[0], zeros
    wanted = jax.vmap(lambda x: lax.scan(step, begin, x)[1])(X)
    check_equal({"": found}, {"": wanted}, WITHIN)


# ---- errors


WRONG = [
    ("lstm: x:", lambda: ops.lstm(jnp.ones(3), **weights(4))),
    ("lstm: x:", lambda: ops.lstm(jnp.ones((0, 3)), **weights(4))),
    ("lstm: x:", lambda: ops.lstm(jnp.ones((5, 3), int), **weights(4))),
    ("lstm: weight_x:", lambda: ops.lstm(jnp.ones((5, 2)), **weights(4))),
    ("lstm: weight_h:", lambda: ops.lstm(X, **weights(3))),
    ("lstm: c0:", lambda: ops.lstm(**{**LSTM, "c0": jnp.ones(H)})),
    ("gru: bias:", lambda: ops.gru(**{**GRU, "bias": jnp.ones(H)})),
    ("gru: bias_n:", lambda: ops.gru(**{**GRU, "bias_n": jnp.ones(3 * H)})),
    ("rnn: h0:", lambda: ops.rnn(**{**RNN, "h0": "zeros"})),
    ("rnn: weight_h:", lambda: ops.rnn(**{**RNN, "weight_h": jnp.ones(H)})),
    ("entropy: h:", lambda: ops.linear_softmax_cross_entropy(1.0, jnp.ones((V, H)), IDS)),
    ("entropy: weight:", lambda: ops.linear_softmax_cross_entropy(HIDDEN, jnp.ones((H, V)), IDS)),
    ("entropy: ids:", lambda: ops.linear_softmax_cross_entropy(ids=IDS[0], **VOCABULARY)),
    ("entropy: ids:", lambda: ops.linear_softmax_cross_entropy(ids=HIDDEN, **VOCABULARY)),
    ("entropy: ids:", lambda: ops.linear_softmax_cross_entropy(ids=IDS + V, **VOCABULARY)),
    (
        "entropy: weights:",
        lambda: ops.linear_softmax_cross_entropy(ids=IDS, weights=X, **VOCABULARY),
    ),
    (
        "entropy: weights:",
        lambda: ops.linear_softmax_cross_entropy(ids=IDS, weights=IDS, **VOCABULARY),
    ),
    (
        "entropy: smoothing:",
        lambda: ops.linear_softmax_cross_entropy(ids=IDS, smoothing=2, **VOCABULARY),
    ),
    (
        "entropy: z_loss:",
        lambda: jax.jit(
            lambda z: ops.linear_softmax_cross_entropy(ids=IDS, z_loss=z, **VOCABULARY)
        )(0.1),
    ),
    ("attention: query:", lambda: ops.attention(Q[0, 0], K, VALUES)),
    ("attention: key:", lambda: ops.attention(Q, Q[:, :, :3], VALUES)),
    ("attention: key:", lambda: ops.attention(Q, K[0], VALUES)),
    ("attention: value:", lambda: ops.attention(Q, K, VALUES[:, 1:])),
    ("attention: mask:", lambda: ops.attention(Q, K, VALUES, mask=SEEN[:2])),
    ("attention: mask:", lambda: ops.attention(Q, K, VALUES, mask=1.0 * SEEN)),
    ("attention: bias:", lambda: ops.attention(Q, K, VALUES, bias=np.ones((T, 1)))),
    ("attention: bias:", lambda: ops.attention(Q, K, VALUES, bias=SEEN)),
    ("attention: window:", lambda: ops.attention(Q, K, VALUES, window=0)),
    ("attention: causal:", lambda: ops.attention(Q, K, VALUES, causal=1)),
    ("attention: lengths:", lambda: ops.attention(Q, K, VALUES, lengths=LENGTHS[:2])),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_does_not_fit_is_named(case):
    words, call = WRONG[case]
    with pytest.raises(bp.ModelError, match=f"ops..*{words} takes"):
        call()


def test_there_is_no_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ops.rnn(x, **weights(1))[0], (X,), (X,))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("n", [2, 4])  # XLA has been wrong about four
def test_gradients_of_single_sequences_under_vmap(name, n):
    with jax.enable_x64(True):
        layer, random = getattr(bp, name)(5), np.random.default_rng(0)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((6, 4)))
        params = {k: jnp.asarray(0.4 * random.normal(size=p.shape)) for k, p in shapes.items()}
        x = jnp.asarray(random.normal(size=(n, 6, 4)))

        def given(params):
            h = jax.vmap(lambda x: getattr(bp.ops, name)(x, **params)[0])(x)
            return (h**2).sum()

        def wanted(params):
            return (layer.reference(params, x) ** 2).sum()

        pairs = jax.tree.map(lambda *pair: pair, jax.grad(given)(params), jax.grad(wanted)(params))
        for found, right in pairs.values():
            assert jnp.abs(found - right).max() <= 1e-11 * jnp.abs(right).max()
