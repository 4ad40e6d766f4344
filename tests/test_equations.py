"""A model's own equations: those that its rules declare, with the names of its values."""

import re

import jax
import jax.numpy as jnp
import pytest
from layers import IDS_OF_WORDS, LAYERS, LOSSES, MANY, RANDOM, SEQUENCE, VECTOR, padded, scale

import functional_bp as bp

SQUARED = bp.losses.squared_error


def of(model, x=VECTOR, loss=SQUARED):
    return str(bp.equations(model, loss, x))


def lines(text):
    return [line.strip() for line in text.splitlines()]


def test_two_layers_are_bp1_to_bp4():
    model = bp.chain(bp.dense(3), bp.sigmoid, bp.dense(1), bp.sigmoid)
    forward, backward = of(model).split("Backward")
    assert lines(forward)[3:] == [
        *("[0] dense(3): (4,) to (3,), b¹ (3,), W¹ (3, 4)", "z¹ = W¹ x + b¹"),
        *("[1] sigmoid: (3,) to (3,)", "a¹ = 1 / (1 + e^{−z¹})"),
        *("[2] dense(1): (3,) to (1,), b² (1,), W² (1, 3)", "z² = W² a¹ + b²"),
        *("[3] sigmoid: (1,) to (1,)", "a² = 1 / (1 + e^{−z²})"),
        *("loss squared_error", "C = ½ Σ_j (a²_j − y_j)²", ""),
    ]
    assert lines(backward)[1:] == [
        *("loss squared_error", "∂C/∂a² = a² − y"),
        *("[3] sigmoid", "δ² = ∂C/∂a² ⊙ a² ⊙ (1 − a²)  (BP1)"),
        *("[2] dense(1)", "∂C/∂a¹ = (W²)ᵀ δ²  (BP2, before ⊙ σ′)"),
        *("∂C/∂b² = δ²  (BP3)", "∂C/∂W² = δ² (a¹)ᵀ  (BP4)"),
        *("[1] sigmoid", "δ¹ = ∂C/∂a¹ ⊙ a¹ ⊙ (1 − a¹)  (BP2)"),
        *("[0] dense(3)", "∂C/∂x = (W¹)ᵀ δ¹  (BP2, before ⊙ σ′)"),
        *("∂C/∂b¹ = δ¹  (BP3)", "∂C/∂W¹ = δ¹ xᵀ  (BP4)"),
    ]


def test_a_fused_loss_gives_delta_of_the_last_layer():
    text = of(bp.dense(3), loss=bp.losses.softmax_cross_entropy)
    assert "δ¹ = p Σ_k y_k − y  (BP1)" in text
    assert "C = −Σ_k y_k log p_k" in text
    text = of(bp.dense(3), SEQUENCE, bp.losses.softmax_cross_entropy)
    assert "δ¹ = (p Σ_k y_k − y) / positions  (BP1)" in text


def test_positions_and_steps_keep_their_t():
    assert "∂C/∂W¹ = Σ_t δ¹_t x_tᵀ  (BP4)" in of(bp.dense(3), SEQUENCE)
    text = of(bp.chain(bp.lstm(2), bp.dense(3)), SEQUENCE)
    assert "h¹_t = o ⊙ tanh c_t" in text
    assert "∂C/∂W¹_h = Σ_t δ¹_t (h¹_{t−1})ᵀ  (BP4)" in text
    assert "z²_t = W² h¹_t + b²" in text
    assert "δ^i = ∂C/∂c_t ⊙ [g ⊙ i (1 − i)]" in text
    assert "∂C/∂h¹_t ← ∂C/∂h¹_t + (W¹_h)ᵀ δ¹_{t+1}" in text
    assert "z¹_t = W¹_x x_t + b¹ + W¹_h h¹_{t−1}" in text


def test_layers_count_that_have_parameters_and_indices_stay_the_chains():
    text = of(bp.chain(bp.tanh, bp.dense(4), bp.flatten, bp.layer_norm(), bp.chain(bp.dense(2))))
    assert "[1] dense(4): (4,) to (4,), b¹ (4,), W¹ (4, 4)" in text
    assert "y² = s² ⊙ x̂ + b²" in text
    assert "[4][0] dense(2): (4,) to (2,), b³ (2,), W³ (2, 4)" in text


def test_a_stack_says_how_often():
    text = of(bp.chain(bp.dense(4), bp.repeat(bp.chain(bp.dense(4), bp.tanh), 6), bp.dense(1)))
    forward, backward = text.split("Backward")
    assert "[1] repeat: 6 layers, l = 1 … 6" in forward
    assert "[1] repeat: 6 layers, l = 6 … 1" in backward
    assert "x^{l+1} = a^{2,l}" in forward
    assert "∂C/∂W^{2,l} = δ^{2,l} (x^l)ᵀ  (BP4)" in backward
    assert "z³ = W³ y² + b³" in forward
    nested = of(bp.repeat(bp.repeat(bp.dense(4), 2), 3))
    assert "z^{1,l,m} = W^{1,l,m} x^m + b^{1,l,m}" in nested


