"""The gradient of a last layer whose logits are never all there: u is made anew, block by block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .factored import (
    Factored,
    Outer,
    accumulator,
    block_of,
    block_size,
    einsum,
    per_example,
    summed_blocks,
)
from .rows import Rows

NUMBERS = 2**20  # logits in a block, where so many rows do not have more
LEAST = 128  # rows in a block, for products to be fast

Carried = Any
Step = Callable[[Carried, Array | int, int], Carried]


def over_blocks(step: Step, carried: Carried, length: int, size: int) -> Carried:
    """``step(carried, first, count)`` for ``count`` from ``first`` on of so many, until all are
    done: ``size`` at a time, and the rest."""
    size = min(length, size)
    whole, rest = divmod(length, size)
    if whole == 1:
        carried = step(carried, 0, size)
    else:
        carried = lax.fori_loop(0, whole, lambda i, c: step(c, i * size, size), carried)
    return step(carried, whole * size, rest) if rest else carried


def rows_at_once(vectors: int) -> int:
    """Of how many rows of a table the products with so many vectors are made at a time."""
    return max(LEAST, NUMBERS // vectors)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["v", "h", "weight", "ids", "log_sum", "scale", "target", "rest"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SoftmaxOuter(Factored):
    """gₙ = Σ_t u_t v_tᵀ, where u_t is a softmax's δ, which is made when it is asked for:

        u_tk = s_t e^{W_k · h_t − λ_t} − r_t − (q_t where k = k_t)

    There is one for each position and row of W, more than may fit in memory, so they are made for
    a block of rows at a time.

    ``v`` is ``(n, t, i)`` and the parameter ``(rows, i)``; ``h`` is ``(n, t, d)``, W ``(rows, d)``,
    the same for all examples; ``ids`` k_t, ``log_sum`` λ_t, ``scale`` s_t, ``target`` q_t and
    ``rest`` r_t are ``(n, t)``. (v is h, or some columns of it.)
    """

    v: Array
    h: Array
    weight: Array
    ids: Array
    log_sum: Array
    scale: Array
    target: Array
    rest: Array

    def _rows(self, first: Array | int, count: int) -> Outer:
        """The factors of ``count`` of the parameter's rows."""
        a = einsum("ntd,od->nto", self.h, block_of(self.weight, first, count, 0))
        return Outer(self._u(a, first + jnp.arange(count)), self.v)

    def _u(self, a: Array, rows: Array) -> Array:
        """u at some rows, ``(rows,)`` or of each example's own ``(n, 1, rows)``, from the logits
        there."""

        def each(at_position: Array) -> Array:
            return at_position[..., None]

        u = each(self.scale) * jnp.exp(a - each(self.log_sum)) - each(self.rest)
        u = jnp.where(each(self.ids) == rows, u - each(self.target), u)
        return u.astype(self.v.dtype)

    def each(self) -> Array:
        def one(f: SoftmaxOuter) -> Array:
            return f._of_examples(lambda leaf: leaf[None]).total()

        axes: Any = self._of_examples(lambda _: 0)
        return jax.vmap(one, (dataclasses.replace(axes, weight=None),))(self)

    def scaled(self, weights: Array) -> SoftmaxOuter:
        s, q, r = (per_example(weights, a) for a in (self.scale, self.target, self.rest))
        return dataclasses.replace(self, scale=s, target=q, rest=r)

    def total(self) -> Array:
        return self._by_rows(lambda rows: rows.total())

    def second_moment(self) -> Array:
        return self._by_rows(lambda rows: rows.second_moment())

    def dot(self, v: Array) -> Array:
        def of_rows(first: Array | int, count: int) -> Array:
            return self._rows(first, count).dot(block_of(v, first, count, 0))

        return self._summed(of_rows, len(self.ids))

    def inner(self, other: Factored) -> Array:
        if not isinstance(other, SoftmaxOuter):
            return self._inner_with_rows(other) if isinstance(other, Rows) else super().inner(other)

        def of_rows(first: Array | int, count: int) -> Array:
            f = self._rows(first, count)
            return f.inner(f if other is self else other._rows(first, count))

        return self._summed(of_rows, len(self.ids))

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, SoftmaxOuter):
            return self._gram_with_rows(other) if isinstance(other, Rows) else super().gram(other)

        def of_rows(first: Array | int, count: int) -> Array:
            return self._rows(first, count).gram(other._rows(first, count))

        return self._summed(of_rows, len(self.ids), len(other.ids))

    def _inner_with_rows(self, rows: Rows) -> Array:
        """Σ_ts u_t[k_s] (v_t · v'_s), where u is needed at the rows that were looked up alone."""
        g = rows._positions()
        (n, t), s = self.ids.shape, g.ids.shape[1]

        def block(start: Array | int, size: int) -> Array:
            h = block_of(g, start, size, 1)
            a = einsum("ntd,nsd->nts", self.h, self.weight[h.ids])
            u, vv = self._u(a, h.ids[:, None, :]), einsum("nti,nsi->nts", self.v, h.v)
            return (u * vv).sum((1, 2))

        return summed_blocks(block, s, block_size(s, (self.h, self.v, g), n * t))

    def _gram_with_rows(self, rows: Rows) -> Array:
        return rows._gram_by_example(self).T

    def columns(self, first: Array | int, count: int) -> SoftmaxOuter:
        return dataclasses.replace(self, v=block_of(self.v, first, count, -1))

    def examples(self, first: Array | int, count: int) -> SoftmaxOuter:
        return self._of_examples(lambda leaf: block_of(leaf, first, count, 0))

    def as_outer(self) -> Outer:
        return self._rows(0, len(self.weight))

    def _of_examples(self, function: Callable[[Array], Any]) -> SoftmaxOuter:
        """With ``function`` of every array that has the examples on its first axis."""
        return dataclasses.replace(jax.tree.map(function, self), weight=self.weight)

    def _summed(self, of_rows: Callable[[Array | int, int], Array], *shape: int) -> Array:
        """Σ ``of_rows(first, count)`` over the parameter's rows."""
        zeros = jnp.zeros(shape, accumulator(self.v))

        def step(sums: Array, first: Array | int, count: int) -> Array:
            return sums + of_rows(first, count)

        return over_blocks(step, zeros, len(self.weight), rows_at_once(self.ids.size))

    def _by_rows(self, of_rows: Callable[[Outer], Array]) -> Array:
        """What has the parameter's shape, rows by rows."""

        def step(found: Array, first: Array | int, count: int) -> Array:
            rows = of_rows(self._rows(first, count))
            return lax.dynamic_update_slice_in_dim(found, rows, first, 0)

        shape = (len(self.weight), self.v.shape[-1])
        found = jnp.zeros(shape, accumulator(self.v))
        return over_blocks(step, found, len(self.weight), rows_at_once(self.ids.size))
