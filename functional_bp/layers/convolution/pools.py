"""Pooling: one number of each window and channel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...checks import ModelError
from ...docstrings import explained
from ...factors.factored import wide
from ...layer import Layer, no_parameters
from ...rules import rule
from ..shapes import Sizes
from .windows import Padding, Placed, Whole, Windows, check_image

Tree = Any


class Highest(NamedTuple):
    """Where the highest input of each window lay, and the sizes of the inputs."""

    place: Array
    space: Sizes


@explained(
    forward="y_{t c} = max_k x_{s t + d k − p, c}",
    backward="∂C/∂x_{u c} = Σ_{t: u is the first at which window t is highest} ∂C/∂y_{t c}",
)
def max_pool(
    window: Whole,
    *,
    strides: Whole | None = None,
    padding: Padding = "VALID",
    dilation: Whole = 1,
) -> Layer:
    """The highest of each window, channel by channel.

    x is ``(*space, channels)``, y ``(*positions, channels)``. Where several inputs of a window are
    the highest, the first of them, row by row, has all of ∂C/∂y. Padding is never the highest; a
    NaN is. Only the place of the highest is kept, in a byte or two. (Riesenhuber & Poggio 1999.)

    Args:
      window: its size, a number for every spatial axis or one of each.
      strides: s; the window's size if not given.
      padding, dilation: as of ``bp.conv``.

    Raises:
      ModelError: for a window that is larger than the padded input, or has an output in padding
        alone, and for a wrong number of axes.

    Example:
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> bp.max_pool(2).apply((), x)[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    windows = _windows_of("max_pool", window, strides, padding, dilation)

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Highest]:
        at = windows.at(x.shape[1:-1])
        parts = _windows(at, _padded(at, x, -jnp.inf))
        (_, y) = next(parts)
        place = jnp.zeros(y.shape, jnp.uint8 if math.prod(at.size) <= 256 else jnp.uint16)
        for k, part in parts:
            higher = (part > y) | (jnp.isnan(part) & ~jnp.isnan(y))
            y, place = jnp.where(higher, part, y), jnp.where(higher, k, place)
        return y, Highest(place, Sizes(x.shape[1:-1]))

    def backward(params: Tree, kept: Highest, dy: Array) -> tuple[Array, Tree]:
        at = windows.at(kept.space.sizes)
        return _spread(at, kept.space.sizes, lambda k: jnp.where(kept.place == k, dy, 0)), ()

    return _pool("max_pool", windows, forward, backward, strides)


@explained(
    forward="y_{t c} = Σ_k x_{s t + d k − p, c} / N_t      (N_t: how many inputs there are)",
    backward="∂C/∂x_{u c} = Σ_{t k: s t + d k − p = u} ∂C/∂y_{t c} / N_t",
)
def avg_pool(
    window: Whole,
    *,
    strides: Whole | None = None,
    padding: Padding = "VALID",
    dilation: Whole = 1,
) -> Layer:
    """The mean of each window, channel by channel.

    x is ``(*space, channels)``, y ``(*positions, channels)``. Padding does not count. (LeCun et al.
    1989.)

    Args:
      window: its size, a number for every spatial axis or one of each.
      strides: s; the window's size if not given.
      padding, dilation: as of ``bp.conv``.

    Raises:
      ModelError: as ``bp.max_pool``.

    Example:
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> bp.avg_pool(2).apply((), x)[0, :, :, 0].tolist()
      [[2.5, 4.5], [10.5, 12.5]]
    """
    windows = _windows_of("avg_pool", window, strides, padding, dilation)

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Sizes]:
        space = x.shape[1:-1]
        at = windows.at(space)
        parts = (part for _, part in _windows(at, _padded(at, wide(x), 0)))
        return (_shares(functools.reduce(jnp.add, parts), at, space)).astype(x.dtype), Sizes(space)

    def backward(params: Tree, space: Sizes, dy: Array) -> tuple[Array, Tree]:
        at = windows.at(space.sizes)
        shares = _shares(wide(dy), at, space.sizes)
        return _spread(at, space.sizes, lambda k: shares).astype(dy.dtype), ()

    return _pool("avg_pool", windows, forward, backward, strides)


def _global_max(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Highest]:
    flat = x.reshape(-1, x.shape[-1])
    place = jnp.argmax(flat, 0)
    y = jnp.take_along_axis(flat, place[None], 0)[0]
    return y, Highest(place, Sizes(x.shape[:-1]))


def _global_max_back(params: Tree, kept: Highest, dy: Array) -> tuple[Array, Tree]:
    space = kept.space.sizes
    here = jnp.arange(math.prod(space))[:, None] == kept.place[None]
    return jnp.where(here, dy[None], 0).reshape(*space, -1), ()


