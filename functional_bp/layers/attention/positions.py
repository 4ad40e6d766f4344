"""Where a position stands: learned and added to what is at it, or turned into queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...checks import ModelError, described, function, whole
from ...docstrings import explained
from ...factors.factored import accumulator
from ...factors.rows import Rows
from ...layer import Layer, check_array
from ...rules import rule

Tree = Any

small_normal = jax.nn.initializers.normal(0.02)


@explained(
    forward="y_t = x_t + W[t]",
    backward="∂C/∂x_t = ∂C/∂y_t,  ∂C/∂W[t] = ∂C/∂y_t      (BP3)",
)
def positions(length: int, *, weight_init: Callable[..., Array] = small_normal) -> Layer:
    """A learned vector for every position, added to what is there.

    x and y are ``(t, features)``, t up to ``length``; W is ``(length, features)``. Of a dict, say
    ``bp.at("x", bp.positions(…))``. (Gehring et al. 2017.)

    Args:
      length: the most positions that there are.
      weight_init: ``(key, shape, dtype) -> array``.

    Raises:
      ModelError: for more positions than there are vectors, and where the input does not fit.

    Example:
      >>> layer = bp.positions(100)
      >>> params = layer.init(jax.random.key(0), jnp.ones((5, 4)))
      >>> params["weight"].shape
      (100, 4)
    """
    whole("positions: length", length)
    function("positions: weight_init", weight_init)

    def init(key: Array, x: Array) -> Tree:
        check_x(x)
        return {"weight": weight_init(key, (length, x.shape[-1]), x.dtype)}

    def check_x(x: Array) -> None:
        check_array(x)
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ModelError(f"takes floating-point numbers (t, features), got {described(x)}")
        if x.shape[0] > length:
            raise ModelError(f"takes up to {length} positions, got {x.shape[0]}")

    def check(params: Tree, x: Array) -> None:
        check_x(x)
        if jax.tree.map(jnp.shape, params) != {"weight": (length, x.shape[-1])}:
            raise ModelError(
                f"takes a weight of ({length}, {x.shape[-1]}), got {described(params)}; are they "
                "another model's?"
            )

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        return x + params["weight"][None, : x.shape[1]], None

    def backward(params: Tree, residuals: None, dy: Array) -> tuple[Array, Tree]:
        t = jnp.broadcast_to(jnp.arange(dy.shape[1]), dy.shape[:2])
        return dy, {"weight": Rows(t, dy, length)}

    return rule(init, forward, backward, name=f"positions({length})", check=check, batched=True)


def rotated(x: Array, base: float, *, back: bool = False) -> Array:
    """Rotary positions (Su et al. 2021): at position t the pair (x_i, x_{i + d/2}) turned by the
    angle t base^{−2i/d}, or turned back, which is the derivative.

    x is ``(…, t, d)``, d even.
    """
    half = x.shape[-1] // 2
    dtype = accumulator(x)
    rate = jnp.asarray(base, dtype) ** (-jnp.arange(half, dtype=dtype) / half)
    angle = jnp.arange(x.shape[-2], dtype=dtype)[:, None] * rate[None, :]
    angle = jnp.expand_dims(angle, range(x.ndim - 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle) * (-1 if back else 1)
    kept, x = x.dtype, x.astype(dtype)
    first, second = x[..., :half], x[..., half:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(kept)


def alibi_slopes(heads: int) -> Array:
    """2^{−8 i / heads}, i = 1 … heads (Press et al. 2022)."""
    return jnp.asarray(2.0 ** (-8 * np.arange(1, heads + 1) / heads))
