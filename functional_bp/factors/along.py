"""Gradients that differ from example to example in their length alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .factored import Factored, Outer, block_of, einsum, per_example, wide


@functools.partial(jax.tree_util.register_dataclass, data_fields=["c", "direction"], meta_fields=[])
@dataclass(frozen=True)
class Along(Factored):
    """gₙ = cₙ D: of a parameter that reaches the cost through one number, as in a weight decay.

    ``c`` is ``(n,)``. D, the ``direction``, is ``(*parameter)``: it has no axis of examples.
    """

    c: Array
    direction: Array

    def each(self) -> Array:
        return per_example(self.c, self.direction[None])

    def scaled(self, weights: Array) -> Along:
        return Along(weights.astype(self.c.dtype) * self.c, self.direction)

    def total(self) -> Array:
        return wide(self.c).sum() * self.direction

    def inner(self, other: Factored) -> Array:
        return self.c * other.dot(self.direction)

    def gram(self, other: Factored) -> Array:
        return jnp.outer(self.c, other.dot(self.direction))

    def dot(self, v: Array) -> Array:
        return self.c * einsum("i,i->", self.direction.reshape(-1), v.reshape(-1))

    def second_moment(self) -> Array:
        return (wide(self.c) ** 2).mean() * wide(self.direction) ** 2

    def columns(self, first: Array | int, count: int) -> Along:
        return Along(self.c, block_of(self.direction, first, count, -1))

    def examples(self, first: Array | int, count: int) -> Along:
        return Along(block_of(self.c, first, count, 0), self.direction)

    def _inner_with_outer(self, outer: Outer) -> Array:
        return self.inner(outer)

    def _gram_with_outer(self, outer: Outer) -> Array:
        return self.gram(outer)