def test_a_value_that_several_layers_take_has_a_term_from_each():
    text = of(bp.residual(bp.chain(bp.dense(4), bp.relu)))
    assert "y¹ = a¹ + x" in text
    assert "∂C/∂x through [0][0] = (W¹)ᵀ δ¹" in text
    assert "∂C/∂a¹ = ∂C/∂y¹" in text
    assert "∂C/∂x = ∂C/∂x through [0][0] + ∂C/∂y¹" in text
    text = of(bp.residual(bp.dense(2), bp.dense(2)))
    assert "∂C/∂x = ∂C/∂x through [0] + ∂C/∂x through [1]" in text


def test_what_is_handed_on_takes_no_part():
    model = bp.chain(bp.gru(2), bp.at("x", bp.tanh), bp.entry("x"), bp.dense(2))
    assert "through" not in of(model, padded("h"))
    text = of(bp.chain(bp.bidirectional(bp.rnn(2)), bp.dense(2)), SEQUENCE)
    assert "y²_t = [h¹_t, h²_t]" in text
    assert "[∂C/∂h¹_t, ∂C/∂h²_t] = ∂C/∂y²_t" in text


def test_a_tied_parameter_is_called_as_at_its_source():
    model = bp.chain(bp.dense(4), bp.tanh, bp.dense(4))
    text = of(bp.tied(model, {(2, "weight"): (0, "weight")}))
    assert "z² = W¹ a¹ + b²" in text
    assert "∂C/∂W¹ is the sum over its uses" in text


def test_a_users_rule_shows_what_it_declares():
    said = bp.rule(
        init=lambda key, x: {"scale": jnp.ones(x.shape)},
        forward=lambda params, x, key=None: (params["scale"] * x, x),
        backward=lambda params, x, dy: (
            params["scale"] * dy,
            {"scale": bp.factors.Itself(x * dy)},
        ),
        name="scale",
        equations=("y = s ⊙ x", "∂C/∂x = s ⊙ ∂C/∂y,  ∂C/∂s = x ⊙ ∂C/∂y"),
    )
    text = of(bp.chain(bp.dense(2), said))
    assert "y² = s² ⊙ z¹" in text
    assert "δ¹ = s² ⊙ ∂C/∂y²" in text
    assert "∂C/∂s² = z¹ ⊙ ∂C/∂y²" in text


def test_a_rule_that_declares_none_shows_its_name_and_shapes():
    text = of(scale())
    assert "scale: (4,) to (4,), s¹ (4,)" in text
    assert "y¹ = scale(x; s¹)" in text
    assert "declares no equations" in text


def test_a_rule_may_give_its_own_latex():
    own = bp.Equations("a = |z|", "∂C/∂z = ∂C/∂a ⊙ sign z", "z", "a", ("a = \\lvert z\\rvert", "d"))
    layer = bp.activation(jnp.abs, jnp.sign, name="abs", equations=own)
    latex = bp.equations(layer, SQUARED, VECTOR).latex
    assert r"\lvert" in latex
    assert r"\odot" not in latex


def test_a_traced_layer_says_what_it_met():
    layer = bp.from_function(
        lambda params, x: jnp.tanh(params["w"] @ x),
        init=lambda key, x: {"w": jnp.ones((2, *x.shape))},
    )
    text = of(layer)
    assert "δ¹ by autodiff" in text
    assert "['w'] (2, 4): matrix product; kept as δ aᵀ" in text


def test_a_model_that_does_not_make_its_parameters_takes_them():
    layer = bp.from_function(lambda params, x: params @ x)
    assert "matrix product" in str(
        bp.equations(layer, SQUARED, jnp.ones(3), params=jnp.ones((2, 3)))
    )
    with pytest.raises(bp.ModelError, match=r"takes a layer and a loss, got .*bp\.explain"):
        bp.equations(lambda params, x: x, None, jnp.ones(3))


@pytest.mark.parametrize("name", LAYERS | RANDOM)
def test_every_layer_has_equations_that_are_latex(name):
    """matplotlib's reader of LaTeX takes each of them, but for what it does not know."""
    layer, x = (LAYERS | RANDOM)[name]
    found = bp.equations(layer, SQUARED, x)
    assert found.forward and "Backward" in str(found)
    check_latex(found)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_equations_that_are_latex(name):
    found = bp.equations(bp.dense(4), LOSSES[name][0], VECTOR)
    assert "C" in str(found).split("loss ")[1]
    check_latex(found)


def check_latex(found):
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for layer in (*found.forward, *found.backward):
        for equation in (*layer.forward, *layer.backward):
            parser.parse(f"${equation.latex}$")
    assert found.latex.isascii()
    mathematics = re.findall(r"\$\$.*\$\$", found._repr_markdown_())
    assert mathematics and all(line.isascii() for line in mathematics)


def test_a_notebook_shows_latex():
    found = bp.equations(bp.chain(bp.dense(3), bp.sigmoid), SQUARED, VECTOR)
    shown = found._repr_markdown_()
    assert r"$$ z^{1} = W^{1} x + b^{1} $$" in shown
    assert r"$$ \partial C/\partial W^{1} = \delta ^{1} x^{\top}\quad (\text{BP4}) $$" in shown
    assert found.latex.startswith(r"\begin{aligned}")


def test_nothing_is_computed():
    shapes = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    assert "W¹ (100000, 100000)" in of(bp.dense(100_000), shapes)
    assert "(3,) to (3, 2)" in of(bp.embedding(5, 2), IDS_OF_WORDS)
    assert "at inference" in of(bp.batch_norm(), MANY)
