"""A recurrent cell: one step, and how δ comes back through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import Array

from ...checks import ModelError, function, text, told, whole
from ...factors.factored import accumulator

Tree = Any
State = dict[str, Array]


@dataclass(frozen=True)
class Cell:
    """One step of a recurrent layer, for examples as columns.

    A state's vector ``(h,)`` comes as ``(h, n)`` and p_t = W_x x_t + b, made beforehand, as
    ``(k, n)``. Parameters stay as they are: ``weight_h @ s["h"]`` is right as it stands, and a
    vector takes ``[:, None]``.

    Attributes:
      name: how errors call the layer.
      hidden: the number of units h.
      state: the names of the state's parts, each ``(h,)``; the first, ``h``, is the output.
      init: ``(key, features, dtype) -> params``, with ``weight_x (k, d)`` and ``bias (k,)``.
      forward: ``(params, s_{t−1}, p_t) -> (s_t, saved)``.
      local: ``saved -> local``, the derivatives within a step. They do not wait for δ: all steps of
        a block come at once, ``(t, h, n)``, on all cores, where one step would keep one busy.
      backward: ``(paramsᵀ, local_t, ∂C/∂s_t) -> (∂C/∂s_{t−1}, δ_t)``, every matrix transposed.
      factors: ``(δ, x, h_before) -> factors`` over any leading axes of examples and steps; the δ
        that meets x in ``weight_x`` is ∂C/∂p.
      options: what else the layer's name says of the cell, ``{"activation": "relu"}``.

    Example:
      A cell with h_t = tanh(p_t + u ⊙ h_{t−1}), whose recurrent weight is a vector:

      >>> def init(key, features, dtype):
      ...     weight = jax.random.normal(key, (2, features), dtype)
      ...     return {"weight_x": weight, "bias": jnp.zeros(2, dtype), "u": jnp.ones(2, dtype)}
      >>> def forward(params, state, p):
      ...     h = jnp.tanh(p + params["u"][:, None] * state["h"])
      ...     return {"h": h}, h
      >>> def backward(params, df, dstate):
      ...     delta = dstate["h"] * df
      ...     return {"h": params["u"][:, None] * delta}, delta
      >>> def factors(delta, x, h_before):
      ...     u = bp.factors.Summed(delta * h_before)
      ...     weight, bias = bp.factors.Outer(delta, x), bp.factors.Summed(delta)
      ...     return {"weight_x": weight, "bias": bias, "u": u}
      >>> cell = bp.Cell("mine", 2, ("h",), init, forward, lambda h: 1 - h * h, backward, factors)
      >>> bp.testing.check_layer(bp.through_time(cell), jnp.ones((5, 3)))
    """

    name: str
    hidden: int
    state: tuple[str, ...]
    init: Callable[..., Tree]
    forward: Callable[..., tuple[State, Tree]]
    local: Callable[[Tree], Tree]
    backward: Callable[..., tuple[State, Tree]]
    factors: Callable[..., Tree]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text("cell: name", self.name)
        whole(f"{self.name}: hidden", self.hidden)
        for what in ("init", "forward", "local", "backward", "factors"):
            function(f"{self.name}: {what}", getattr(self, what))
        states = self.state if isinstance(self.state, tuple) else ()
        if not states or states[0] != "h":
            raise ModelError(
                f"{self.name}: state: takes a tuple of names, 'h' first, got {told(self.state)}"
            )


def product(W: Array, a: Array) -> Array:
    """W a for every column of a, summed in float32 at least."""
    sums = jnp.matmul(W, a, preferred_element_type=accumulator(W, a))
    return sums.astype(jnp.result_type(W, a))
