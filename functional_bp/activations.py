"""Activations: a = σ(z), element by element. Their backward is the ⊙ σ′(z) of BP1 and BP2.

An activation is a layer: it is used without a call unless it takes an argument. Shapes: z, a and
every δ have the same shape, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .layer import Layer, ModelError, described, rule

Tree = Any


def activation(
    sigma: Callable[[Array], Array],
    dsigma: Callable[[Array], Array],
    *,
    name: str | None = None,
    of_output: bool = False,
) -> Layer:
    """An activation layer from σ and its derivative.

        a = σ(z)
        ∂C/∂z = ∂C/∂a ⊙ σ′(z)

    (The element-wise chain rule: a_j depends on z_j alone.)

    Args:
      sigma: σ, element by element.
      dsigma: σ′ as a function of z; as a function of a = σ(z) if ``of_output``, which then keeps
        a and lets z go.
      name: how errors call it.

    Raises:
      ModelError: in use, if z is not of a floating dtype.
    """

    def check(params: Tree, z: Array) -> None:
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ModelError(f"takes floating-point numbers, got {described(z)}")

    def forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
        a = sigma(z)
        return a, a if of_output else z

    def backward(params: Tree, residual: Array, da: Array) -> tuple[Array, Tree]:
        return da * dsigma(residual), ()

    name = name or sigma.__name__
    return rule(no_parameters, forward, backward, name=name, check=check, positionwise=True)


def no_parameters(key: Array, x: Tree) -> Tree:
    """``init`` of a layer without parameters."""
    return ()


sigmoid = activation(lax.logistic, lambda a: a * (1 - a), name="sigmoid", of_output=True)
"""σ(z) = 1 / (1 + e^{−z}); σ′ = a (1 − a)."""

tanh = activation(lax.tanh, lambda a: 1 - a * a, name="tanh", of_output=True)
"""σ(z) = tanh z; σ′ = 1 − a²."""

relu = activation(lambda z: jnp.maximum(z, 0), lambda a: a > 0, name="relu", of_output=True)
"""σ(z) = max(z, 0); σ′ = 1 where z > 0, else 0."""


def leaky_relu(slope: float = 0.01) -> Layer:
    """σ(z) = z where z > 0, else slope · z; σ′ = 1 or slope. (Maas et al. 2013.)"""
    return activation(
        lambda z: jnp.where(z > 0, z, slope * z),
        lambda z: jnp.where(z > 0, jnp.ones_like(z), slope),
        name=f"leaky_relu({slope})",
    )


def _normal_cdf(z: Array) -> Array:
    return 0.5 * lax.erfc(-z * math.sqrt(0.5))


def _normal_pdf(z: Array) -> Array:
    return jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


gelu = activation(
    lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * _normal_pdf(z), name="gelu"
)
"""σ(z) = z Φ(z), Φ the normal distribution's; σ′ = Φ(z) + z φ(z). (Hendrycks & Gimpel 2016.)"""

_TANH_SCALE = math.sqrt(2 / math.pi)


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1 + jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z)))


def _gelu_tanh_derivative(z: Array) -> Array:
    t = jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _TANH_SCALE * (1 + 3 * 0.044715 * z * z)


gelu_tanh = activation(_gelu_tanh, _gelu_tanh_derivative, name="gelu_tanh")
"""gelu with tanh in place of Φ: σ(z) = ½ z (1 + t), t = tanh(√(2/π)(z + 0.044715 z³));
σ′ = ½ (1 + t) + ½ z (1 − t²) √(2/π) (1 + 0.134145 z²). (Hendrycks & Gimpel 2016.)"""


def _silu_derivative(z: Array) -> Array:
    s = lax.logistic(z)
    return s * (1 + z * (1 - s))


silu = activation(lambda z: z * lax.logistic(z), _silu_derivative, name="silu")
"""σ(z) = z s, s = sigmoid(z); σ′ = s (1 + z (1 − s)). (Elfwing et al. 2018.)"""

softplus = activation(
    lambda z: jnp.logaddexp(z, 0.0).astype(z.dtype), lax.logistic, name="softplus"
)
"""σ(z) = log(1 + e^z); σ′ = sigmoid(z). (Dugas et al. 2001.)"""


identity = rule(
    no_parameters,
    lambda params, x, key=None: (x, ()),
    lambda params, residuals, dy: (dy, ()),
    name="identity",
    positionwise=True,
)
"""y = x; ∂C/∂x = ∂C/∂y."""
