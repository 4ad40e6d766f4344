"""Which keys a query may see, and what is added to their scores: said for blocks of both.

Axes: n examples, g groups of heads that share keys, r heads of a group, q queries, k keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Mask(NamedTuple):
    """Of queries and keys by their positions, from 0.

    Attributes:
      causal: a query sees no later key.
      window: a query sees so many keys at most, the latest being its own; with ``causal`` False
        as many on either side. None for all.
      queries, keys: how many there are.
      lengths: ``(n,)``, how many of the keys count in each example; None for all.
      slopes: ``(g, r)``, how fast scores fall with distance (Press et al. 2022); None for not.
      bias: ``(n or 1, g or 1, r or 1, queries, keys)``, added to the scores; where it is −∞ a key
        does not count. None for nothing.
      allowed: bools of like axes, which keys count; queries and keys may be 1 too. None for all.
    """

    causal: bool
    window: int | None
    queries: int
    keys: int
    lengths: Array | None = None
    slopes: Array | None = None
    bias: Array | None = None
    allowed: Array | None = None

    def keys_of(self, q: Array | int, block: int) -> tuple[Array | int, Array | int]:
        """The first block of keys that a block of queries may see, and the one after the last."""
        last: Array | int = -(-self.keys // block)
        first: Array | int = 0
        if self.window is not None:
            first = jnp.maximum(0, (q * block - self.window + 1) // block)
            if not self.causal:
                last = jnp.minimum(last, (q * block + block + self.window - 2) // block + 1)
        return first, jnp.minimum(last, q + 1) if self.causal else last

    def queries_of(self, k: Array | int, block: int) -> tuple[Array | int, Array | int]:
        """The first block of queries that may see a block of keys, and the one after the last."""
        last: Array | int = -(-self.queries // block)
        first: Array | int = k if self.causal else 0
        if self.window is not None:
            last = jnp.minimum(last, (k * block + block + self.window - 2) // block + 1)
            if not self.causal:
                first = jnp.maximum(0, (k * block - self.window + 1) // block)
        return first, last

    def scored(self, s: Array, q: Array | int, k: Array | int) -> tuple[Array, Array]:
        """Scores ``(n, g, k, r, q)`` of keys k … and queries q … with what is added to them, and
        which of them count, ``(n or 1, g or 1, k, r or 1, q)``."""
        queries = (q + jnp.arange(s.shape[-1]))[None, None, None, None, :]
        keys = (k + jnp.arange(s.shape[2]))[None, None, :, None, None]
        if self.slopes is not None:
            distance = jnp.abs(queries - keys).astype(s.dtype)
            s = s - self.slopes.astype(s.dtype)[None, :, None, :, None] * distance
        counts = keys < self.keys
        if self.causal:
            counts = counts & (keys <= queries)
        if self.window is not None:
            counts = counts & (queries - keys < self.window)
            if not self.causal:
                counts = counts & (keys - queries < self.window)
        if self.lengths is not None:
            counts = counts & (keys < self.lengths[:, None, None, None, None])
        if self.allowed is not None:
            counts = counts & _block(self.allowed, q, k, s.shape)
        if self.bias is not None:
            bias = _block(self.bias, q, k, s.shape)
            s, counts = s + bias.astype(s.dtype), counts & (bias > -jnp.inf)
        return s, counts

    def filled(self, block: int) -> Mask:
        """With what is given for each query and key filled up to whole blocks."""
        bias, allowed = (
            None if a is None else _filled(a, block) for a in (self.bias, self.allowed)
        )
        return self._replace(bias=bias, allowed=allowed)


def _block(a: Array, q: Array | int, k: Array | int, shape: tuple[int, ...]) -> Array:
    """Keys k … and queries q … of ``(n, g, r, queries, keys)``, laid out and as many as in scores'
    ``shape``."""
    for axis, first, size in ((3, q, shape[-1]), (4, k, shape[2])):
        a = a if a.shape[axis] == 1 else lax.dynamic_slice_in_dim(a, first, size, axis)
    return jnp.moveaxis(a, -1, 2)


def _filled(a: Array, block: int) -> Array:
    missing = [(0, -size % block if size > 1 else 0) for size in a.shape[-2:]]
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), *missing])
