"""Rows of a table that were looked up: the embedding's gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
    joined_blocks,
    per_example,
    summed_blocks,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "v"], meta_fields=["rows"])
@dataclass(frozen=True)
class Rows(Factored):
    """gₙ = Σ_t e_{k_t} v_tᵀ: an outer product whose u is a one-hot row, known by its id k_t.

    ``ids`` is ``(n, *positions)`` and ``v`` ``(n, *positions, i)``; the parameter is
    ``(rows, i)``. The product of two one-hot rows is 1 if their ids are equal, else 0. So only
    results of the parameter's own shape have ``rows`` as an axis.
    """

    ids: Array
    v: Array
    rows: int

    def _positions(self) -> Rows:
        n, i = self.v.shape[0], self.v.shape[-1]
        return Rows(self.ids.reshape(n, -1), self.v.reshape(n, -1, i), self.rows)

    def each(self) -> Array:
        one_each = jax.tree.map(lambda leaf: leaf[:, None], self)
        return jax.vmap(lambda f: f.total())(one_each)

    def scaled(self, weights: Array) -> Rows:
        return Rows(self.ids, per_example(weights, self.v), self.rows)

    def total(self) -> Array:
        zeros = jnp.zeros((self.rows, self.v.shape[-1]), accumulator(self.v))
        v = self.v.astype(zeros.dtype)
        return zeros.at[self.ids].add(v, mode="drop", wrap_negative_indices=False)

    def inner(self, other: Factored) -> Array:
        if not isinstance(other, (Rows, Outer)):
            return other._inner_with_rows(self)

        f, g = self._positions(), other._positions()
        n, t, _ = f.v.shape

        def block(start: Array | int, size: int) -> Array:  # some positions s of g at a time
            h = block_of(g, start, size, 1)
            vv = einsum("nti,nsi->nts", f.v, h.v)
            if isinstance(h, Rows):
                return jnp.where(f.ids[:, :, None] == h.ids[:, None, :], vv, 0).sum((1, 2))
            uu = jax.vmap(lambda u, ids: u[:, ids])(h.u, f.ids)
            return einsum("nst,nts->n", uu, vv)

        s = g.v.shape[1]
        return summed_blocks(block, s, block_size(s, (f, g), n * t))

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, (Rows, Outer)):
            return other._gram_with_rows(self).T
        return self._gram_by_example(other._positions())

    def _gram_by_example(self, other: Factored) -> Array:
        """The Gram matrix, one example of these factors at a time."""
        m = len(jax.tree.leaves(other)[0])

        def row(f: Rows) -> Array:
            of_all = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (m, *leaf.shape)), f)
            return of_all.inner(other)

        return lax.map(row, self._positions())

    def _inner_with_outer(self, outer: Outer) -> Array:
        return self.inner(outer)

    def _gram_with_outer(self, outer: Outer) -> Array:
        return self.gram(outer)

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return einsum("nti,nti->n", v[f.ids], f.v)

    def second_moment(self) -> Array:
        """Row k of gₙ is w_t = Σ_s v_s over the s with k_s = k, at every t with k_t = k, so that
        Σ_t w_t² / (the number of such t) is its square once."""
        f = self._positions()
        n, t, _ = f.v.shape

        def block(start: Array | int, size: int) -> Array:
            same = block_of(f.ids, start, size, 1)[:, :, None] == f.ids[:, None, :]
            w = einsum("nts,nsi->tni", same.astype(f.v.dtype), f.v)
            return w**2 / same.sum(-1).T[..., None].astype(w.dtype)

        squares = jnp.moveaxis(joined_blocks(block, t, block_size(t, f, n * t)), 0, 1)
        return Rows(f.ids, squares, self.rows).total() / n

    def columns(self, first: Array | int, count: int) -> Rows:
        return Rows(self.ids, block_of(self.v, first, count, -1), self.rows)
