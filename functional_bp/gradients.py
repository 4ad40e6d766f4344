"""Gradients of a batch's mean cost, by hand or by autodiff, and the δ of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .checks import choice
from .contractions import Contraction, drop, each, total
from .factors import Itself
from .freezing import Frozen, check_frozen, frozen_leaves, merged, trainable
from .layer import Layer, textbook
from .losses import Loss
from .meshes import WHOLE, like_arrays
from .microbatches import in_microbatches
from .recursion import check_batch, check_model, checked_weights, recursion

Tree = Any
METHODS = ("manual", "autodiff")


def value_and_grad(
    model: Layer,
    loss: Loss,
    *,
    method: str = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
) -> Callable[..., tuple[Array, Tree]]:
    """The mean cost of a batch and its gradient.

        C = Σₙ wₙ Cₙ / Σₙ wₙ

    Args:
      model: a layer.
      loss: a loss, from ``bp.losses``.
      method: ``"manual"``, the hand-written δ recursion, or ``"autodiff"``, the same function by
        ``jax.value_and_grad``.
      frozen: parameters whose gradient is never computed: a tree of bools in the shape of the
        parameters or a prefix of it, or a predicate on paths such as ``lambda path: path[0] < 3``.
      microbatch: examples at a time, their gradients added, so that memory does not grow with the
        batch; None for all at once. With a key, each microbatch draws from a key of its own.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> (C, gradient)``. x and y have the examples
      on their first axis; weights wₙ, ``(batch,)``, are 1 if not given; the gradient has the
      tree, shapes and dtypes of ``params``, with None at each frozen parameter.

    Raises:
      ValueError: for an unknown method.
      ModelError: when called with what does not fit the model.
    """
    check_model(model, loss)
    choice("method", method, METHODS)
    check_frozen(frozen)
    batched = model.batched if method == "manual" else textbook(model.batched)

    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> tuple[Array, Tree]:
        def manual(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(batched, loss, params, x, y, key)
            weights = weights.astype(costs.dtype)
            contract = jax.tree.map(lambda f: drop if f else total, frozen_leaves(params, frozen))
            return (weights @ costs, backward(weights, contract)), ()

        def autodiff(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            def mean_cost(trained: Tree) -> Array:
                costs, _ = recursion(batched, loss, merged(trained, params), x, y, key)
                return weights.astype(costs.dtype) @ costs

            return jax.value_and_grad(mean_cost)(trainable(params, frozen)), ()

        part = manual if method == "manual" else autodiff
        trained = trainable(params, frozen)
        (cost, gradient), _ = run(
            *(part, params, x, y, mean_weights(x, y, weights), key),
            sums=lambda: (WHOLE, like_arrays(trained)),
        )
        return cost, like(trained, gradient)

    return fn


def grad(
    model: Layer,
    loss: Loss,
    *,
    method: str = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
) -> Callable[..., Tree]:
    """The gradient of a batch's mean cost: ``value_and_grad`` without the value."""
    both = value_and_grad(model, loss, method=method, frozen=frozen, microbatch=microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        return both(params, x, y, weights=weights, key=key)[1]

    return fn


def deltas(model: Layer, loss: Loss) -> Callable[..., Tree]:
    """δ at every layer: ∂Cₙ/∂(output of the layer), for each example.

    Behind a dense layer this is the derivation's δ^l = ∂C/∂z^l; behind an activation, ∂C/∂a^l.

    Returns:
      ``fn(params, x, y, *, key=None) -> δ``: a tuple with one entry per layer of a chain, nested
      where layers nest, each entry of the shape of the layer's output for the batch; in
      ``repeat``, the layers on the second axis. A recurrent layer's entry is ∂C/∂h_t through time,
      ``(batch, t, h)``: what later steps sent back included.

    Raises:
      ModelError: when called with what does not fit the model.
    """
    check_model(model, loss)
    probed = _probed(model.batched)
    run = in_microbatches(model, None)

    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Tree:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(probed, loss, params, x, y, key)
            return (), backward(jnp.ones_like(costs), each)

        return run(part, params, x, y, None, key)[1]

    return fn


def _probed(layer: Layer) -> Layer:
    """The layer (batched) whose results are its δ in place of its parameters' contractions.

    δ is the gradient of a bias that nobody added (BP3), so it is contracted as one.
    """
    if layer.rebuild is not None:
        return layer.rebuild(*map(_probed, layer.parts))

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Contraction
    ) -> tuple[Tree, Tree]:
        if layer.probe is not None:
            dx, deltas = layer.probe(params, residuals, dy)
        else:
            dx, _ = layer.backward(params, residuals, dy, drop)
            deltas = dy
        return dx, jax.tree.map(lambda delta: contract(Itself(delta)), deltas)

    return Layer(layer.name, layer.init, layer.forward, backward)


def mean_weights(x: Tree, y: Tree, weights: Array | None) -> Array:
    """∂C/∂Cₙ = wₙ / Σ w, for the mean over a batch; 0 where all weights are 0."""
    if weights is None:
        n = check_batch(x, y)
        return jnp.full(n, 1 / n)
    weights = checked_weights(x, y, weights)
    sum_ = weights.sum()
    return weights / jnp.where(sum_ == 0, 1, sum_)


def like(params: Tree, results: Tree) -> Tree:
    """Gradients in their parameters' dtypes."""
    return jax.tree.map(lambda p, g: g.astype(p.dtype), params, results)
