"""Contractions: what is asked of every parameter's factored gradient.

The δ recursion hands each parameter's factors to that parameter's contraction as soon as they
are known, and keeps only what it returns. A tree of contractions has the shape of the
parameters, or is a prefix of it: a single contraction asks the same of every parameter below.

    total                       Σₙ gₙ
    weighted(w)                 Σₙ wₙ gₙ, with weights of this parameter's own
    each                        gₙ, one gradient per example
    squared_norm                ‖gₙ‖²
    squared_norms               ‖gₙ‖² for each layer of a stack apart, the layers first
    gram                        ⟨gₙ, gₘ⟩ for every pair of examples
    second_moment               the mean over n of gₙ², element by element
    dot(v)                      ⟨gₙ, v⟩ for one parameter's v
    second_order(w, of, shared) one Kronecker factor of Σₙ wₙ gₙ gₙᵀ
    keep                        the factors themselves, for a second look
    drop                        nothing: the parameter is frozen, its gradient never computed
    each_delta                  asked of layers, not of parameters: the δ of each one's output
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, described
from .docstrings import shown
from .factors.combined import Stacked, Sum, as_stack
from .factors.factored import Factored, Itself, Outer

Tree = Any


def _layers_first(results: Tree) -> Tree:
    return results


def _layers_summed(results: Array) -> Array:
    return results.sum(0)


def _examples_first(results: Array) -> Array:
    return jnp.moveaxis(results, 0, 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["given"],
    meta_fields=["asks", "join", "additive", "by_layer", "of_layers"],
)
@dataclass(frozen=True, eq=False)
class Contraction:
    """What is asked of one parameter's factored gradient.

    Attributes:
      asks: ``(factor, *given) -> result``, for one parameter.
      given: arrays that ``asks`` takes besides; in a stack they are split among the layers.
      join: the result for a stack of layers, from theirs with the layers on a new first axis.
      additive: the results of two uses of a parameter may be added: totals may, norms may not.
      by_layer: factors that were kept from a stack are asked layer by layer.
      of_layers: it is asked of each layer's δ, the gradient of a bias that nobody added (BP3).
    """

    asks: Callable[..., Any]
    given: tuple[Array, ...] = ()
    join: Callable[[Any], Any] = _layers_first
    additive: bool = False
    by_layer: bool = False
    of_layers: bool = False

    def __call__(self, factor: Factored) -> Any:
        """The result for one parameter."""
        if self.by_layer:
            return _by_layer(self.asks, factor, *self.given)
        return self.asks(factor, *self.given)

    def __getitem__(self, key: Any) -> Contraction:
        """Asked of a whole tree, a contraction is asked of every part of it."""
        return self

    @property
    def adds_examples(self) -> bool:
        """Whether to it examples are as good as positions: it asks for their total, or nothing."""
        return self.asks in (total.asks, drop.asks)


def _by_layer(asks: Callable[..., Any], factor: Factored, *given: Array) -> Any:
    """``asks`` of the factors, for each layer apart where they are a stack's."""
    if isinstance(factor, Stacked):
        return lax.map(lambda each: _by_layer(asks, *each), (factor.layers, *given))
    if isinstance(factor, Sum) and any(isinstance(part, Stacked) for part in factor.parts):
        return _by_layer(asks, as_stack(factor), *given)
    return asks(factor, *given)


total = Contraction(lambda f: f.total(), additive=True)
each = Contraction(lambda f: f.each(), join=_examples_first, additive=True)
squared_norm = Contraction(lambda f: f.squared_norm(), join=_layers_summed)
squared_norms = Contraction(lambda f: f.squared_norm(), by_layer=True)
gram = Contraction(lambda f: f.gram(f), join=_layers_summed)
second_moment = Contraction(lambda f: f.second_moment(), by_layer=True)
keep = Contraction(lambda f: f, join=Stacked)
drop = Contraction(lambda f: None, additive=True)
each_delta = Contraction(lambda f: f.each(), join=_examples_first, of_layers=True)


def dot(v: Array) -> Contraction:
    """⟨gₙ, v⟩ for one parameter's ``v``."""
    return Contraction(_dot, (v,), join=_layers_summed, additive=True)


def _dot(factor: Factored, v: Array) -> Array:
    return factor.dot(v)