global_max_pool = rule(
    no_parameters,
    _global_max,
    _global_max_back,
    name="global_max_pool",
    check=lambda params, x: check_image(x),
    equations=("y_c = max_u x_{u c}", "∂C/∂x_{u c} = ∂C/∂y_c where x_c is first highest, else 0"),
    doc="""The highest of each channel, over all positions.

    x is ``(*space, channels)``, y ``(channels,)``. Of several that are the highest, the first, row
    by row, has all of ∂C/∂y.""",
)


def _global_mean(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Sizes]:
    return wide(x).mean(range(x.ndim - 1)).astype(x.dtype), Sizes(x.shape[:-1])


def _global_mean_back(params: Tree, space: Sizes, dy: Array) -> tuple[Array, Tree]:
    return jnp.broadcast_to(dy / math.prod(space.sizes), (*space.sizes, *dy.shape)), ()


global_avg_pool = rule(
    no_parameters,
    _global_mean,
    _global_mean_back,
    name="global_avg_pool",
    check=lambda params, x: check_image(x),
    equations=("y_c = Σ_u x_{u c} / N", "∂C/∂x_{u c} = ∂C/∂y_c / N"),
    doc="""The mean of each channel, over all N positions.

    x is ``(*space, channels)``, y ``(channels,)``. (Lin et al. 2014, "Network in network".)""",
)


def _windows_of(
    of: str, window: Whole, strides: Whole | None, padding: Padding, dilation: Whole
) -> Windows:
    by = window if strides is None else strides
    return Windows(of, "window", window, by, padding, dilation)


def _pool(of: str, windows: Windows, forward: Any, backward: Any, strides: Any) -> Layer:
    usual = {"strides": None, "padding": "VALID", "dilation": 1}
    given = {"strides": strides, "padding": windows.padding, "dilation": windows.dilation}
    said = [f"{name}={value!r}" for name, value in given.items() if value != usual[name]]

    def check(params: Tree, x: Array) -> None:
        windows.check(x)
        space = x.shape[:-1]
        at = windows.at(space)
        if not _counts(at, space).all():
            raise ModelError(
                f"takes padding beside which every window has an input, got {at.pads} for windows "
                f"of {at.size}"
            )

    return rule(
        no_parameters,
        forward,
        backward,
        name=f"{of}({', '.join([str(windows.size), *said])})",
        check=check,
        batched=True,
    )


def _counts(at: Placed, space: Sequence[int]) -> np.ndarray:
    """How many inputs each window has, ``(1, *positions, 1)``."""
    counts = np.ones((1, 1))
    for n, k, s, d, (before, after) in zip(space, at.size, at.strides, at.dilation, at.pads):
        positions = (n + before + after - d * (k - 1) - 1) // s + 1
        places = s * np.arange(positions)[:, None] + d * np.arange(k) - before
        here = (places >= 0) & (places < n) | at.circular
        counts = counts[..., None, :] * here.sum(1)[:, None]
    return counts


def _shares(a: Array, at: Placed, space: Sequence[int]) -> Array:
    return a / jnp.asarray(_counts(at, space), a.dtype)


def _padded(at: Placed, x: Array, value: float) -> Array:
    if at.circular:
        return at.wrapped(x)
    sides = ((0, 0, 0), *((*pads, 0) for pads in at.pads), (0, 0, 0))
    return lax.pad(x, jnp.array(value, x.dtype), sides)


def _starts(at: Placed) -> Iterator[tuple[int, list[int]]]:
    """For each place in a window, row by row, how far it lies from the window's begin."""
    for k, place in enumerate(itertools.product(*map(range, at.size))):
        yield k, [d * i for d, i in zip(at.dilation, place)]


def _windows(at: Placed, x: Array) -> Iterator[tuple[int, Array]]:
    """For each place in a window, what lies there in all windows, ``(n, *positions, channels)``."""
    ends = [size - d * (k - 1) for size, d, k in zip(x.shape[1:-1], at.dilation, at.size)]
    for k, starts in _starts(at):
        limits = [start + end for start, end in zip(starts, ends)]
        yield (
            k,
            lax.slice(x, (0, *starts, 0), (len(x), *limits, x.shape[-1]), (1, *at.strides, 1)),
        )


def _spread(at: Placed, space: Sequence[int], of: Callable[[int], Array]) -> Array:
    """∂C/∂x: what ``of`` gives for each place in a window, added up where it came from."""
    padded = [n + before + after for n, (before, after) in zip(space, at.pads)]
    dx: Any = 0
    for k, starts in _starts(at):
        part = of(k)
        sides = [
            (start, size - start - s * (t - 1) - 1, s - 1)
            for start, size, s, t in zip(starts, padded, at.strides, part.shape[1:-1])
        ]
        dx = dx + lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), *sides, (0, 0, 0)))
    if at.circular:
        return at.unwrapped(dx)
    ends = [before + n for n, (before, _) in zip(space, at.pads)]
    begins = [before for before, _ in at.pads]
    return lax.slice(dx, (0, *begins, 0), (len(dx), *ends, dx.shape[-1]))
