"""The δ recursion over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .checks import ModelError, described, told, weights_of
from .factors import per_example
from .layer import Layer, batch_size, place
from .losses import Loss

Tree = Any


def check_model(model: Layer, loss: Loss) -> None:
    """Raises unless they are a layer and a loss."""
    if not isinstance(model, Layer) or not isinstance(loss, Loss):
        raise ModelError(
            f"takes a layer and a loss of bp.losses, got {told(model)} and {told(loss)}"
        )


def check_separate(model: Layer, loss: Loss) -> None:
    """Raises unless they are a layer and a loss, and each example has a gradient of its own."""
    check_model(model, loss)
    if model.mixes_examples:
        raise ModelError(
            f"{model.name}: mixes the examples of a batch, so no example has a gradient of its "
            "own; use a layer that does not, such as layer_norm or group_norm"
        )


def recursion(
    model: Layer, loss: Loss, params: Tree, x: Tree, y: Tree, key: Array | None = None
) -> tuple[Array, Callable[[Array, Tree], Tree]]:
    """Runs a model forward over a batch, ready to run δ back.

    Args:
      model: a batched form, ``layer.batched``.

    Returns:
      costs: C for each example, ``(batch,)``.
      backward: ``(weights, contract) -> results``. The weights, ``(batch,)``, are ∂(objective)/∂Cₙ;
        they scale δ^L, once, and with it everything below.
    """
    a, from_outputs = forward_pass(model, loss, params, x, y, key)
    with place(f"{loss.name}:"):
        costs = loss.costs(a, y)

    def backward(weights: Array, contract: Tree) -> Tree:
        delta = loss.deltas(a, y)  # BP1
        return from_outputs(jax.tree.map(lambda d: per_example(weights, d), delta), contract)

    return costs, backward


def forward_pass(
    model: Layer, loss: Loss, params: Tree, x: Tree, y: Tree, key: Array | None = None
) -> tuple[Tree, Callable[[Tree, Tree], Tree]]:
    """``(a, backward)``: the outputs, and ``backward(delta, contract)`` from any δ^L of theirs."""
    check_batch(x, y)
    a, residuals = model.forward(params, x, key)
    with place(f"{loss.name}:"):
        loss.check(a, y)

    def backward(delta: Tree, contract: Tree) -> Tree:
        # δ^L as one array: XLA then happens to schedule the last layer's contraction before the
        # δ below it, which spares one activation at the peak of a wide batch, at no cost in time.
        # (Between all layers it would cost 2 to 3 %.)
        delta = jax.lax.optimization_barrier(delta)  # type: ignore[no-untyped-call]
        return model.backward(params, residuals, delta, contract)[1]  # BP2–BP4

    return a, backward


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
