"""Factored gradients, and the ways in which a weight or a bias meets its input (BP3, BP4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Block = Callable[[Array | int, int], Array]


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype in which sums over examples and positions run: float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def wide(array: Array) -> Array:
    """The array in the dtype in which its products and sums are made."""
    return array.astype(accumulator(array))


def einsum(subscripts: str, *arrays: Array) -> Array:
    """``jnp.einsum``, summed in float32 at least."""
    return jnp.einsum(subscripts, *arrays, preferred_element_type=accumulator(*arrays))


def per_example(weights: Array, leaf: Array) -> Array:
    """wₙ times example n of ``leaf``."""
    return weights.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype) * leaf


class Factored:
    """Gradients of one parameter for a batch of examples, not multiplied out.

    A new way for a parameter to meet its input needs only ``each`` and ``scaled``: what is here
    is every other contraction by its definition, right for any class and overridden where the
    factors allow better.
    """

    @property
    def rows_are_inputs(self) -> bool:
        """Whether in ``as_outer`` u is of inputs and v is δ, as in a kernel of ``(in, out)``."""
        return False

    def each(self) -> Array:
        """gₙ, shape ``(n, *parameter)``."""
        raise TypeError(f"{type(self).__name__} does not define each()")

    def scaled(self, weights: Array) -> Factored:
        """The factored gradients wₙ gₙ; ``weights`` is ``(n,)``."""
        raise TypeError(f"{type(self).__name__} does not define scaled()")

    def total(self) -> Array:
        """Σₙ gₙ, shape ``(*parameter)``."""
        return self.each().sum(0)

    def squared_norm(self) -> Array:
        """‖gₙ‖², shape ``(n,)``."""
        return self.inner(self)

    def inner(self, other: Factored) -> Array:
        """⟨gₙ, hₙ⟩, shape ``(n,)``."""
        return (_flat(wide(self.each())) * _flat(wide(other.each()))).sum(1)

    def gram(self, other: Factored) -> Array:
        """⟨gₙ, hₘ⟩, shape ``(n, m)``."""

        def rows(f: Factored) -> Array:
            g = _flat(f.each())

            def row(h: Factored) -> Array:
                return einsum("mi,ni->mn", _flat(h.each()), g)

            return map_blocks(row, other, _parameter_size(other)).T

        return map_blocks(rows, self, _parameter_size(self))

    def dot(self, v: Array) -> Array:
        """⟨gₙ, v⟩, shape ``(n,)``; ``v`` has the parameter's shape."""
        return einsum("ni,i->n", _flat(self.each()), v.reshape(-1))

    def second_moment(self) -> Array:
        """Mean over n of gₙ², element by element, shape ``(*parameter)``."""
        g = jax.eval_shape(self.each)
        if type(self).columns is Factored.columns or g.ndim == 1:
            return _mean_square(self)  # blocks would make all of gₙ too

        def block(j: Array | int, size: int) -> Array:
            return jnp.moveaxis(_mean_square(self.columns(j, size)), -1, 0)

        width = g.shape[-1]
        by_column = joined_blocks(block, width, block_size(width, self, g.size // width))
        return jnp.moveaxis(by_column, 0, -1)

    def columns(self, first: Array | int, count: int) -> Factored:
        """The factors of ``count`` columns, entries of the parameter's last axis."""
        return Itself(block_of(self.each(), first, count, -1))

    def examples(self, first: Array | int, count: int) -> Factored:
        """The factors of ``count`` examples."""
        return block_of(self, first, count, 0)

    def as_outer(self) -> Outer | None:
        """The same gradients as one ``Outer`` with its positions on one axis, a vector being a
        matrix of one column; None where they are not that."""
        return None

    def _inner_with_outer(self, outer: Outer) -> Array:
        return Factored.inner(self, outer)

    def _gram_with_outer(self, outer: Outer) -> Array:
        return Factored.gram(self, outer)

    def _inner_with_rows(self, rows: Any) -> Array:
        return Factored.inner(self, rows)

    def _gram_with_rows(self, rows: Any) -> Array:
        return Factored.gram(self, rows)


def _flat(each: Array) -> Array:
    return each.reshape(each.shape[0], -1)


def _parameter_size(f: Factored) -> int:
    return math.prod(jax.eval_shape(f.each).shape[1:])


def _mean_square(f: Factored) -> Array:
    return (wide(f.each()) ** 2).mean(0)


# ---- what is larger than the factors, made for some columns, positions or examples at a time


def block_size(length: int, factors: Any, intermediate: int) -> int:
    """How many of ``length`` to take at a time, so that intermediates of ``intermediate`` numbers
    for each of them are no larger than the factors; all blocks but the last have as many."""
    most = max(1, sum(leaf.size for leaf in jax.tree.leaves(factors)) // intermediate)
    return -(-length // -(-length // most))


def block_of(tree: Any, start: Array | int, size: int, axis: int) -> Any:
    """``size`` entries of an axis of every array, from ``start`` on."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, axis), tree)


def joined_blocks(block: Block, length: int, size: int) -> Array:
    """``block(start, size)``, which has ``size`` rows, for all ``length`` rows."""
    whole, rest = divmod(length, size)
    if whole == 1 and not rest:
        return block(0, size)
    rows = lax.map(lambda i: block(i * size, size), jnp.arange(whole))
    rows = rows.reshape(-1, *rows.shape[2:])
    return jnp.concatenate([rows, block(length - rest, rest)]) if rest else rows


def summed_blocks(block: Block, length: int, size: int) -> Array:
    """Σ ``block(start, size)`` over the blocks of ``length``."""
    whole, rest = divmod(length, size)
    sums = block(0, size)
    if whole > 1:
        sums = lax.fori_loop(1, whole, lambda i, sums: sums + block(i * size, size), sums)
    return sums + block(length - rest, rest) if rest else sums


def map_blocks(function: Callable[[Any], Array], f: Factored, intermediate: int) -> Array:
    """``function(f)``, ``(n, …)``, for a few examples at a time."""
    n = jax.eval_shape(f.each).shape[0]

    def block(start: Array | int, size: int) -> Array:
        return function(f.examples(start, size))

    return joined_blocks(block, n, block_size(n, f, intermediate))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclass(frozen=True)
class Itself(Factored):
    """The gradient itself, gₙ: biases and scales, whose gradients are no larger than a δ (BP3).

    ``g`` is ``(n, *parameter)``.
    """

    g: Array

    def each(self) -> Array:
        return self.g

    def scaled(self, weights: Array) -> Itself:
        return Itself(per_example(weights, self.g))

    def columns(self, first: Array | int, count: int) -> Itself:
        return Itself(block_of(self.g, first, count, -1))

    def as_outer(self) -> Outer | None:
        return Summed(self.g).as_outer() if self.g.ndim == 2 else None

    def total(self) -> Array:
        return self.g.sum(0, dtype=accumulator(self.g))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclass(frozen=True)
class Summed(Factored):
    """gₙ = Σ_t g_t for a parameter that is a vector: a bias or scale used at every position.

    ``g`` is ``(n, *positions, o)`` and the parameter ``(o,)``.
    """

    g: Array

    def each(self) -> Array:
        return self.g.sum(range(1, self.g.ndim - 1), dtype=accumulator(self.g))

    def scaled(self, weights: Array) -> Summed:
        return Summed(per_example(weights, self.g))

    def columns(self, first: Array | int, count: int) -> Summed:
        return Summed(block_of(self.g, first, count, -1))

    def as_outer(self) -> Outer:
        return Outer(self.g, jnp.ones((*self.g.shape[:-1], 1), self.g.dtype)).as_outer()

    def total(self) -> Array:
        return self.g.sum(range(self.g.ndim - 1), dtype=accumulator(self.g))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "v"], meta_fields=[])
@dataclass(frozen=True)
class Outer(Factored):
    """gₙ = Σ_t u_t v_tᵀ: an outer product summed over the example's positions (BP4).

    ``u`` is ``(n, *positions, o)`` and ``v`` is ``(n, *positions, i)``; the parameter is
    ``(o, i)``. A dense layer on plain vectors has no position axis.
    """

    u: Array
    v: Array

    def _positions(self) -> Outer:
        """The same gradient with all its positions on one axis: u (n, t, o), v (n, t, i)."""
        n, o, i = self.u.shape[0], self.u.shape[-1], self.v.shape[-1]
        return Outer(self.u.reshape(n, -1, o), self.v.reshape(n, -1, i))

    def each(self) -> Array:
        f = self._positions()
        return einsum("nto,nti->noi", f.u, f.v)

    def scaled(self, weights: Array) -> Outer:
        return Outer(per_example(weights, self.u), self.v)

    def total(self) -> Array:
        # One matrix product over examples and positions together, at what autodiff's costs. Said as
        # (vᵀ u)ᵀ it would double the step of a single example; with positions on an axis of their
        # own it is up to four times slower where u is a product itself.
        u, v = self.u.reshape(-1, self.u.shape[-1]), self.v.reshape(-1, self.v.shape[-1])
        return jnp.matmul(u.T, v, preferred_element_type=accumulator(u, v))

    def inner(self, other: Factored) -> Array:
        if not isinstance(other, Outer):
            return other._inner_with_outer(self)
        f = self._positions()
        g = f if other is self else other._positions()
        (_, t, o), (_, s, i) = f.u.shape, g.v.shape
        if t == s == 1:
            uu, vv = ((wide(a) * wide(b)).sum((1, 2)) for a, b in ((f.u, g.u), (f.v, g.v)))
            return uu * vv
        if t * s * (o + i) <= (t + s) * o * i:
            return _inner_by_gram(f, g)
        return _inner_by_definition(f, g)

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, Outer):
            return other._gram_with_outer(self).T
        f, g = self._positions(), other._positions()
        (_, t, o), (m, s, i) = f.u.shape, g.v.shape
        if t == s == 1:
            return einsum("nto,mto->nm", f.u, g.u) * einsum("nti,mti->nm", f.v, g.v)
        if t * s * (o + i) > o * i:
            return super().gram(other)

        def rows(f: Outer) -> Array:  # Σ_ts (u_nt·u_ms)(v_nt·v_ms), as in inner
            uu = einsum("nto,mso->ntms", f.u, g.u)
            return jnp.einsum("ntms,ntms->nm", uu, einsum("nti,msi->ntms", f.v, g.v))

        return map_blocks(rows, f, t * m * s)

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return einsum("nto,nto->n", einsum("nti,oi->nto", f.v, v), f.u)

    def second_moment(self) -> Array:
        f = self._positions()
        if f.u.shape[1] > 1:
            return super().second_moment()
        return Outer(wide(f.u) ** 2, wide(f.v) ** 2).total() / f.u.shape[0]

    def columns(self, first: Array | int, count: int) -> Outer:
        return Outer(self.u, block_of(self.v, first, count, -1))

    def as_outer(self) -> Outer:
        return self._positions()


def _inner_by_gram(f: Outer, g: Outer) -> Array:
    """Σ_ts (u_t·u'_s)(v_t·v'_s): products of Gram matrices, for some s at a time."""
    n, t, _ = f.u.shape

    def block(start: Array | int, size: int) -> Array:
        h = block_of(g, start, size, 1)
        uu, vv = einsum("nto,nso->nts", f.u, h.u), einsum("nti,nsi->nts", f.v, h.v)
        return (uu * vv).sum((1, 2))  # as an einsum, up to a third slower

    s = g.u.shape[1]
    return summed_blocks(block, s, block_size(s, (f, g), n * t))


def _inner_by_definition(f: Outer, g: Outer) -> Array:
    """Σ_oi (Σ_t u_to v_ti)(Σ_s u'_so v'_si), for some columns i at a time."""
    n, _, o = f.u.shape

    def block(start: Array | int, size: int) -> Array:
        each = f.columns(start, size).each()
        others = each if g is f else g.columns(start, size).each()
        return jnp.einsum("noi,noi->n", each, others)

    i = f.v.shape[-1]
    return summed_blocks(block, i, block_size(i, (f, g), n * o))
