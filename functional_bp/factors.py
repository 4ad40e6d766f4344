"""Factored gradients: what a parameter's gradient is before anyone multiplies it out.

BP3 and BP4 say that one example's gradient is made of two small things, a δ and an activation:

    ∂C/∂b = δ                (BP3)
    ∂C/∂W = δ aᵀ             (BP4)

A class here is one way in which a parameter meets its input. Each knows every contraction of the
batch of gradients gₙ it stands for, by the cheapest route for its shapes:

    total()          Σₙ gₙ                the gradient of a sum
    each()           gₙ                   one gradient per example, multiplied out
    squared_norm()   ‖gₙ‖²
    inner(other)     ⟨gₙ, hₙ⟩             cross terms of a parameter used in two places
    gram(other)      ⟨gₙ, hₘ⟩             for every pair of examples
    dot(v)           ⟨gₙ, v⟩
    second_moment()  mean over n of gₙ²
    scaled(w)        the factors of wₙ gₙ
    columns(j, k)    the factors of the k columns of gₙ from column j on
    as_outer()       the same gradients as Σ_t u_t v_tᵀ, where they are that

Every array in a factored gradient has the examples on its first axis; a rule, which sees one
example, builds one without that axis and ``vmap`` adds it.

What is larger than the factors is made for some columns or positions at a time, and of all examples
at once: a batch that is split among devices stays where it is. (A Gram matrix meets every pair of
examples, so it alone brings the factors of all examples to each device.) Sums run in float32 at
least, and so do the products in them: a square of 300 is no float16.

Index letters in every einsum of this file: n, m examples; t, s positions; o the rows of the
parameter; i its columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype in which sums over examples and positions run: float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def wide(array: Array) -> Array:
    """The array in the dtype in which its products and sums are made."""
    return array.astype(accumulator(array))


class Factored:
    """Gradients of one parameter for a batch of examples, not multiplied out.

    A new way for a parameter to meet its input needs only ``each`` and ``scaled``: what is here
    is every other contraction by its definition, right for any class and overridden where the
    factors allow better.
    """

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
        return _einsum("ni,ni->n", _flat(self.each()), _flat(other.each()))

    def gram(self, other: Factored) -> Array:
        """⟨gₙ, hₘ⟩, shape ``(n, m)``."""

        def rows(f: Factored) -> Array:
            g = _flat(f.each())

            def row(h: Factored) -> Array:
                return _einsum("mi,ni->mn", _flat(h.each()), g)

            return _map_blocks(row, other, _parameter_size(other)).T

        return _map_blocks(rows, self, _parameter_size(self))

    def dot(self, v: Array) -> Array:
        """⟨gₙ, v⟩, shape ``(n,)``; ``v`` has the parameter's shape."""
        return _einsum("ni,i->n", _flat(self.each()), v.reshape(-1))

    def second_moment(self) -> Array:
        """Mean over n of gₙ², element by element, shape ``(*parameter)``."""
        g = jax.eval_shape(self.each)
        if type(self).columns is Factored.columns or g.ndim == 1:
            return _mean_square(self)  # blocks would make all of gₙ too

        def block(j: Array | int, size: int) -> Array:
            return jnp.moveaxis(_mean_square(self.columns(j, size)), -1, 0)

        width = g.shape[-1]
        by_column = _joined_blocks(block, width, _block_size(width, self, g.size // width))
        return jnp.moveaxis(by_column, 0, -1)

    def columns(self, first: Array | int, count: int) -> Factored:
        """The factors of ``count`` columns, entries of the parameter's last axis."""
        return Itself(_block_of(self.each(), first, count, -1))

    def as_outer(self) -> Outer | None:
        """The same gradients as one ``Outer`` with its positions on one axis, a vector being a
        matrix of one column; None where they are not that."""
        return None


def _flat(each: Array) -> Array:
    return each.reshape(each.shape[0], -1)


def _parameter_size(f: Factored) -> int:
    return math.prod(jax.eval_shape(f.each).shape[1:])


def _mean_square(f: Factored) -> Array:
    return (wide(f.each()) ** 2).mean(0)


def _block_size(length: int, factors: Any, intermediate: int) -> int:
    """How many of ``length`` to take at a time, so that intermediates of ``intermediate`` numbers
    for each of them are no larger than the factors; all blocks but the last have as many."""
    most = max(1, sum(leaf.size for leaf in jax.tree.leaves(factors)) // intermediate)
    return -(-length // -(-length // most))


def _block_of(tree: Any, start: Array | int, size: int, axis: int) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, axis), tree)


def _joined_blocks(block: Callable[[Array | int, int], Array], length: int, size: int) -> Array:
    """``block(start, size)``, which has ``size`` rows, for all ``length`` rows."""
    whole, rest = divmod(length, size)
    if whole == 1 and not rest:
        return block(0, size)
    rows = lax.map(lambda i: block(i * size, size), jnp.arange(whole))
    rows = rows.reshape(-1, *rows.shape[2:])
    return jnp.concatenate([rows, block(length - rest, rest)]) if rest else rows


def _summed_blocks(block: Callable[[Array | int, int], Array], length: int, size: int) -> Array:
    """Σ ``block(start, size)`` over the blocks of ``length``."""
    whole, rest = divmod(length, size)
    sums = block(0, size)
    if whole > 1:
        sums = lax.fori_loop(1, whole, lambda i, sums: sums + block(i * size, size), sums)
    return sums + block(length - rest, rest) if rest else sums


def _map_blocks(function: Callable[[Any], Array], f: Factored, intermediate: int) -> Array:
    """``function(f)``, ``(n, …)``, for a few examples at a time."""
    n = jax.tree.leaves(f)[0].shape[0]

    def block(start: Array | int, size: int) -> Array:
        return function(_block_of(f, start, size, 0))

    return _joined_blocks(block, n, _block_size(n, f, intermediate))


def per_example(weights: Array, leaf: Array) -> Array:
    """wₙ times example n of ``leaf``."""
    return weights.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype) * leaf


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
        return Itself(_block_of(self.g, first, count, -1))

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
        return Summed(_block_of(self.g, first, count, -1))

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
        return _einsum("nto,nti->noi", f.u, f.v)

    def scaled(self, weights: Array) -> Outer:
        return Outer(per_example(weights, self.u), self.v)

    def total(self) -> Array:
        # One matrix product over examples and positions together, at what autodiff's costs. Said as
        # (vᵀ u)ᵀ it would double the step of a single example; with positions on an axis of their
        # own it is up to four times slower where u is a product itself.
        u, v = self.u.reshape(-1, self.u.shape[-1]), self.v.reshape(-1, self.v.shape[-1])
        return jnp.matmul(u.T, v, preferred_element_type=accumulator(u, v))

    def inner(self, other: Factored) -> Array:
        if isinstance(other, Rows):
            return other.inner(self)
        if not isinstance(other, Outer):
            return super().inner(other)
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
        if isinstance(other, Rows):
            return other.gram(self).T
        if not isinstance(other, Outer):
            return super().gram(other)
        f, g = self._positions(), other._positions()
        (_, t, o), (m, s, i) = f.u.shape, g.v.shape
        if t == s == 1:
            return _einsum("nto,mto->nm", f.u, g.u) * _einsum("nti,mti->nm", f.v, g.v)
        if t * s * (o + i) > o * i:
            return super().gram(other)

        def rows(f: Outer) -> Array:  # Σ_ts (u_nt·u_ms)(v_nt·v_ms), as in inner
            uu = _einsum("nto,mso->ntms", f.u, g.u)
            return jnp.einsum("ntms,ntms->nm", uu, _einsum("nti,msi->ntms", f.v, g.v))

        return _map_blocks(rows, f, t * m * s)

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return _einsum("nto,nto->n", _einsum("nti,oi->nto", f.v, v), f.u)

    def second_moment(self) -> Array:
        f = self._positions()
        if f.u.shape[1] > 1:
            return super().second_moment()
        return Outer(wide(f.u) ** 2, wide(f.v) ** 2).total() / f.u.shape[0]

    def columns(self, first: Array | int, count: int) -> Outer:
        return Outer(self.u, _block_of(self.v, first, count, -1))

    def as_outer(self) -> Outer:
        return self._positions()


def _inner_by_gram(f: Outer, g: Outer) -> Array:
    """Σ_ts (u_t·u'_s)(v_t·v'_s): products of Gram matrices, for some s at a time."""
    n, t, _ = f.u.shape

    def block(start: Array | int, size: int) -> Array:
        h = _block_of(g, start, size, 1)
        uu, vv = _einsum("nto,nso->nts", f.u, h.u), _einsum("nti,nsi->nts", f.v, h.v)
        return jnp.einsum("nts,nts->n", uu, vv)

    s = g.u.shape[1]
    return _summed_blocks(block, s, _block_size(s, (f, g), n * t))


def _inner_by_definition(f: Outer, g: Outer) -> Array:
    """Σ_oi (Σ_t u_to v_ti)(Σ_s u'_so v'_si), for some columns i at a time."""
    n, _, o = f.u.shape

    def block(start: Array | int, size: int) -> Array:
        each = f.columns(start, size).each()
        others = each if g is f else g.columns(start, size).each()
        return jnp.einsum("noi,noi->n", each, others)

    i = f.v.shape[-1]
    return _summed_blocks(block, i, _block_size(i, (f, g), n * o))


def _einsum(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, preferred_element_type=accumulator(*arrays))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "v"], meta_fields=["rows"])
@dataclass(frozen=True)
class Rows(Factored):
    """gₙ = Σ_t e_{k_t} v_tᵀ: an outer product whose u is a one-hot row, known by its id k_t.

    ``ids`` is ``(n, *positions)`` and ``v`` ``(n, *positions, i)``; the parameter is
    ``(rows, i)``. u_t·u'_s is 1 where the ids are the same and u'_s at k_t where u' is held, so
    that nothing has the rows as an axis but what is asked for whole.
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
            return super().inner(other)

        f, g = self._positions(), other._positions()
        n, t, _ = f.v.shape

        def block(start: Array | int, size: int) -> Array:  # some positions s of g at a time
            h = _block_of(g, start, size, 1)
            vv = _einsum("nti,nsi->nts", f.v, h.v)
            if isinstance(h, Rows):
                return jnp.where(f.ids[:, :, None] == h.ids[:, None, :], vv, 0).sum((1, 2))
            uu = jax.vmap(lambda u, ids: u[:, ids])(h.u, f.ids)
            return _einsum("nst,nts->n", uu, vv)

        s = g.v.shape[1]
        return _summed_blocks(block, s, _block_size(s, (f, g), n * t))

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, (Rows, Outer)):
            return super().gram(other)
        g = other._positions()
        m = g.v.shape[0]

        def row(f: Rows) -> Array:
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (m, *leaf.shape)), f).inner(g)

        return lax.map(row, self._positions())

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return _einsum("nti,nti->n", v[f.ids], f.v)

    def second_moment(self) -> Array:
        """Row k of gₙ is w_t = Σ_s v_s over the s with k_s = k, at every t with k_t = k, so that
        Σ_t w_t² / (the number of such t) is its square once."""
        f = self._positions()
        n, t, _ = f.v.shape

        def block(start: Array | int, size: int) -> Array:
            same = _block_of(f.ids, start, size, 1)[:, :, None] == f.ids[:, None, :]
            w = _einsum("nts,nsi->tni", same.astype(f.v.dtype), f.v)
            return w**2 / same.sum(-1).T[..., None].astype(w.dtype)

        squares = jnp.moveaxis(_joined_blocks(block, t, _block_size(t, f, n * t)), 0, 1)
        return Rows(f.ids, squares, self.rows).total() / n

    def columns(self, first: Array | int, count: int) -> Rows:
        return Rows(self.ids, _block_of(self.v, first, count, -1), self.rows)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class Sum(Factored):
    """gₙ = fₙ + f'ₙ + …: a parameter used in several places.

    Its norms contain the cross terms ⟨fₙ, f'ₙ⟩ between the uses.
    """

    parts: tuple[Factored, ...]

    def each(self) -> Array:
        return sum(f.each() for f in self.parts)  # type: ignore[return-value]

    def scaled(self, weights: Array) -> Sum:
        return Sum(tuple(f.scaled(weights) for f in self.parts))

    def total(self) -> Array:
        return sum(f.total() for f in self.parts)  # type: ignore[return-value]

    def inner(self, other: Factored) -> Array:
        return sum(f.inner(g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def gram(self, other: Factored) -> Array:
        return sum(f.gram(g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def dot(self, v: Array) -> Array:
        return sum(f.dot(v) for f in self.parts)  # type: ignore[return-value]

    def second_moment(self) -> Array:
        outer = self.as_outer()
        if outer is None:
            return super().second_moment()
        return outer.second_moment().reshape(jax.eval_shape(self.each).shape[1:])

    def columns(self, first: Array | int, count: int) -> Sum:
        return Sum(tuple(f.columns(first, count) for f in self.parts))

    def as_outer(self) -> Outer | None:
        parts = [f.as_outer() for f in self.parts]
        outers = [f for f in parts if f is not None]
        if len(outers) < len(parts):
            return None
        return Outer(
            jnp.concatenate([f.u for f in outers], 1), jnp.concatenate([f.v for f in outers], 1)
        )

    def _pairs(self, other: Factored) -> list[tuple[Factored, Factored]]:
        others = other.parts if isinstance(other, Sum) else (other,)
        return [(f, g) for f in self.parts for g in others]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class Stacked(Factored):
    """One factored gradient per layer of a stack: every array of ``layers`` has the layers on
    its first axis and the examples on its second; the parameter is ``(layers, *parameter)``."""

    layers: Factored

    def each(self) -> Array:
        return jax.vmap(lambda f: f.each(), out_axes=1)(self.layers)

    def scaled(self, weights: Array) -> Stacked:
        return Stacked(jax.vmap(lambda f: f.scaled(weights))(self.layers))

    def total(self) -> Array:
        return lax.map(lambda f: f.total(), self.layers)

    def inner(self, other: Factored) -> Array:
        return self._sum(lambda f, g: f.inner(g), other)

    def gram(self, other: Factored) -> Array:
        return self._sum(lambda f, g: f.gram(g), other)

    def dot(self, v: Array) -> Array:
        return lax.map(lambda fv: fv[0].dot(fv[1]), (self.layers, v)).sum(0)

    def second_moment(self) -> Array:
        return lax.map(lambda f: f.second_moment(), self.layers)

    def _sum(self, pair: Callable[[Factored, Factored], Array], other: Factored) -> Array:
        if not isinstance(other, Stacked):
            raise TypeError(f"a stacked gradient meets another of the same stack, not {other}")
        return lax.map(lambda fg: pair(*fg), (self.layers, other.layers)).sum(0)
