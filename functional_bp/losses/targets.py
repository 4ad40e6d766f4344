"""Targets: what shapes and values a loss takes, and which positions count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, described

Tree = Any


def is_array(a: Tree, y: Tree) -> None:
    """Raises unless outputs and targets are an array each."""
    if not (hasattr(a, "shape") and hasattr(y, "shape")):
        raise ModelError(
            "takes one array of outputs and one of targets, or a dict of y and length or mask "
            f"where the loss knows them, got {described(a)} and {described(y)}{_way_to_one(a)}"
        )


def _way_to_one(a: Tree) -> str:
    if not isinstance(a, dict) or not a:
        return ""
    return f'; bp.entry("{"x" if "x" in a else next(iter(a))}") as the last layer gives one array'


def same_shape(a: Array, y: Array) -> None:
    """Raises unless the targets are floating-point numbers of the outputs' shape."""
    is_array(a, y)
    if a.shape != y.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ModelError(
            f"takes targets of the outputs' shape, {tuple(a.shape[1:])} for each example, as "
            f"floating-point numbers; got {y.dtype}{tuple(y.shape[1:])}"
        )


def ids_or_probabilities(a: Array, y: Tree) -> None:
    """Raises unless the targets are class ids or probabilities, maybe with a length or a mask."""
    mask = None
    if isinstance(y, dict):
        _check_masked(a, y)
        y, mask = jax.vmap(target_and_mask)(a, y)
    is_array(a, y)
    *outer, classes = _checked_classes(a)
    if y.shape == a.shape and jnp.issubdtype(y.dtype, jnp.floating):
        return
    if y.shape != tuple(outer) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ModelError(
            f"takes for each example class ids of shape {tuple(outer[1:])}, as integers, or "
            f"probabilities of shape {tuple(a.shape[1:])}; got {y.dtype}{tuple(y.shape[1:])}"
        )
    if not isinstance(y, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        ids = np.asarray(y) if mask is None else np.asarray(y)[np.asarray(mask)]
        if ids.size and not (ids.min() >= 0 and ids.max() < classes):
            raise ModelError(
                f"takes class ids from 0 to {classes - 1}, got {ids.min()} to {ids.max()}"
            )


def probabilities(a: Array, y: Array) -> None:
    """Raises unless the targets have the outputs' shape, of which the last axis is the classes."""
    same_shape(a, y)
    _checked_classes(a)


def _checked_classes(a: Array) -> tuple[int, ...]:
    """The shape of a batch's logits, ``(n, *positions, classes)``."""
    if a.ndim < 2:
        raise ModelError(f"takes outputs of shape (..., classes), got {tuple(a.shape[1:])}")
    if a.shape[-1] == 1:
        raise ModelError(
            "takes outputs of shape (..., classes), two classes or more, got "
            f"{tuple(a.shape[1:])}: the softmax of one number is 1, whatever it is, and nothing "
            "would be trained; for one logit there is bp.losses.sigmoid_cross_entropy"
        )
    return a.shape


def is_ids(a: Array, y: Array) -> bool:
    """Whether one example's targets are class ids, not probabilities."""
    return y.ndim < a.ndim


def _check_masked(a: Tree, y: Tree) -> None:
    is_array(a, y.get("y"))
    n, *positions = a.shape[:-1]
    if set(y) == {"y", "length"} and jnp.issubdtype(y["length"].dtype, jnp.integer):
        if y["length"].shape == (n,) and positions:
            return
    elif set(y) == {"y", "mask"} and y["mask"].dtype == bool and y["mask"].shape == a.shape[:-1]:
        return
    raise ModelError(
        "takes a target as an array or a tree of y and, for each example, either length, an "
        f"integer, or mask, bools of shape {tuple(positions)}; got {described(y)}"
    )


def target_and_mask(a: Array, y: Tree) -> tuple[Array, Array | None]:
    """One example's target, and which of its positions count; None for all."""
    if not isinstance(y, dict):
        return y, None
    if "mask" in y:
        return y["y"], y["mask"]
    before_end = jnp.arange(a.shape[0]) < y["length"]
    return y["y"], jnp.broadcast_to(before_end.reshape(-1, *(1,) * (a.ndim - 2)), a.shape[:-1])
