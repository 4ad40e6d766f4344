"""The fully connected layer, BP2–BP4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, described, flag, function, whole
from ..docstrings import explained
from ..factors.factored import Outer, Summed, accumulator
from ..layer import Layer, check_array
from ..rules import rule

Tree = Any
Initializer = Callable[..., Array]

lecun_normal = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
"""Normal with variance 1/in, for a weight ``(out, in)``. (LeCun et al. 1998.)"""


@explained(
    forward="z_t = W a_t + b",
    backward="""
        ∂C/∂a_t = Wᵀ δ_t                (BP2, before ⊙ σ′)
        ∂C/∂b   = Σ_t δ_t               (BP3)
        ∂C/∂W   = Σ_t δ_t a_tᵀ          (BP4)""",
    x="a",
    y="z",
)
def dense(
    features: int,
    *,
    bias: bool = True,
    weight_init: Initializer = lecun_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer:
    """A fully connected layer, at every position of its input.

    W is ``(out, in)``, b ``(out,)``, a ``(*positions, in)``, z and δ = ∂C/∂z ``(*positions, out)``.
    (z_j contains W_jk a_k and b_j, and nothing else of row j: the element-wise chain rule.)

    Args:
      features: out, the number of units.
      bias: whether there is a b.
      weight_init, bias_init: ``(key, shape, dtype) -> array``, as in ``jax.nn.initializers``;
        the weight's shape is ``(out, in)``.

    Raises:
      ModelError: if the input is not floating-point, has no feature axis, or does not have the
        number of features that the weight takes; if the parameters are not a dense layer's.

    Example:
      >>> layer = bp.dense(2)
      >>> params = layer.init(jax.random.key(0), jnp.ones(3))
      >>> params["weight"].shape, params["bias"].shape
      ((2, 3), (2,))
    """
    whole("dense: features", features)
    flag("dense: bias", bias)
    function("dense: weight_init", weight_init)
    function("dense: bias_init", bias_init)
    names = ("weight", "bias") if bias else ("weight",)

    def init(key: Array, x: Array) -> Tree:
        _check_input(x)
        params = {"weight": weight_init(key, (features, x.shape[-1]), x.dtype)}
        return params | {"bias": bias_init(key, (features,), x.dtype)} if bias else params

    def check(params: Tree, a: Array) -> None:
        _check_input(a)
        _check_params(params, names, features, a)

    def forward(params: Tree, a: Array, key: Array | None = None) -> tuple[Array, Array]:
        W = params["weight"]
        z = jnp.einsum("...i,oi->...o", a, W, preferred_element_type=accumulator(a, W))
        z = z.astype(jnp.result_type(a, W))
        return z + jnp.expand_dims(params["bias"], range(z.ndim - 1)) if bias else z, a

    def backward(params: Tree, a: Array, delta: Array) -> tuple[Array, Tree]:
        W = params["weight"]
        da = jnp.einsum("...o,oi->...i", delta, W, preferred_element_type=accumulator(delta, W))
        factors = {"weight": Outer(delta, a)} | ({"bias": Summed(delta)} if bias else {})
        return da.astype(jnp.result_type(a)), factors

    name = f"dense({features})" if bias else f"dense({features}, bias=False)"
    return rule(init, forward, backward, name=name, check=check, batched=True)


def _check_input(a: Array) -> None:
    check_array(a)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ModelError(f"takes floating-point numbers, got {described(a)}")
    if a.ndim == 0:
        raise ModelError(f"takes examples of shape (..., features), got {described(a)}")


def _check_params(params: Tree, names: tuple[str, ...], features: int, a: Array) -> None:
    if not isinstance(params, dict) or set(params) != set(names):
        given = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ModelError(f"takes parameters {list(names)}, got {given}; are they another model's?")
    shapes: list[tuple[int, ...]] = [getattr(params[name], "shape", ()) for name in names]
    weight, *bias = shapes
    floating = all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))
    fits = len(weight) == 2 and all(shape == (features,) for shape in (weight[:1], *bias))
    if not (fits and floating):
        raise ModelError(
            f"takes a weight of ({features}, in) and a bias of ({features},), floating-point, got "
            f"{described(params)}; are they another model's?"
        )
    if a.shape[-1] != weight[1]:
        raise ModelError(f"takes examples of shape (..., {weight[1]}), got {tuple(a.shape)}")
