"""Layers that make one array of the tuple that ``parallel`` gives."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, described, whole
from ..docstrings import explained
from ..layer import Layer, no_parameters
from ..rules import rule
from .shapes import Sizes

Tree = Any
Arrays = tuple[Array, ...]


def _check_equal_shapes(params: Tree, xs: Arrays) -> None:
    if not isinstance(xs, tuple) or len({(x.shape, x.dtype) for x in xs}) != 1:
        raise ModelError(f"takes a tuple of arrays of one shape and dtype, got {described(xs)}")


def _add_forward(params: Tree, xs: Arrays, key: Array | None = None) -> tuple[Array, Sizes]:
    return functools.reduce(jnp.add, xs), Sizes((len(xs),))


def _add_backward(params: Tree, count: Sizes, dy: Array) -> tuple[Arrays, Tree]:
    return (dy,) * count.sizes[0], ()


add = rule(
    no_parameters,
    _add_forward,
    _add_backward,
    name="add",
    check=_check_equal_shapes,
    batched=True,
    equations=("y = Σ_i x_i", "∂C/∂x_i = ∂C/∂y"),
    doc="The sum of a tuple of arrays of one shape.",
)


def _multiply_forward(params: Tree, xs: Arrays, key: Array | None = None) -> tuple[Array, Arrays]:
    return functools.reduce(jnp.multiply, xs), xs


def _multiply_backward(params: Tree, xs: Arrays, dy: Array) -> tuple[Arrays, Tree]:
    return tuple(math.prod(xs[:i] + xs[i + 1 :], start=dy) for i in range(len(xs))), ()


multiply = rule(
    no_parameters,
    _multiply_forward,
    _multiply_backward,
    name="multiply",
    check=_check_equal_shapes,
    batched=True,
    equations=("y = ∏_i x_i", "∂C/∂x_i = ∂C/∂y ⊙ ∏_{j≠i} x_j"),
    doc="The product of a tuple of arrays of one shape, number by number.",
)


@explained(
    forward="y = [x_1, x_2, …]",
    backward="∂C/∂x_i = the part of ∂C/∂y that came from x_i",
)
def concatenate(axis: int = -1) -> Layer:
    """The arrays of a tuple one after another on ``axis``, which does not count the batch axis.

    Raises:
      ModelError: where the input is not a tuple of arrays that differ on ``axis`` alone.

    Example:
      >>> bp.concatenate().apply((), (jnp.zeros((1, 1)), jnp.ones((1, 2)))).tolist()
      [[0.0, 1.0, 1.0]]
    """

    whole("concatenate: axis", axis, None)

    def check(params: Tree, xs: Arrays) -> None:
        try:
            jax.eval_shape(lambda xs: jnp.concatenate(xs, axis), xs)
        except (TypeError, ValueError):
            raise ModelError(
                f"takes a tuple of arrays of one shape but for axis {axis}, got {described(xs)}"
            ) from None

    def forward(params: Tree, xs: Arrays, key: Array | None = None) -> tuple[Array, Sizes]:
        return jnp.concatenate(xs, axis), Sizes(tuple(x.shape[axis] for x in xs))

    def backward(params: Tree, lengths: Sizes, dy: Array) -> tuple[Arrays, Tree]:
        return tuple(jax.lax.split(dy, lengths.sizes, axis % dy.ndim)), ()

    return rule(no_parameters, forward, backward, name=f"concatenate({axis})", check=check)
