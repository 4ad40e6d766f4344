"""Where windows lie: sizes, strides, dilation and padding of each spatial axis.

The window of output position t has the inputs s t + d k − p, for k from 0 to its size less 1: s the
stride, d the dilation, p the padding before the first input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from ...checks import ModelError, described, told, whole
from ...layer import check_array

Whole = int | tuple[int, ...]
Sides = int | tuple[int | tuple[int, int], ...]
Padding = Literal["SAME", "VALID", "CIRCULAR"] | Sides
NAMES = ("SAME", "VALID", "CIRCULAR")


@dataclass(frozen=True)
class Windows:
    """Windows as one asks for them; a whole number is that of every axis.

    Attributes:
      of: how errors call the layer.
      called: how its users call the size.
      size, strides, dilation: from 1.
      padding: as ``bp.conv``'s.
    """

    of: str
    called: str
    size: Whole
    strides: Whole = 1
    padding: Padding = "SAME"
    dilation: Whole = 1

    def __post_init__(self) -> None:
        given = {self.called: self.size, "strides": self.strides, "dilation": self.dilation}
        ranks = {name: check_sizes(f"{self.of}: {name}", value) for name, value in given.items()}
        if not isinstance(self.padding, str) or self.padding not in NAMES:
            what = f"{self.of}: padding"
            ranks["padding"] = check_sides(what, self.padding, f"one of {', '.join(NAMES)}, or ")
        if len({rank for rank in ranks.values() if rank is not None}) > 1:
            said = ", ".join(f"{n} of {rank}" for n, rank in ranks.items() if rank is not None)
            raise ModelError(f"{self.of}: takes one number of axes, got {said}")

    @property
    def rank(self) -> int | None:
        """The number of spatial axes, where it is said."""
        for value in (self.size, self.strides, self.dilation, self.padding):
            if isinstance(value, tuple):
                return len(value)
        return None

    def check(self, x: Any) -> None:
        """Raises unless x is an example ``(*space, channels)`` with room for a window."""
        self.check_rank(x)
        self.at(x.shape[:-1])

    def check_rank(self, x: Any) -> None:
        """Raises unless x is an example ``(*space, channels)``."""
        check_image(x, self.rank)

    def at(self, space: Sequence[int]) -> Placed:
        """Of inputs of these sizes."""
        size, strides, dilation, reach = self._axes(len(space))
        pads = _pads(self.padding, space, reach, strides)
        circular = self.padding == "CIRCULAR"
        for n, wide, (before, after) in zip(space, reach, pads):
            if n + before + after < wide:
                raise ModelError(
                    f"takes windows that fit into the padded input, got windows of {reach} for "
                    f"{tuple(space)} padded by {pads}"
                )
            if circular and max(before, after) > n:
                raise ModelError(
                    f"takes circular padding up to the input's {tuple(space)}, got {pads}"
                )
        return Placed(size, strides, dilation, pads, circular)

    def onto(self, positions: Sequence[int]) -> tuple[tuple[int, ...], Placed]:
        """The sizes of inputs that have these positions, and the windows on them."""
        _, strides, _, reach = self._axes(len(positions))
        if isinstance(self.padding, str) and self.padding != "VALID":
            space = tuple(n * s for n, s in zip(positions, strides))
        else:
            pads = _pads(self.padding, positions, reach, strides)
            space = tuple(
                (n - 1) * s + wide - before - after
                for n, s, wide, (before, after) in zip(positions, strides, reach, pads)
            )
        if min(space) < 1:
            raise ModelError(f"takes padding that leaves outputs, got {space} of {self.padding}")
        return space, self.at(space)

    def _axes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Size, stride and dilation of each axis, and how far a window reaches."""
        size, strides, dilation = (
            each_axis(value, rank) for value in (self.size, self.strides, self.dilation)
        )
        return size, strides, dilation, tuple(d * (k - 1) + 1 for d, k in zip(dilation, size))


