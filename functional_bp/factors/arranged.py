"""Gradients whose numbers lie in another order than the parameter's, or are a part of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from .combined import Stacked, Sum
from .factored import Factored, Itself, Outer
from .rows import Rows

Axes = tuple[tuple[int, ...], tuple[int, ...]]  # their sizes, and the order they go on in
Moves = tuple[tuple[str, tuple[int, ...]], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=["moves"])
@dataclass(frozen=True)
class Arranged(Factored):
    """The gradients of ``factor``, reshaped and transposed as ``moves`` say, in their order.

    A kernel of ``(in, heads, features)`` meets its input as a matrix ``(heads · features, in)``: an
    ``Outer`` that is reshaped to ``(heads, features, in)`` and transposed. No norm and no inner
    product depends on the order.
    """

    factor: Factored
    moves: Moves

    def each(self) -> Array:
        g = self.factor.each()
        for move, how in self.moves:
            shifted = (0, *(axis + 1 for axis in how))
            g = g.reshape(len(g), *how) if move == "reshape" else g.transpose(shifted)
        return g

    def scaled(self, weights: Array) -> Arranged:
        return Arranged(self.factor.scaled(weights), self.moves)

    def total(self) -> Array:
        return self._moved(self.factor.total())

    def squared_norm(self) -> Array:
        return self.factor.squared_norm()

    def inner(self, other: Factored) -> Array:
        if isinstance(other, Arranged) and other.moves == self.moves:
            return self.factor.inner(other.factor)
        return super().inner(other)

    def gram(self, other: Factored) -> Array:
        if isinstance(other, Arranged) and other.moves == self.moves:
            return self.factor.gram(other.factor)
        return super().gram(other)

    def dot(self, v: Array) -> Array:
        for (move, how), shape in reversed(list(zip(self.moves, self._shapes()))):
            v = v.reshape(shape) if move == "reshape" else v.transpose(inverse(how))
        return self.factor.dot(v)

    def second_moment(self) -> Array:
        return self._moved(self.factor.second_moment())

    def examples(self, first: Array | int, count: int) -> Arranged:
        return Arranged(self.factor.examples(first, count), self.moves)

    @property
    def rows_are_inputs(self) -> bool:
        outer = jax.eval_shape(self.factor.as_outer)
        lying = None if outer is None else self._lying(outer.u.shape[-1])
        transposed = lying is not None and lying[0]
        return transposed != self.factor.rows_are_inputs

    def as_outer(self) -> Outer | None:
        outer = self.factor.as_outer()
        lying = None if outer is None else self._lying(outer.u.shape[-1])
        if outer is None or lying is None:
            return None
        transposed, rows, columns = lying
        u, v = _reordered(outer.u, *rows), _reordered(outer.v, *columns)
        return Outer(v, u) if transposed else Outer(u, v)

    def _lying(self, rows: int) -> tuple[bool, Axes, Axes] | None:
        """Whether the parameter, as a matrix, is the transpose of the factor's, which has so many
        rows; and the axes that its rows and its columns are made of, with their new order. None if
        rows and columns are mixed."""
        shape, order = jax.eval_shape(self.factor.each).shape[1:], None
        for move, how in self.moves:
            order = tuple(range(len(shape))) if order is None else order
            if move == "transpose":
                order = tuple(order[axis] for axis in how)
            elif order == tuple(range(len(order))):
                shape, order = how, tuple(range(len(how)))
            else:
                return None
        order = tuple(range(len(shape))) if order is None else order
        split = next((k for k in range(len(shape) + 1) if math.prod(shape[:k]) == rows), None)
        if split is None:
            return None
        of_rows = tuple(axis for axis in order if axis < split)
        of_columns = tuple(axis for axis in order if axis >= split)
        if order not in ((*of_rows, *of_columns), (*of_columns, *of_rows)):
            return None
        columns = shape[split:], tuple(axis - split for axis in of_columns)
        return order[:split] != of_rows, (shape[:split], of_rows), columns

    def _moved(self, array: Array) -> Array:
        for move, how in self.moves:
            array = array.reshape(how) if move == "reshape" else array.transpose(how)
        return array

    def _shapes(self) -> list[tuple[int, ...]]:
        """The shape before each move."""
        shape = jax.eval_shape(self.factor.each).shape[1:]
        shapes = []
        for move, how in self.moves:
            shapes.append(shape)
            shape = how if move == "reshape" else tuple(shape[axis] for axis in how)
        return shapes


def _reordered(vectors: Array, sizes: tuple[int, ...], order: tuple[int, ...]) -> Array:
    """``(n, t, numbers)`` with the numbers, which lie on axes of these sizes, in another order."""
    if order == tuple(sorted(order)):
        return vectors
    lead = vectors.shape[:-1]
    on_axes = vectors.reshape(*lead, *sizes)
    moved = on_axes.transpose((*range(len(lead)), *(len(lead) + axis for axis in order)))
    return moved.reshape(vectors.shape)


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def reshaped(factor: Factored, shape: tuple[int, ...]) -> Factored:
    """The factors of the gradients in another shape."""
    return _moved_on(factor, "reshape", tuple(shape))


def transposed(factor: Factored, permutation: tuple[int, ...]) -> Factored:
    """The factors of the gradients with their axes in another order."""
    return _moved_on(factor, "transpose", tuple(permutation))


def _moved_on(factor: Factored, move: str, how: tuple[int, ...]) -> Factored:
    """One more move, if it is not undone by or one with the last. What moves nothing between the
    layers of a stack is a move in each."""
    first = 0 if move == "transpose" else getattr(factor, "count", None)
    if isinstance(factor, Stacked) and how[:1] == (first,):
        within = how[1:] if move == "reshape" else tuple(axis - 1 for axis in how[1:])
        return Stacked(jax.vmap(lambda f: _moved_on(f, move, within))(factor.layers))
    inner, moves = (factor.factor, factor.moves) if isinstance(factor, Arranged) else (factor, ())
    if moves and moves[-1][0] == move:
        last = moves[-1][1]
        how = how if move == "reshape" else tuple(last[axis] for axis in how)
        moves = moves[:-1]
    shape = jax.eval_shape(Arranged(inner, moves).each).shape[1:]
    same = shape == how if move == "reshape" else how == tuple(range(len(shape)))
    moves = moves if same else (*moves, (move, how))
    return Arranged(inner, moves) if moves else inner


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=["starts", "shape"]
)
@dataclass(frozen=True)
class Part(Factored):
    """Gradients of a block of the parameter, from ``starts`` on; elsewhere they are 0."""

    factor: Factored
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def each(self) -> Array:
        g = self.factor.each()
        ends = (
            total - start - size
            for total, start, size in zip(self.shape, self.starts, g.shape[1:], strict=True)
        )
        return jnp.pad(g, [(0, 0), *zip(self.starts, ends)])

    def scaled(self, weights: Array) -> Part:
        return Part(self.factor.scaled(weights), self.starts, self.shape)

    def total(self) -> Array:
        return self._placed(self.factor.total())

    def squared_norm(self) -> Array:
        return self.factor.squared_norm()

    def inner(self, other: Factored) -> Array:
        if isinstance(other, Part) and self._block() == other._block():
            return self.factor.inner(other.factor)
        if isinstance(other, Part) and self._apart(other):
            return jnp.zeros(len(jax.tree.leaves(self)[0]), jax.eval_shape(self.each).dtype)
        return super().inner(other)

    def gram(self, other: Factored) -> Array:
        if isinstance(other, Part) and self._block() == other._block():
            return self.factor.gram(other.factor)
        if isinstance(other, Part) and self._apart(other):
            n, m = (len(jax.tree.leaves(f)[0]) for f in (self, other))
            return jnp.zeros((n, m), jax.eval_shape(self.each).dtype)
        return super().gram(other)

    def dot(self, v: Array) -> Array:
        return self.factor.dot(v[tuple(slice(*ends) for ends in self._block())])

    def second_moment(self) -> Array:
        return self._placed(self.factor.second_moment())

    def examples(self, first: Array | int, count: int) -> Part:
        return Part(self.factor.examples(first, count), self.starts, self.shape)

    def _placed(self, block: Array) -> Array:
        ends = (t - e for t, (_, e) in zip(self.shape, self._block(), strict=True))
        return jnp.pad(block, list(zip(self.starts, ends)))

    def _block(self) -> tuple[tuple[int, int], ...]:
        """Where it begins and ends on each axis."""
        sizes = jax.eval_shape(self.factor.each).shape[1:]
        return tuple((start, start + size) for start, size in zip(self.starts, sizes))

    def _apart(self, other: Part) -> bool:
        pairs = zip(self._block(), other._block())
        return any(a[1] <= b[0] or b[1] <= a[0] for a, b in pairs)


def block(factor: Factored, axis: int, start: int, size: int) -> Factored | None:
    """The factors of ``size`` entries of the parameter's ``axis``, where they follow from slices of
    the factor's own arrays; None elsewhere."""
    if isinstance(factor, Outer):
        u, v = (
            lax.slice_in_dim(array, start, start + size, axis=-1) if axis == i else array
            for i, array in enumerate((factor.u, factor.v))
        )
        return Outer(u, v)
    if isinstance(factor, Itself):
        return Itself(lax.slice_in_dim(factor.g, start, start + size, axis=1 + axis))
    if isinstance(factor, Rows) and axis == 1:
        return factor.columns(start, size)
    if isinstance(factor, Stacked) and axis > 0:
        layers = block(factor.layers, axis - 1, start, size)
        return None if layers is None else Stacked(layers)
    if isinstance(factor, Sum):
        parts = [block(part, axis, start, size) for part in factor.parts]
        return None if None in parts else Sum(tuple(p for p in parts if p is not None))
    if isinstance(factor, Arranged) and [move for move, _ in factor.moves] == ["transpose"]:
        inner = block(factor.factor, factor.moves[0][1][axis], start, size)
        return None if inner is None else transposed(inner, factor.moves[0][1])
    return None