def weighted(weights: Array) -> Contraction:
    """Σₙ wₙ gₙ with weights of this parameter's own, ``(*layers of a stack, n)``."""
    return Contraction(_weighted_total, (weights,), additive=True, by_layer=True)


def _weighted_total(factor: Factored, weights: Array) -> Array:
    return factor.scaled(weights).total()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean"], meta_fields=["of_rows"])
@dataclass(frozen=True)
class Moment:
    """Σₙ wₙ aₙ aₙᵀ or Σₙ wₙ δₙ δₙᵀ, and whether that is of the parameter's rows or its columns."""

    mean: Array
    of_rows: bool


@functools.cache
def _second_order(of: str, shared: str) -> Callable[[Factored, Array], Moment | None]:
    def asks(factor: Factored, weights: Array) -> Moment | None:
        f = factor.as_outer()
        if f is None or _lie_both_ways(factor):
            return None
        of_rows = (of == "input") == factor.rows_are_inputs
        vectors = f.u if of_rows else f.v
        if shared == "reduce":
            vectors = vectors.sum(1, keepdims=True)
            weights = weights / f.v.shape[1] ** 2 if of == "input" else weights
        elif of == "input":
            weights = weights / f.v.shape[1]
        return Moment(Outer(vectors, vectors).scaled(weights).total(), of_rows)

    return asks


def _lie_both_ways(factor: Factored) -> bool:
    """Whether a parameter's rows are inputs in one of its uses and outputs in another."""
    return isinstance(factor, Sum) and len({part.rows_are_inputs for part in factor.parts}) > 1


def second_order(weights: Array, of: str, shared: str) -> Contraction:
    """One Kronecker factor of Σₙ wₙ gₙ gₙᵀ: ``of`` the ``"input"``, Σₙ wₙ aₙ aₙᵀ, or ``of`` the
    ``"output"``, Σₙ wₙ δₙ δₙᵀ. ``shared``: how positions come in, ``"expand"`` or ``"reduce"``.
    Weights as those of ``weighted``; None where the gradient is no outer product."""
    return Contraction(_second_order(of, shared), (weights,), by_layer=True)


def is_contraction(node: Any) -> bool:
    """Whether a node of a tree is one contraction."""
    return isinstance(node, Contraction)


def is_factor(node: Any) -> bool:
    """Whether a node of a tree is one parameter's factored gradient."""
    return isinstance(node, Factored)


def broadcast(contract: Tree, params: Tree) -> Tree:
    """A contraction for every parameter, from a prefix of that tree; None asks for nothing."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(lambda _: drop if c is None else c, below),
        contract,
        params,
        is_leaf=lambda node: node is None or is_contraction(node),
    )


def check_factors(params: Tree, factors: Tree) -> None:
    """Raises unless there is one factored gradient for each parameter."""
    found: Any = jax.tree.structure(factors, is_leaf=is_factor)
    if found != jax.tree.structure(params) or not all(
        map(is_factor, jax.tree.leaves(factors, is_leaf=is_factor))
    ):
        raise ModelError(
            "takes a backward that gives one factored gradient (bp.factors) for each trained "
            f"parameter, {described(params)}; got {described(factors)}"
        )


def contract_factors(contract: Tree, factors: Tree) -> Tree:
    """Hands each factored gradient to its contraction."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(c, below, is_leaf=is_factor),
        contract,
        factors,
        is_leaf=is_contraction,
    )


def asks_layers(contract: Tree) -> bool:
    """Whether it is asked of layers, not of their parameters."""
    return isinstance(contract, Contraction) and contract.of_layers


def contract_layer(contract: Tree, delta: Tree, factors: Tree) -> Tree:
    """What is asked of one layer that is no combination of others: of its factors, or of its δ."""
    if asks_layers(contract):
        return jax.tree.map(lambda d: contract(Itself(d)), delta)
    return contract_factors(contract, factors)


def join_results(contract: Tree, results: Tree) -> Tree:
    """Joins results whose first axis is the layers of a stack."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(c.join, below, is_leaf=is_factor),
        contract,
        results,
        is_leaf=is_contraction,
    )


__all__ = [
    "Contraction",
    "dot",
    "drop",
    "each",
    "each_delta",
    "gram",
    "keep",
    "second_moment",
    "second_order",
    "squared_norm",
    "squared_norms",
    "total",
    "weighted",
]

__dir__ = shown(globals())
