"""Every layer against two oracles: autodiff of its textbook form, and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import COMBINED, LAYERS, RANDOM, RULES

import functional_bp as bp
from functional_bp import contractions


@pytest.mark.parametrize("name", LAYERS)
def test_backward_equals_autodiff_in_float64(name):
    bp.testing.check_layer(*LAYERS[name])


@pytest.mark.parametrize("name", [*RULES, "residual", "tied"])
def test_backward_equals_autodiff_in_float32(name):
    bp.testing.check_layer(*LAYERS[name], dtype="float32")


@pytest.mark.parametrize("name", ["gelu", "tied"])
def test_backward_is_close_to_autodiff_in_bfloat16(name):
    """To the few of bfloat16's 8 bits that both sides have left."""
    bp.testing.check_layer(*LAYERS[name], dtype="bfloat16", tolerance=0.05)


@pytest.mark.parametrize("name", RANDOM)
def test_random_backward_equals_autodiff(name):
    bp.testing.check_layer(*RANDOM[name])
    bp.testing.check_layer(*RANDOM[name], key=jax.random.key(1))


@pytest.mark.parametrize("name", LAYERS)
def test_backward_equals_central_differences(name):
    """⟨∇f, d⟩ ≈ (f(θ + h d) − f(θ − h d)) / 2h along random directions d, for
    f = Σ_n ⟨y_n, δ_n⟩ over a batch: an oracle that shares nothing with autodiff."""
    layer, x = LAYERS[name]
    draw = np.random.default_rng(0)

    def normal_like(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape)), tree)

    with jax.enable_x64(True), jax.disable_jit():
        params = normal_like(jax.eval_shape(layer.init, jax.random.key(0), x))
        xs = jnp.asarray(draw.normal(size=(3, *x.shape)))
        y, residuals = layer.batched.forward(params, xs)
        dy = normal_like(y)
        dx, gradient = layer.batched.backward(params, residuals, dy, contractions.total)

        def f(leaves):
            params, xs = jax.tree.unflatten(structure, leaves)
            return inner(jax.tree.leaves(layer.apply(params, xs)), jax.tree.leaves(dy))

        leaves, structure = jax.tree.flatten((params, xs))
        for i, gradient_i in enumerate(jax.tree.leaves((gradient, dx))):
            for _ in range(2):
                direction, h = draw.normal(size=leaves[i].shape), 1e-5
                above, below = (
                    f([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]])
                    for step in (h, -h)
                )
                scale = np.linalg.norm(gradient_i) * np.linalg.norm(direction)
                error = inner([gradient_i], [direction]) - (above - below) / (2 * h)
                assert abs(error) <= 1e-8 * scale


def inner(a, b):
    return sum(np.vdot(x, y) for x, y in zip(a, b, strict=True))


def test_the_list_of_layers_has_every_activation_and_combinator():
    names = {layer.name.split("(")[0] for layer, _ in LAYERS.values()}
    assert names >= {"dense", "flatten", "identity", "relu", "sigmoid"}
    assert names >= {"chain", "residual", "parallel", "repeat", "tied"}
    assert not any(layer.parts for layer, _ in RULES.values())
    assert all(layer.parts for layer, _ in COMBINED.values())
