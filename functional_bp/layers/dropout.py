"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import number
from ..docstrings import explained
from ..layer import Layer, check_array, no_parameters
from ..rules import rule

Tree = Any


@explained(
    forward="y = m ⊙ x / (1 − p),  m_j = 1 with probability 1 − p, else 0",
    backward="∂C/∂x = m ⊙ ∂C/∂y / (1 − p)",
)
def dropout(rate: float) -> Layer:
    """Drops each number with probability p, and scales up those it keeps.

    Without a key (inference) y = x, whatever its shape. The mask is kept, as booleans, for the way
    back: on the CPU that was faster than drawing it twice. (Srivastava et al. 2014.)

    Args:
      rate: p, from 0 and below 1.

    Raises:
      ModelError: if ``rate`` is not at least 0 and below 1.

    Example:
      >>> bp.dropout(0.5).apply((), jnp.ones((1, 2))).tolist()
      [[1.0, 1.0]]
    """
    number("dropout: rate", rate, least=0, below=1)

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Array | None]:
        mask = None if key is None else jax.random.bernoulli(key, 1 - rate, x.shape)
        return masked(mask, x), mask

    def backward(params: Tree, mask: Array | None, dy: Array) -> tuple[Array, Tree]:
        return masked(mask, dy), ()

    def masked(mask: Array | None, x: Array) -> Array:
        return x if mask is None else jnp.where(mask, x / (1 - rate), 0)

    return rule(
        no_parameters,
        forward,
        backward,
        name=f"dropout({rate})",
        check=lambda params, x: check_array(x),
        random=True,
    )
