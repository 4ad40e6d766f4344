"""Gradients of a batch's mean cost, by hand or by autodiff, and the δ of every layer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from jax import Array

from ..checks import ModelError, choice, flag
from ..contractions import drop, each_delta, total
from ..freezing import Frozen, check_frozen, frozen_leaves, merged, trainable, warn_if_none
from ..layer import Layer, textbook
from ..losses.definition import Loss
from ..quantity import (
    Batch,
    OfBatch,
    OfExamples,
    Results,
    documented,
    in_batches,
    like,
    of_examples,
)
from ..recursion import Model, with_loss

Tree = Any
Method = Literal["manual", "autodiff"]


def value_and_grad(
    model: Model,
    loss: Loss | None = None,
    *,
    method: Method = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
    renew: bool = False,
) -> OfBatch[tuple[Any, Tree]]:
    """The mean cost of a batch and its gradient.

        C = Σₙ wₙ Cₙ / Σₙ wₙ

    Args:
      model: a layer.
      loss: a loss, from ``bp.losses``.
      method: ``"manual"``, the hand-written δ recursion, or ``"autodiff"``, the same function by
        ``jax.value_and_grad``.
      frozen: parameters whose gradient is never computed: a tree of bools in the shape of the
        parameters or a prefix of it, or a predicate on paths such as ``lambda path: path[0] < 3``.
        A predicate that freezes nothing is said by a ``UserWarning``.
      microbatch: examples at a time, their gradients added, so that memory does not grow with the
        batch; None for all at once. With a key, each microbatch draws from a key of its own.
      renew: return the parameters too, with their state, such as running averages, as it is after
        this batch.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> (C, gradient)``; with ``renew``
      ``((C, params), gradient)``. x and y have the examples on their first axis; weights wₙ,
      ``(batch,)``, are 1 if not given; the gradient has the tree, shapes and dtypes of ``params``,
      with None at each parameter that is frozen or state.

    Raises:
      ModelError: for an unknown method; for ``renew`` with microbatches; when called with what does
        not fit the model.

    Example:
      >>> model, loss = bp.dense(1), bp.losses.squared_error
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))
      >>> cost, gradient = bp.value_and_grad(model, loss)(params, x, y)
      >>> float(cost), gradient["bias"].tolist(), gradient["weight"].tolist()
      (10.0, [4.0], [[10.0]])
    """
    cost = with_loss(model, loss)
    choice("method", method, Method)
    check_frozen(frozen)
    if flag("renew", renew) and microbatch is not None:
        raise ModelError(
            "microbatch: takes None where a layer's state is renewed, which all examples of a "
            f"batch do together, got {microbatch}"
        )
    formula_of_autodiff = textbook(cost)

    def untrained(params: Tree) -> Tree:
        return jax.tree.map(
            lambda *either: any(either), frozen_leaves(params, frozen), cost.is_state(params)
        )

    def trained(params: Tree) -> Tree:
        return trainable(params, untrained(params))

    def manual(batch: Batch) -> Results:
        r = batch.recursion(cost)
        contract = jax.tree.map(lambda f: drop if f else total, untrained(batch.params))
        costs, gradients = r.with_costs(r.weights, contract)
        return Results(gradients, r.weights @ costs, renewed=r.renewed() if renew else ())

    def autodiff(batch: Batch) -> Results:
        def mean_cost(trained: Tree) -> tuple[Array, Tree]:
            params = merged(trained, batch.params)
            r = dataclasses.replace(batch, params=params).recursion(formula_of_autodiff)
            return r.weights @ r.costs, r.renewed() if renew else ()

        differentiated = jax.value_and_grad(mean_cost, has_aux=True)
        (mean, renewed), gradients = differentiated(trained(batch.params))
        return Results(gradients, mean, renewed=renewed)

    formula = manual if method == "manual" else autodiff
    run = in_batches(cost, formula, microbatch, mean=True, trained=trained)
    met: list[bool] = []  # whether there were parameters, to look once whether any is frozen

    @documented(OfBatch)
    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> tuple[Any, Tree]:
        if not met:
            met.append(True)
            warn_if_none(params, frozen, 2)
        gradients, mean, _, renewed = run(params, x, y, weights, key)
        value = (mean, _with_state(cost, params, renewed)) if renew else mean
        return value, like(trained(params), gradients)

    return fn


def _with_state(cost: Layer, params: Tree, renewed: Tree) -> Tree:
    """The parameters with the state of the renewed ones."""

    def either(state: bool, p: Array, new: Array) -> Array:
        if not state:
            return p
        return new if new.dtype == p.dtype else new.astype(p.dtype)

    return jax.tree.map(either, cost.is_state(params), params, renewed)


def grad(
    model: Model,
    loss: Loss | None = None,
    *,
    method: Method = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
) -> OfBatch[Tree]:
    """The gradient of a batch's mean cost: ``value_and_grad`` without the value.

    Args, returns and raises: as ``value_and_grad``.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> gradient = bp.grad(bp.dense(1), bp.losses.squared_error)
      >>> gradient(params, jnp.ones((2, 1)), jnp.zeros((2, 1)))["weight"].tolist()
      [[2.0]]
    """
    both = value_and_grad(model, loss, method=method, frozen=frozen, microbatch=microbatch)

    @documented(OfBatch)
    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        return both(params, x, y, weights=weights, key=key)[1]

    return fn


def deltas(model: Layer, loss: Loss) -> OfExamples[Tree]:
    """∂Cₙ/∂(output of the layer) at every layer, for each example.

    Behind a dense layer this is the derivation's δ^l = ∂C/∂z^l; behind an activation, ∂C/∂a^l.

    Returns:
      ``fn(params, x, y, *, key=None) -> δ``: a tuple with one entry per layer of a chain, nested
      where layers nest, each entry of the shape of the layer's output for the batch; in
      ``repeat``, the layers on the second axis. A recurrent layer's entry is ∂C/∂h_t through time,
      ``(batch, t, h)``: what later steps sent back included.

    Raises:
      ModelError: when called with what does not fit the model.

    Example:
      >>> model = bp.chain(bp.dense(2), bp.tanh)
      >>> params = model.init(jax.random.key(0), jnp.ones(3))
      >>> of_dense, of_tanh = bp.deltas(model, bp.losses.squared_error)(
      ...     params, jnp.ones((4, 3)), jnp.zeros((4, 2))
      ... )
      >>> of_dense.shape, of_tanh.shape
      ((4, 2), (4, 2))
    """
    cost = with_loss(model, loss)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        return Results(rows=r.backward(r.ones, each_delta))

    return of_examples(cost, formula, None)