@dataclass(frozen=True)
class Placed:
    """Windows on inputs of known sizes, one number for each spatial axis.

    Attributes:
      pads: how much is added before and after.
      circular: what is added is the other end of the input, in place of zeros.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    circular: bool

    @property
    def zeros(self) -> tuple[tuple[int, int], ...]:
        """How many zeros are added before and after."""
        return ((0, 0),) * len(self.pads) if self.circular else self.pads

    def beside(self, space: Sequence[int]) -> tuple[int, ...]:
        """The sizes of what ``wrapped`` gives."""
        if not self.circular:
            return tuple(space)
        return tuple(n + before + after for n, (before, after) in zip(space, self.pads))

    def wrapped(self, x: Array) -> Array:
        """``(n, *space, channels)`` with its other ends beside it, where padding is circular."""
        if not self.circular:
            return x
        return jnp.pad(x, ((0, 0), *self.pads, (0, 0)), mode="wrap")

    def unwrapped(self, dx: Array) -> Array:
        """∂C/∂x from ∂C/∂ what ``wrapped`` gave: what lay beside it is added where it came from."""
        if not self.circular:
            return dx
        for axis, (before, after) in enumerate(self.pads, 1):
            n = dx.shape[axis] - before - after
            first, dx, last = jnp.split(dx, (before, before + n), axis)
            dx = _added(dx, first, n - before, axis)
            dx = _added(dx, last, 0, axis)
        return dx


def _added(a: Array, part: Array, at: int, axis: int) -> Array:
    """``a`` plus ``part`` from ``at`` on."""
    pads = [(0, 0, 0)] * a.ndim
    pads[axis] = (at, a.shape[axis] - at - part.shape[axis], 0)
    return a + lax.pad(part, jnp.zeros((), part.dtype), pads)


def each_axis(value: Whole, rank: int) -> tuple[int, ...]:
    """The number of each axis."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def check_image(x: Any, rank: int | None = None) -> None:
    """Raises unless x is one example ``(*space, channels)`` with so many spatial axes."""
    check_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ModelError(f"takes floating-point numbers, got {described(x)}")
    if x.ndim < 2 or rank not in (None, x.ndim - 1):
        axes = "one spatial axis or more" if rank is None else f"{rank} spatial axes"
        raise ModelError(f"takes examples (*space, channels), {axes}, got {described(x)}")


def check_sizes(what: str, value: Any) -> int | None:
    """Raises unless it is a whole number from 1 or a tuple of them; of how many."""
    if not isinstance(value, tuple):
        whole(what, value)
        return None
    if not value:
        raise ModelError(f"{what}: takes a whole number of each spatial axis, got {told(value)}")
    for one in value:
        whole(what, one)
    return len(value)


def check_sides(what: str, sides: Any, beside: str = "") -> int | None:
    """Raises unless it is a whole number from 0, or a tuple of them or of pairs; of how many."""
    if not isinstance(sides, tuple):
        if not isinstance(sides, int):
            raise ModelError(
                f"{what}: takes {beside}a whole number from 0, or for each spatial axis that or "
                f"(before, after), got {told(sides)}"
            )
        whole(what, sides, least=0)
        return None
    for one in sides or (None,):
        pair = one if isinstance(one, tuple) and len(one) == 2 else (one,)
        for side in pair:
            whole(what, side, least=0)
    return len(sides)


def _pads(
    padding: Any, space: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if padding == "VALID":
        return ((0, 0),) * len(space)
    if isinstance(padding, str):  # as many outputs as strides fit into the input
        missing = [
            max(0, (-(-n // s) - 1) * s + wide - n) for n, wide, s in zip(space, reach, strides)
        ]
        return tuple((m // 2, m - m // 2) for m in missing)
    return numbers_of_pads(padding, len(space))


def numbers_of_pads(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    """Of each axis, of padding that is numbers."""
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    return tuple((p, p) if isinstance(p, int) else (p[0], p[-1]) for p in padding)
