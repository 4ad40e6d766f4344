"""What ``bp.inspect`` says of a pass: the numbers of the other quantities, and their names."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import IDS_OF_WORDS, LAYERS, MANY, SEQUENCE, VECTOR, padded, scale

import functional_bp as bp

SQUARED, SOFTMAX = bp.losses.squared_error, bp.losses.softmax_cross_entropy
BLOCK = bp.chain(bp.dense(4), bp.tanh)
TRACED = bp.from_function(
    lambda params, x: jnp.tanh(params["w"] @ x) + params["b"],
    init=lambda key, x: {"w": jax.random.normal(key, (3, *x.shape)), "b": jnp.ones(3)},
)
MODELS = {
    "perceptron": (bp.chain(bp.dense(3), bp.sigmoid, bp.dense(2), bp.sigmoid), VECTOR, SQUARED),
    "norms and branches": (
        bp.chain(bp.residual(bp.chain(bp.layer_norm(), BLOCK)), bp.dropout(0.1), bp.dense(3)),
        VECTOR,
        SOFTMAX,
    ),
    "a stack": (bp.chain(bp.repeat(bp.residual(BLOCK), 3), bp.dense(3)), VECTOR, SOFTMAX),
    "nested stacks": (bp.repeat(bp.repeat(BLOCK, 2), 2), VECTOR, SQUARED),
    "tied": (
        bp.tied(bp.chain(BLOCK, bp.dense(4)), {(1, "weight"): (0, 0, "weight")}),
        VECTOR,
        SQUARED,
    ),
    "words": (
        bp.chain(bp.embedding(5, 4), bp.lstm(3, output="last"), bp.dense(2)),
        IDS_OF_WORDS,
        SOFTMAX,
    ),
    "a padded sequence": (
        bp.chain(bp.gru(2), bp.at("x", bp.tanh), bp.entry("x"), bp.dense(2)),
        padded("h"),
        SQUARED,
    ),
    "both directions": (bp.chain(bp.bidirectional(bp.rnn(3)), bp.dense(2)), SEQUENCE, SQUARED),
    "traced": (bp.chain(bp.dense(4), TRACED, bp.dense(2)), VECTOR, SQUARED),
    "a user's rule": (bp.chain(scale(), bp.dense(2)), VECTOR, SQUARED),
    "branches": (
        bp.chain(bp.parallel(bp.dense(2), BLOCK), bp.concatenate(), bp.relu),
        VECTOR,
        SQUARED,
    ),
}
MIXING = bp.chain(bp.dense(4, bias=False), bp.batch_norm(), bp.relu, bp.dense(3))
N = 3


def case(model, x, loss, n=N):
    """Parameters and a batch, in float64."""
    random = np.random.default_rng(0)

    def drawn(leaf):
        leaf = jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.stack([jnp.asarray(leaf)] * n)
        return jnp.asarray(random.normal(size=(n, *leaf.shape)))

    x = jax.tree.map(drawn, x)
    params = model.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], x))
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.1 * random.normal(size=p.shape)), params)
    a = jax.eval_shape(model.apply, params, x)
    if loss is SOFTMAX:
        return params, x, jnp.arange(n) % a.shape[-1]
    return params, x, jnp.asarray(random.normal(size=a.shape))


def close(given, wanted):
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        assert np.abs(a - b).max() <= 1e-12 * max(1e-300, np.abs(b).max())


def check_deltas(layers, deltas):
    """Each layer's d_output is its entry of ``bp.deltas``, in a stack that at its index."""
    for layer, delta in zip(layers, deltas, strict=True):
        if layer.equations.name in ("tied", "at"):
            layer = layer[0]
        if layer.equations.name == "repeat":
            parts = [jax.tree.map(lambda d, i=i: d[:, i], delta) for i in range(len(layer))]
            check_deltas(layer.parts, parts)
        elif isinstance(delta, tuple):
            check_deltas(layer.parts, delta)
        else:
            close(layer.d_output, delta)


