"""Checks of what the functions are given."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, told


def array(what: str, value: Any) -> Array:
    """An array, or a ``ModelError``."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ModelError(f"{what}: takes an array, got {told(value)}")
    return jnp.asarray(value)


def floating(what: str, value: Any) -> Array:
    """An array of floating-point numbers."""
    a = array(what, value)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ModelError(f"{what}: takes floating-point numbers, got {a.dtype}")
    return a


def integers(what: str, value: Any) -> Array:
    """An array of integers."""
    a = array(what, value)
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise ModelError(f"{what}: takes integers, got {a.dtype}")
    return a


def bools(what: str, value: Any) -> Array:
    """An array of bools."""
    a = array(what, value)
    if a.dtype != bool:
        raise ModelError(f"{what}: takes bools, got {a.dtype}")
    return a


def shaped(what: str, a: Array, shape: tuple[int, ...]) -> None:
    """Raises unless an array has a shape."""
    if a.shape != shape:
        raise ModelError(f"{what}: takes {shape}, got {a.shape}")
