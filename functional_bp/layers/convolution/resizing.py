"""Layers that make an image larger or smaller without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...checks import ModelError, choice, described
from ...docstrings import explained
from ...factors.factored import accumulator
from ...layer import Layer, no_parameters
from ...rules import rule
from ..shapes import Sizes
from .windows import Sides, Whole, check_image, check_sides, check_sizes, each_axis, numbers_of_pads

Tree = Any
Method = Literal["nearest", "linear"]


@explained(
    forward="y_{t c} = Σ_u U_{t u} x_{u c}      (one axis after the other)",
    backward="∂C/∂x_{u c} = Σ_t U_{t u} ∂C/∂y_{t c}",
)
def upsample(factor: Whole, *, method: Method = "nearest") -> Layer:
    """More positions: ``factor`` for each one, on every spatial axis.

    x is ``(*space, channels)``. ``"nearest"`` repeats each input; U has a 1 in each row.
    ``"linear"`` goes from input to input in straight lines: output t lies at (t + ½) / factor − ½
    between two inputs, and beyond the outer ones as they are (what others call half-pixel centres,
    or corners that are not aligned).

    Args:
      factor: a number for every spatial axis or one of each.
      method: how.

    Raises:
      ModelError: for an input without spatial axes or of another number of them.

    Example:
      >>> x = jnp.array([0.0, 4.0]).reshape(1, 2, 1)
      >>> bp.upsample(2, method="linear").apply((), x)[0, :, 0].tolist()
      [0.0, 1.0, 3.0, 4.0]
    """
    rank = check_sizes("upsample: factor", factor)
    choice("upsample: method", method, Method)

    def weights(space: Sequence[int]) -> list[np.ndarray]:
        """U of each axis."""
        return [_weights(n, f, method) for n, f in zip(space, each_axis(factor, len(space)))]

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Sizes]:
        space = x.shape[1:-1]
        return _along(x, weights(space)), Sizes(space)

    def backward(params: Tree, space: Sizes, dy: Array) -> tuple[Array, Tree]:
        return _along(dy, [U.T for U in weights(space.sizes)]), ()

    name = f"upsample({factor})" if method == "nearest" else f"upsample({factor}, {method!r})"
    return rule(
        no_parameters,
        forward,
        backward,
        name=name,
        check=lambda params, x: check_image(x, rank),
        batched=True,
    )


def _weights(n: int, factor: int, method: Method) -> np.ndarray:
    positions = np.arange(n * factor)
    if method == "nearest":
        return (positions[:, None] // factor == np.arange(n)).astype(float)
    at = np.clip((positions + 0.5) / factor - 0.5, 0, n - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(n)))


def _along(x: Array, matrices: list[np.ndarray]) -> Array:
    """Each axis of ``(n, *space, channels)`` times its matrix."""
    dtype = accumulator(x)
    for axis, U in enumerate(matrices, 1):
        moved = jnp.tensordot(U.astype(dtype), x, (1, axis), preferred_element_type=dtype)
        x = jnp.moveaxis(moved, 0, axis).astype(x.dtype)
    return x


@explained(
    forward="y = x with zeros before and after each spatial axis",
    backward="∂C/∂x = ∂C/∂y without them",
)
def pad(sides: Sides) -> Layer:
    """Zeros around an image.

    Args:
      sides: how many, on all sides; or of each spatial axis a number or ``(before, after)``.

    Raises:
      ModelError: for what is no whole number from 0, and an input of another number of axes.

    Example:
      >>> bp.pad(1).apply((), jnp.ones((1, 2, 1)))[0, :, 0].tolist()
      [0.0, 1.0, 1.0, 0.0]
    """
    return _bordered("pad", sides, forth=1)


@explained(
    forward="y = x without what lies within so many of the ends",
    backward="∂C/∂x = ∂C/∂y with zeros there",
)
def crop(sides: Sides) -> Layer:
    """An image without its border.

    Args:
      sides: how much is left out, on all sides; or of each spatial axis a number or ``(before,
        after)``.

    Raises:
      ModelError: for what is no whole number from 0, for an input of which nothing is left, and one
        of another number of axes.

    Example:
      >>> bp.crop((0, 1)).apply((), jnp.ones((1, 4, 4, 1))).shape
      (1, 4, 2, 1)
    """
    return _bordered("crop", sides, forth=-1)


def _bordered(of: str, sides: Sides, forth: int) -> Layer:
    rank = check_sides(f"{of}: sides", sides)

    def border(a: Array, sign: int) -> Array:
        pads = numbers_of_pads(sides, a.ndim - 2)
        changes = [(sign * before, sign * after, 0) for before, after in pads]
        return lax.pad(a, jnp.zeros((), a.dtype), ((0, 0, 0), *changes, (0, 0, 0)))

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, tuple[()]]:
        return border(x, forth), ()

    def backward(params: Tree, residuals: tuple[()], dy: Array) -> tuple[Array, Tree]:
        return border(dy, -forth), ()

    def check(params: Tree, x: Array) -> None:
        check_image(x, rank)
        pads = numbers_of_pads(sides, x.ndim - 1)
        left = [n + forth * sum(both) for n, both in zip(x.shape, pads)]
        if min(left) < 1:
            raise ModelError(f"takes an input of which something is left, got {described(x)}")

    return rule(no_parameters, forward, backward, name=f"{of}({sides})", check=check, batched=True)