@pytest.mark.parametrize("name", [*MODELS, "batch norm"])
def test_its_numbers_are_those_of_the_other_quantities(name):
    """To 1e-12, of a batch and of each of its examples."""
    model, x, loss = MODELS.get(name, (MIXING, VECTOR, SOFTMAX))
    with jax.enable_x64(True):
        params, x, y = case(model, x, loss)
        found = bp.inspect(model, loss)(params, x, y, example=None)
        cost, gradient = bp.value_and_grad(model, loss)(params, x, y)
        close((found.cost, found.gradient), (cost, gradient))
        outputs = model.forward(params, x)[0]
        close(found.outputs, outputs)
        deltas = bp.deltas(model, loss)(params, x, y)
        whole = found.model.equations.name in ("repeat", "tied")
        check_deltas((found.model,) if whole else tuple(found), (deltas,) if whole else deltas)
        if name not in MODELS:
            return
        close(found.outputs, model.apply(params, x))
        each = bp.per_example_grads(model, loss)(params, x, y)
        for n in range(N):
            one = bp.inspect(model, loss)(params, x, y, example=n)
            close(one.gradient, jax.tree.map(lambda g, n=n: g[n], each))
            close(one.outputs, jax.tree.map(lambda a, n=n: a[n], outputs))


@pytest.mark.parametrize("name", ["perceptron", "a stack", "words", "traced", "branches"])
def test_gradients_at_the_layers_are_those_of_the_parameters(name):
    model, x, loss = MODELS[name]
    with jax.enable_x64(True):
        found = bp.inspect(model, loss)(*case(model, x, loss))
        at_layers = [g for layer in found.layers for g in layer.gradients.values()]
        size = sum(g.size for g in jax.tree.leaves(found.gradient))
        assert sum(g.size for g in at_layers) == size
        squares = sum((g**2).sum() for g in at_layers)
        close(squares, sum((g**2).sum() for g in jax.tree.leaves(found.gradient)))


def test_a_network_is_checked_by_hand():
    """2-3-1, sigmoid, squared error: every number by the four equations, in NumPy."""
    model = bp.chain(bp.dense(3), bp.sigmoid, bp.dense(1), bp.sigmoid)
    with jax.enable_x64(True):
        random = np.random.default_rng(1)
        W1, b1, W2, b2 = (random.normal(size=s) for s in ((3, 2), (3,), (1, 3), (1,)))
        x, y = np.array([0.5, -1.0]), np.array([1.0])
        params = ({"weight": W1, "bias": b1}, (), {"weight": W2, "bias": b2}, ())
        found = bp.inspect(model, SQUARED)(jax.tree.map(jnp.asarray, params), x[None], y[None])

        def sigma(z):
            return 1 / (1 + np.exp(-z))

        z1 = W1 @ x + b1
        a1 = sigma(z1)
        z2 = W2 @ a1 + b2
        a2 = sigma(z2)
        delta2 = (a2 - y) * a2 * (1 - a2)  # BP1
        delta1 = (W2.T @ delta2) * a1 * (1 - a1)  # BP2
        wanted = {
            **{"x": x, "z¹": z1, "a¹": a1, "σ′(z¹)": a1 * (1 - a1), "z²": z2, "a²": a2},
            **{"σ′(z²)": a2 * (1 - a2), "∂C/∂a²": a2 - y, "δ²": delta2, "∂C/∂a¹": W2.T @ delta2},
            **{"δ¹": delta1, "∂C/∂b²": delta2, "∂C/∂W²": np.outer(delta2, a1)},  # BP3, BP4
            **{"∂C/∂b¹": delta1, "∂C/∂W¹": np.outer(delta1, x), "∂C/∂x": W1.T @ delta1},
        }
        assert set(found.values) == set(wanted)
        close(found.values, {name: wanted[name] for name in found.values})
        close(found.cost, 0.5 * (a2 - y) @ (a2 - y))


def test_delta_is_by_z_and_never_by_a():
    model, x, loss = MODELS["perceptron"]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    for dense, sigmoid in ((0, 1), (2, 3)):
        assert (found[dense].delta == found[sigmoid].delta).all()
        assert (found[dense].z == found[sigmoid].z).all()
        assert (found[sigmoid].d_output != found[sigmoid].delta).any()
    assert (found[1].delta == found["δ¹"]).all()
    assert (found[1].a == found["a¹"]).all()
    with pytest.raises(AttributeError, match=r"dense.3. has no a of its own: .*called x, .*z¹"):
        _ = found[0].a
    norm = bp.inspect(bp.layer_norm(), SQUARED)(*case(bp.layer_norm(), VECTOR, SQUARED))
    with pytest.raises(AttributeError, match=r"layer_norm.. has no z"):
        _ = norm[0].delta
    with pytest.raises(KeyError, match="δ³: has x, ∂C/∂x, z¹"):
        _ = found["δ³"]


