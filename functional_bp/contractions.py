"""Contractions: what is asked of every parameter's factored gradient.

The δ recursion hands each parameter's factors to that parameter's contraction as soon as they
are known, and keeps only what it returns. A tree of contractions has the shape of the
parameters, or is a prefix of it: a single contraction asks the same of every parameter below.

A contraction says three things: what it takes from one parameter's factors (``__call__``), how
the results of a stack of layers join (``join``), and whether the results of two uses of the same
parameter may simply be added (``additive``: totals may, norms may not).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .factors import Factored, Outer, Stacked, Sum

Tree = Any


class Contraction:
    """What is asked of one parameter's factored gradient."""

    additive: ClassVar[bool] = False

    def __call__(self, factor: Factored) -> Any:
        """The result for one parameter."""
        raise NotImplementedError

    def join(self, results: Any) -> Any:
        """The result for a stack of layers, from theirs with the layers on a new first axis."""
        return results

    def __getitem__(self, key: Any) -> Contraction:
        """Asked of a whole tree, a contraction is asked of every part of it."""
        return self


_contraction = functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])


@_contraction
@dataclass(frozen=True)
class Total(Contraction):
    """Σₙ gₙ."""

    additive = True

    def __call__(self, factor: Factored) -> Array:
        return factor.total()


@_contraction
@dataclass(frozen=True)
class Each(Contraction):
    """gₙ, one gradient per example."""

    additive = True

    def __call__(self, factor: Factored) -> Array:
        return factor.each()

    def join(self, results: Array) -> Array:
        return jnp.moveaxis(results, 0, 1)


@_contraction
@dataclass(frozen=True)
class SquaredNorm(Contraction):
    """‖gₙ‖²."""

    def __call__(self, factor: Factored) -> Array:
        return factor.squared_norm()

    def join(self, results: Array) -> Array:
        return results.sum(0)


@_contraction
@dataclass(frozen=True)
class SquaredNorms(Contraction):
    """‖gₙ‖² for each layer of a stack apart, the layers first."""

    def __call__(self, factor: Factored) -> Array:
        return _by_layer(lambda f: f.squared_norm(), factor)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=[])
@dataclass(frozen=True)
class Weighted(Contraction):
    """Σₙ wₙ gₙ with weights of this parameter's own; in a stack, split among the layers."""

    weights: Array

    additive = True

    def __call__(self, factor: Factored) -> Array:
        return _by_layer(lambda f, w: f.scaled(w).total(), factor, self.weights)


def _by_layer(function: Callable[..., Any], factor: Factored, *args: Array) -> Any:
    """``function`` of the factors, for each layer apart where they are a stack's."""
    if isinstance(factor, Stacked):
        return lax.map(lambda each: _by_layer(function, *each), (factor.layers, *args))
    if isinstance(factor, Sum) and isinstance(factor.parts[0], Stacked):
        uses = Sum(tuple(f.layers for f in factor.parts if isinstance(f, Stacked)))
        return _by_layer(function, Stacked(uses), *args)
    return function(factor, *args)


@_contraction
@dataclass(frozen=True)
class Gram(Contraction):
    """⟨gₙ, gₘ⟩ for every pair of examples."""

    def __call__(self, factor: Factored) -> Array:
        return factor.gram(factor)

    def join(self, results: Array) -> Array:
        return results.sum(0)


@_contraction
@dataclass(frozen=True)
class SecondMoment(Contraction):
    """Mean over n of gₙ², element by element."""

    def __call__(self, factor: Factored) -> Array:
        return _by_layer(lambda f: f.second_moment(), factor)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["of", "shared"]
)
@dataclass(frozen=True)
class SecondOrder(Contraction):
    """One Kronecker factor of Σₙ wₙ gₙ gₙᵀ: ``of`` the input, A ≈ Σₙ wₙ aₙ aₙᵀ, or ``of`` the
    output, G ≈ Σₙ wₙ δₙ δₙᵀ. ``shared``: how positions come in, ``"expand"`` or ``"reduce"``."""

    weights: Array
    of: str
    shared: str

    def __call__(self, factor: Factored) -> Array | None:
        return _by_layer(self._of_one, factor, self.weights)

    def _of_one(self, factor: Factored, weights: Array) -> Array | None:
        f = factor.as_outer()
        if f is None:
            return None
        vectors = f.v if self.of == "input" else f.u
        if self.shared == "reduce":
            vectors = vectors.sum(1, keepdims=True)
            weights = weights / f.v.shape[1] ** 2 if self.of == "input" else weights
        elif self.of == "input":
            weights = weights / f.v.shape[1]
        return Outer(vectors, vectors).scaled(weights).total()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["v"], meta_fields=[])
@dataclass(frozen=True)
class Dot(Contraction):
    """⟨gₙ, v⟩ for one parameter's ``v``. In a stack, ``v`` is split among the layers."""

    v: Array

    additive = True

    def __call__(self, factor: Factored) -> Array:
        return factor.dot(self.v)

    def join(self, results: Array) -> Array:
        return results.sum(0)


@_contraction
@dataclass(frozen=True)
class Keep(Contraction):
    """The factors themselves, for a second look."""

    def __call__(self, factor: Factored) -> Factored:
        return factor

    def join(self, results: Factored) -> Stacked:
        return Stacked(results)


@_contraction
@dataclass(frozen=True)
class Drop(Contraction):
    """Nothing: the parameter is frozen and its gradient is never computed."""

    additive = True

    def __call__(self, factor: Factored) -> None:
        return None


total, each, squared_norm, squared_norms = Total(), Each(), SquaredNorm(), SquaredNorms()
gram, second_moment, keep, drop = Gram(), SecondMoment(), Keep(), Drop()


def _is_contraction(node: Any) -> bool:
    return isinstance(node, Contraction)


def is_factor(node: Any) -> bool:
    """Whether a node of a tree is one parameter's factored gradient."""
    return isinstance(node, Factored)


def contract_factors(contract: Tree, factors: Tree) -> Tree:
    """Hands each factored gradient to its contraction."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(c, below, is_leaf=is_factor),
        contract,
        factors,
        is_leaf=_is_contraction,
    )


def join_results(contract: Tree, results: Tree) -> Tree:
    """Joins results whose first axis is the layers of a stack."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(c.join, below, is_leaf=is_factor),
        contract,
        results,
        is_leaf=_is_contraction,
    )
