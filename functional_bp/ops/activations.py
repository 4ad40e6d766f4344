"""Activations as functions of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import Array

from ..checks import flag
from ..contractions import total
from ..layer import Layer
from ..layers import activations
from .checks import floating


def gelu(x: Array, *, approximate: bool = True) -> Array:
    """The Gaussian error linear unit, as ``jax.nn.gelu``, of which only x is kept.

    Forward:

        y = ½ x (1 + t),  t = tanh(√(2/π) (x + 0.044715 x³))
        y = x Φ(x)      (not approximate; Φ and φ are the normal distribution's)

    Backward:

        ∂C/∂x = ∂C/∂y ⊙ [½ (1 + t) + ½ x (1 − t²) √(2/π) (1 + 0.134145 x²)]
        ∂C/∂x = ∂C/∂y ⊙ (Φ(x) + x φ(x))

    (Hendrycks & Gimpel 2016.) Autodiff of layers in a scan keeps what lies between x and y too, up
    to two fifths of the memory of a GPT's step. There is a backward pass, and no forward mode
    (``jax.jvp``).

    Args:
      x: an array of any shape.
      approximate: with tanh.

    Returns:
      y, of x's shape.

    Raises:
      ModelError: for an array that is not of floating-point numbers.

    Example:
      >>> print(bp.ops.gelu(jnp.array([-1.0, 0.0, 1.0])).round(3))
      [-0.159  0.     0.841]
    """
    flag("ops.gelu: approximate", approximate)
    layer = activations.gelu_tanh if approximate else activations.gelu
    return _function(layer)(floating("ops.gelu: x", x))


@functools.cache
def _function(layer: Layer) -> Callable[[Array], Array]:
    """Of a layer without parameters."""

    @jax.custom_vjp
    def function(x: Array) -> Array:
        return forward(x)[0]

    def forward(x: Array) -> tuple[Array, Array]:
        return layer.forward((), x)

    def backward(kept: Array, dy: Array) -> tuple[Array]:
        return (layer.backward((), kept, dy, total)[0],)

    function.defvjp(forward, backward)
    return function