def test_indices_stay_those_of_the_results():
    model, x, loss = MODELS["tied"]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    assert [layer.equations.name for layer in found] == ["chain", "dense(4)"]
    assert found[0][1].equations.name == "tanh"
    model, x, loss = MODELS["a stack"]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    assert len(found[0]) == 3
    assert found[0][2][0][1].equations.y == "a³"


def test_time_is_there_step_by_step():
    model, x, loss = MODELS["words"]
    params, x, y = case(model, x, loss)
    found = bp.inspect(model, loss)(params, x, y)
    lstm = found[1]
    assert lstm.delta.shape == (3, 12)
    step = lstm.step(2)
    assert set(step) == {"∂C/∂h²_t", "δ²_t", "z²_t"}
    assert (step["δ²_t"] == lstm.delta[2]).all()
    x_t = found[0].output
    assert np.allclose(lstm.delta.T @ x_t, lstm.gradient["weight_x"], atol=1e-6)
    assert "‖·‖ by t: " in str(found)
    with pytest.raises(bp.ModelError, match=r"step: t: \[1\] lstm.* takes a step below 3, got 3"):
        lstm.step(3)


def test_what_comes_back_through_time_is_in_the_equations():
    """Two lstm: each number over time from the equation that stands beside it."""
    model = bp.chain(bp.lstm(3), bp.lstm(2), bp.dense(2))
    with jax.enable_x64(True):
        params, x, y = case(model, SEQUENCE, SQUARED)
        found = bp.inspect(model, SQUARED)(params, x, y)
        one, two, last = (p for p in params)
        later = np.concatenate([found["δ¹_t"][1:], np.zeros((1, 12))])
        close(found["∂C/∂h¹_t"], found["δ²_t"] @ two["weight_x"] + later @ one["weight_h"])
        later = np.concatenate([found["δ²_t"][1:], np.zeros((1, 8))])
        close(found["∂C/∂h²_t"], found["δ³"] @ last["weight"] + later @ two["weight_h"])
        h = np.concatenate([np.zeros((1, 3)), found["h¹"][:-1]])
        close(found["z¹_t"], x[0] @ one["weight_x"].T + one["bias"] + h @ one["weight_h"].T)
    sides = found[0].sides
    assert sides["∂C/∂h¹_t"] == "(W²_x)ᵀ δ²_t + (W¹_h)ᵀ δ¹_{t+1}"
    assert sides["∂C/∂h²_t"] == "(W³)ᵀ δ³_t + (W²_h)ᵀ δ²_{t+1}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rich", [True, False])
def test_its_table_fits_the_terminal(name, rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    model, x, loss = MODELS[name]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, str(found).splitlines())) <= width
    head, columns, *rows = str(found).splitlines()
    assert head == f"C = {float(found.cost):.3g}: {loss.name}, one example"
    assert columns.split() == ["shape", "‖·‖", "zeros", "numbers"]
    assert any(layer.name in row for layer in found.layers for row in rows)


def test_a_long_table_folds_what_has_parts():
    model = bp.chain(bp.dense(4), bp.repeat(bp.residual(BLOCK), 12), bp.dense(2))
    found = bp.inspect(model, SQUARED)(*case(model, VECTOR, SQUARED))
    names = [line for line in str(found).splitlines() if line.startswith("[")]
    assert [name.split()[0] for name in names] == ["[0]", "[1]", "[2]"]
    assert "  y¹³" in str(found)  # what the stack gives
    assert len(str(found[1]).splitlines()) <= 61
    assert "[1][11] residual" in str(found[1])
    assert "W¹³ y¹² + b¹³" in str(found[1][11])


def test_equations_stand_beside_the_numbers():
    model, x, loss = MODELS["perceptron"]
    text = str(bp.inspect(model, loss)(*case(model, x, loss)))
    for said in ("z¹ = W¹ x + b¹", "∂C/∂W² = δ² (a¹)ᵀ  (BP4)", "∂C/∂b¹ = δ¹  (BP3)"):
        assert said in text
    text = str(bp.inspect(model, loss)(*case(model, x, loss), example=None))
    assert f"{N} examples, means over them" in text
    assert "∂C/∂b¹ = mean over n of δ¹" in text
    assert "(3, 4)" in text
    part = str(bp.inspect(model, loss)(*case(model, x, loss))[0])
    assert "δ¹ = ∂C/∂a¹ ⊙ a¹ ⊙ (1 − a¹)" in part


