"""Gated linear units: one half of the features, gated by the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import ModelError, described, function, text
from ..docstrings import explained
from ..layer import Layer, no_parameters
from ..rules import rule
from .activations import check_features, gelu_derivative, silu_derivative

Tree = Any


@explained(
    forward="[u, g] = z,  a = u ⊙ σ(g)",
    backward="∂C/∂u = ∂C/∂a ⊙ σ(g),  ∂C/∂g = ∂C/∂a ⊙ u ⊙ σ′(g)",
    x="z",
    y="a",
)
def gated(sigma: Callable[[Array], Array], dsigma: Callable[[Array], Array], *, name: str) -> Layer:
    """One half of the features, gated by the other: a gated linear unit.

    z is ``(*positions, 2h)`` and a ``(*positions, h)``. (Dauphin et al. 2017; Shazeer 2020, "GLU
    variants improve transformer".)

    Args:
      sigma: σ, element by element.
      dsigma: σ′ as a function of g.
      name: how errors call it.

    Raises:
      ModelError: in use, if the number of features is odd.

    Example:
      >>> gate = bp.gated(jnp.tanh, lambda g: 1 - jnp.tanh(g) ** 2, name="tanh gate")
      >>> gate.apply((), jnp.array([[3.0, 0.0]])).tolist()
      [[0.0]]
    """

    function("gated: sigma", sigma)
    function("gated: dsigma", dsigma)
    text("gated: name", name)

    def check(params: Tree, z: Array) -> None:
        check_features(params, z)
        if z.shape[-1] % 2:
            raise ModelError(f"takes an even number of features, got {described(z)}")

    def forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
        u, g = jnp.split(z, 2, axis=-1)
        return u * sigma(g), z

    def backward(params: Tree, z: Array, da: Array) -> tuple[Array, Tree]:
        u, g = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([da * sigma(g), da * u * dsigma(g)], axis=-1), ()

    return rule(no_parameters, forward, backward, name=name, check=check, batched=True)


def _sigmoid_derivative(z: Array) -> Array:
    return lax.logistic(z) * lax.logistic(-z)


def _gated_by(sigma: str, layer: Layer) -> Layer:
    doc = f"""A gated linear unit with σ = {sigma}.

    z is ``(*positions, 2h)`` and a ``(*positions, h)``. (Dauphin et al. 2017; Shazeer 2020, "GLU
    variants improve transformer".)"""
    return dataclasses.replace(layer, doc=doc)


glu = _gated_by("sigmoid", gated(lax.logistic, _sigmoid_derivative, name="glu"))
reglu = _gated_by("relu", gated(jax.nn.relu, lambda g: (g > 0).astype(g.dtype), name="reglu"))
geglu = _gated_by(
    "gelu", gated(functools.partial(jax.nn.gelu, approximate=False), gelu_derivative, name="geglu")
)
swiglu = _gated_by("silu", gated(jax.nn.silu, silu_derivative, name="swiglu"))
