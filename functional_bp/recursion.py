"""The δ recursion over a batch: forward through a model and its loss, and back from the costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .checks import ModelError, described, random_key, told, weights_of
from .contractions import asks_layers, is_contraction, keep
from .layer import (
    Layer,
    batch_size,
    combined,
    output_shape,
    place,
    shapes_of,
)
from .losses.definition import Loss, pair_of
from .traced.function import from_cost

Tree = Any


Model = Layer | Callable[..., Array]
"""A layer, or a cost: ``(params, x, y) -> C`` of one example, which has no loss."""

cost_itself = Loss(
    "the cost itself",
    value=lambda cost, y: cost,
    delta=lambda cost, y: jnp.ones_like(cost),
    joined=lambda pair: _of_costs(pair.parts[0]),
)
"""In place of a loss, where the model is a layer from (x, y) to the costs already."""


def _of_costs(layer: Layer) -> Layer:
    """With None in place of ∂C/∂(x, y), as ``with_loss`` says."""

    def backward(*given: Any) -> tuple[None, Tree]:
        return None, layer.backward(*given)[1]

    return dataclasses.replace(layer, backward=backward)


def paired(model: Model, loss: Loss | None) -> tuple[Layer, Loss]:
    """A model and its loss; of a function ``cost(params, x, y) -> C``, the layer that it is.

    Raises:
      ModelError: unless they are a layer and a loss, or a function and None.
    """
    if isinstance(model, Layer) and isinstance(loss, Loss):
        return model, loss
    if loss is None and callable(model) and not isinstance(model, Layer):
        return from_cost(model), cost_itself
    raise ModelError(
        "takes a layer and a loss of bp.losses, or a function cost(params, x, y) of one example "
        f"and no loss, got {told(model)} and {told(loss)}; {_way_to_a_pair(model, loss)}"
    )


def _way_to_a_pair(model: Any, loss: Any) -> str:
    if not isinstance(model, Layer) or not callable(loss):
        return "bp.from_function makes a layer of any model"
    if getattr(loss, "__module__", "").startswith(Loss.__module__.rpartition(".")[0]):
        return f"bp.losses.{loss.__name__}(…) makes a loss"
    return "bp.losses.loss(C, jax.grad(C)) makes a loss of a function C(a, y) of one example"


def init(model: Layer, loss: Loss, key: Array, x: Tree, y: Tree) -> Tree:
    """Parameters of a model and its loss, from one example's input and target.

    They are the pair ``(model's, loss's)`` for a loss that has parameters, else ``model.init``'s.

    Args:
      model, loss: a layer and a loss.
      key: of ``jax.random``.
      x, y: ONE example's input and target, or their ``ShapeDtypeStruct``.

    Raises:
      ModelError: as ``model.init``.

    Example:
      >>> params = bp.init(
      ...     bp.dense(2), bp.losses.squared_error, jax.random.key(0), jnp.ones(3), jnp.ones(2)
      ... )
      >>> sorted(params)
      ['bias', 'weight']
    """
    model, loss = paired(model, loss)
    with place("y:"):
        shapes_of(y)
    return with_loss(model, loss).init(key, (x, y))


def with_loss(model: Model, loss: Loss | None) -> Layer:
    """A model and its loss as one layer, from (x, y) to the costs C, ``(batch,)``.

    The δ that its backward takes are the weights wₙ = ∂(objective)/∂Cₙ. They scale δ^L, once, and
    with it everything below. What it gives in place of ∂C/∂(x, y) are the costs, if the loss makes
    them anew on the way back, else None.
    """
    model, loss = paired(model, loss)
    return loss.joined(_ended(model, loss.layer, has_parameters=loss.has_parameters))


def with_outputs(model: Layer, loss: Loss) -> Layer:
    """As ``with_loss``, from (x, y) to the costs and the outputs that they are of; forward only."""
    last = loss.layer

    def forward(params: Tree, ay: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        costs, residuals = last.forward(params, ay, key)
        return (costs, ay[0]), residuals

    last_with_outputs = dataclasses.replace(last, forward=forward)
    return loss.joined(_ended(model, last_with_outputs, has_parameters=loss.has_parameters))


def separate(model: Model, loss: Loss | None) -> Layer:
    """A model and its loss as one layer, if each example has a gradient of its own."""
    model, loss = paired(model, loss)
    if model.mixes_examples:
        raise ModelError(
            f"{model.name}: mixes the examples of a batch, so no example has a gradient of its "
            "own; use a layer that does not, such as layer_norm or group_norm, or model.inference()"
        )
    return with_loss(model, loss)


def _ended(model: Layer, last: Layer, *, has_parameters: bool) -> Layer:
    def split(tree: Tree) -> tuple[Tree, Tree]:
        """The model's part of the parameters, or of what is asked of them, and the loss's."""
        if not has_parameters:
            return tree, ()
        return (tree, tree) if is_contraction(tree) else pair_of(last.name, tree)

    def joined(of_model: Tree, of_loss: Tree) -> Tree:
        return (of_model, of_loss) if has_parameters else of_model

    def init(key: Array, xy: Tree) -> Tree:
        random_key("key", key, or_none=False)
        x, y = xy
        if not has_parameters:
            return model.init(key, x)
        key, key_of_loss = jax.random.split(key)
        params = model.init(key, x)
        ends = output_shape(model, params, x), shapes_of(y)
        return params, last.init(key_of_loss, ends)

    def forward(params: Tree, xy: Tree, key: Array | None = None) -> tuple[Array, Tree]:
        x, y = xy
        of_model, of_loss = split(params)
        a, residuals = model.forward(of_model, x, key)
        costs, ends = last.forward(of_loss, (a, y))
        return costs, (residuals, ends)

    def backward(
        params: Tree, residuals: Tree, weights: Array, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        of_model, of_loss = split(params)
        asked, asked_of_loss = split(contract)
        residuals, ends = residuals
        (delta, costs), of_last = last.backward(of_loss, ends, weights, asked_of_loss)  # BP1
        _, results = model.backward(of_model, residuals, barred(delta), asked)  # BP2–BP4
        return costs, results if asks_layers(contract) else joined(results, of_last)

    def renew(params: Tree, residuals: Tree) -> Tree:
        of_model, of_loss = split(params)
        return joined(model.renew(of_model, residuals[0]), of_loss)

    def is_state(params: Tree) -> Tree:
        of_model, of_loss = split(params)
        return joined(model.is_state(of_model), last.is_state(of_loss))

    return combined(
        model.name,
        (model, last),
        lambda model, last: _ended(model, last, has_parameters=has_parameters),
        init=init,
        forward=forward,
        backward=backward,
        renew=renew,
        is_state=is_state,
        holds_deltas=model.holds_deltas,
    )


def forward_pass(
    model: Layer, loss: Loss, params: Tree, x: Tree, y: Tree, key: Array | None = None
) -> tuple[Tree, Any]:
    """``(a, backward)``: the outputs, and ``backward(delta, contract)`` from any δ^L of theirs."""
    a, residuals = model.forward(params, x, key)
    with place(f"{loss.name}:"):
        loss.check(a, y)

    def backward(delta: Tree, contract: Tree) -> Tree:
        return model.backward(params, residuals, barred(delta), contract)[1]

    return a, backward


def barred(delta: Tree) -> Tree:
    """δ^L as one array: XLA then happens to schedule the last layer's contraction before the δ
    below it, which spares one activation at the peak of a wide batch, at no cost in time. (Between
    all layers it would cost 2 to 3 %.)"""
    return jax.lax.optimization_barrier(delta)  # type: ignore[no-untyped-call]


def check_batch(x: Tree, y: Tree) -> int:
    """The number of examples; raises unless x and y have as many, and at least one."""
    sizes = []
    for what, tree in (("x", x), ("y", y)):
        with place(f"{what}:"):
            sizes.append(batch_size(tree))
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"x and y: takes as many targets as examples, got {sizes[0]} examples "
            f"{described(x)} and {sizes[1]} targets {described(y)}"
        )
    if sizes[0] == 0:
        raise ModelError(f"x: takes at least one example, got an empty batch {described(x)}")
    return sizes[0]


def checked_weights(x: Tree, y: Tree, weights: Array | None) -> Array:
    """A weight for each example of a batch, ``(batch,)``; 1 if not given."""
    n = check_batch(x, y)
    if weights is None:
        return jnp.ones(n)
    return jnp.asarray(weights_of(n, weights), jnp.result_type(float))


def mean_weights(x: Tree, y: Tree, weights: Array | None) -> Array:
    """∂C/∂Cₙ = wₙ / Σ w, for the mean over a batch; 0 where all weights are 0."""
    if weights is None:
        n = check_batch(x, y)
        return jnp.full(n, 1 / n)
    weights = checked_weights(x, y, weights)
    sum_ = weights.sum()
    return weights / jnp.where(sum_ == 0, 1, sum_)