def test_a_layer_is_found_by_its_place_and_an_array_by_an_easy_name():
    model, x, loss = MODELS["a stack"]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    assert found[0, 2, 0, 1] is found[0][2][0][1]
    assert (found["δ4"] == found["δ⁴"]).all()
    with pytest.raises(IndexError, match="takes a layer's place, 0 to 1, got 2"):
        _ = found[2]


def test_a_notebook_shows_the_arrays_folded(monkeypatch):
    model, x, loss = MODELS["norms and branches"]
    found = bp.inspect(model, loss)(*case(model, x, loss))
    shown = found._repr_html_()
    assert "<treescope-container" in shown
    monkeypatch.setitem(sys.modules, "treescope", None)
    assert found._repr_html_() is None


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_can_be_looked_into(name):
    layer, x = LAYERS[name]
    if name == "batch norms in a branch and a shortcut":
        x = MANY
    params = layer.init(jax.random.key(0), jax.tree.map(jnp.ones_like, x))
    batch = jax.tree.map(lambda leaf: jnp.stack([jnp.ones_like(leaf)] * 2), x)
    if isinstance(jax.eval_shape(lambda: layer.forward(params, batch)[0]), dict):
        layer, params = bp.chain(layer, bp.entry("x")), (params, ())
    half_square = bp.losses.loss(  # of whatever the layer gives, two arrays included
        lambda a, y: sum(0.5 * jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(a)),
        lambda a, y: a,
        name="half_square",
    )
    found = bp.inspect(layer, half_square)(params, batch, jnp.zeros(2), example=None)
    assert found.values and str(found)
    gradient = bp.grad(layer, half_square)(params, batch, jnp.zeros(2))
    for a, b in zip(*map(jax.tree.leaves, (found.gradient, gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32


def test_what_does_not_fit_is_said():
    params, x, y = case(MIXING, VECTOR, SOFTMAX)
    with pytest.raises(bp.ModelError, match="mixes the examples"):
        bp.inspect(MIXING, SOFTMAX)(params, x, y)
    model, x, loss = MODELS["perceptron"]
    with pytest.raises(bp.ModelError, match="example: takes one of the batch, 0 to 2, or"):
        bp.inspect(model, loss)(*case(model, x, loss), example=3)
    with pytest.raises(bp.ModelError, match="takes a layer and a loss"):
        bp.inspect(lambda params, x, y: 0.0, None)


def test_noise_is_that_of_the_key():
    model = bp.chain(bp.dense(4), bp.dropout(0.5), bp.dense(2))
    key = jax.random.key(3)
    with jax.enable_x64(True):
        params, x, y = case(model, VECTOR, SQUARED)
        found = bp.inspect(model, SQUARED)(params, x, y, example=None, key=key)
        close(found.gradient, bp.grad(model, SQUARED)(params, x, y, key=key))
    assert "y¹ = m ⊙ z¹ / (1 − p)" in str(found)


def test_a_loss_with_parameters_is_looked_into():
    loss = bp.losses.loss(
        lambda params, a, y: 0.5 * jnp.sum((params["s"] * a - y) ** 2),
        lambda params, a, y: (
            params["s"] * (params["s"] * a - y),
            {"s": bp.factors.Itself(a * (params["s"] * a - y))},
        ),
        init=lambda key, a, y: {"s": jnp.ones(a.shape)},
        name="scaled",
    )
    with jax.enable_x64(True):
        params, x, y = case(bp.dense(2), VECTOR, SQUARED)
        params = (params, {"s": jnp.full(2, 2.0)})
        found = bp.inspect(bp.dense(2), loss)(params, x, y, example=None)
        close(found.gradient, bp.grad(bp.dense(2), loss)(params, x, y))


def test_no_viewer_is_imported_until_asked_for():
    code = (
        "import sys, functional_bp as bp\n"
        "assert bp.inspect and bp.equations and bp.pictures\n"
        "late = {'matplotlib', 'rich', 'treescope', 'tqdm', 'IPython'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
