"""Gradients of a parameter that is used in several places, or once in every layer of a stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from .along import Along
from .factored import Factored, Itself, Outer


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
        return sum(_inner(f, g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def gram(self, other: Factored) -> Array:
        return sum(_gram(f, g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def dot(self, v: Array) -> Array:
        return sum(f.dot(v) for f in self.parts)  # type: ignore[return-value]

    def second_moment(self) -> Array:
        outer = self.as_outer()
        if outer is None:
            return super().second_moment()
        return outer.second_moment().reshape(jax.eval_shape(self.each).shape[1:])

    def columns(self, first: Array | int, count: int) -> Sum:
        return Sum(tuple(f.columns(first, count) for f in self.parts))

    def examples(self, first: Array | int, count: int) -> Sum:
        return Sum(tuple(f.examples(first, count) for f in self.parts))

    @property
    def rows_are_inputs(self) -> bool:
        return self.parts[0].rows_are_inputs

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


def _inner(f: Factored, g: Factored) -> Array:
    return g.inner(f) if isinstance(g, (Along, Stacked)) else f.inner(g)


def _gram(f: Factored, g: Factored) -> Array:
    return g.gram(f).T if isinstance(g, (Along, Stacked)) else f.gram(g)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class Stacked(Factored):
    """One factored gradient per layer of a stack: every array of ``layers`` has the layers on
    its first axis and the examples on its second; the parameter is ``(layers, *parameter)``."""

    layers: Factored

    @property
    def count(self) -> int:
        """How many layers there are."""
        return len(jax.tree.leaves(self)[0])

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

    def examples(self, first: Array | int, count: int) -> Stacked:
        return Stacked(jax.vmap(lambda f: f.examples(first, count))(self.layers))

    def _sum(self, pair: Callable[[Factored, Factored], Array], other: Factored) -> Array:
        return lax.map(lambda fg: pair(*fg), (self.layers, as_stack(other).layers)).sum(0)


def as_stack(factor: Factored) -> Stacked:
    """The gradients of a parameter ``(layers, *parameter)``, layer by layer, of whatever kind."""
    if isinstance(factor, Stacked):
        return factor
    if isinstance(factor, Sum):
        return Stacked(Sum(tuple(as_stack(part).layers for part in factor.parts)))
    if isinstance(factor, Along):
        c = jnp.broadcast_to(factor.c, (len(factor.direction), *factor.c.shape))
        return Stacked(Along(c, factor.direction))
    return Stacked(Itself(jnp.moveaxis(factor.each(), 1, 0)))
