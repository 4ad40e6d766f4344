"""Per-example quantities: contractions of the factors that one δ recursion gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .contractions import each, squared_norm, total
from .gradients import like
from .layer import Layer, ModelError
from .losses import Loss
from .microbatches import in_microbatches
from .recursion import recursion

Tree = Any


def per_example_grads(model: Layer, loss: Loss) -> Callable[..., Tree]:
    """The gradient gₙ of each example's cost Cₙ, unweighted.

    Returns:
      ``fn(params, x, y, *, key=None) -> tree`` of ``params``, every leaf with a leading batch
      axis.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model)

    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Tree:
        costs, backward = recursion(model.batched, loss, params, x, y, key)
        return like(params, backward(jnp.ones_like(costs), each))

    return fn


def per_example_grad_norms(model: Layer, loss: Loss) -> Callable[..., Array]:
    """‖gₙ‖, the global L2 norm of each example's gradient, without ever forming the gradient.

    For a dense layer ‖δ aᵀ‖² = ‖δ‖² ‖a‖² (Goodfellow 2015, "Efficient per-example gradient
    computations"); each class in ``bp.factors`` has its own.

    Returns:
      ``fn(params, x, y, *, key=None) -> (batch,)``.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model)

    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Array:
        costs, backward = recursion(model.batched, loss, params, x, y, key)
        return norms(backward, costs)

    return fn


def clipped_grad(
    model: Layer, loss: Loss, max_norm: float, *, normalize_by: float | None = None
) -> Callable[..., Tree]:
    """The sum of clipped per-example gradients, divided by a constant.

        g = Σₙ wₙ gₙ min(1, max_norm / ‖gₙ‖) / normalize_by

    One forward pass and two δ recursions: the first gives the norms, the second starts from
    δ^L scaled by each example's clipping weight, and nothing per example is ever formed.
    (Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.)

    Args:
      max_norm: the L2 norm to which each example's gradient is clipped, above 0.
      normalize_by: the divisor, above 0; the number of rows of the batch if not given.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params``. Weights wₙ are 1 if
      not given; an example of weight 0 adds nothing and never changes the divisor. With weights
      of 0 and 1, adding or removing one example changes g by at most max_norm / normalize_by.

    Raises:
      ValueError: if ``max_norm`` or ``normalize_by`` is not above 0.
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model)
    _check_positive("max_norm", max_norm)
    if normalize_by is not None:
        _check_positive("normalize_by", normalize_by)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        costs, backward = recursion(model.batched, loss, params, x, y, key)
        clip = jnp.minimum(1, max_norm / norms(backward, costs)).astype(costs.dtype)
        if weights is not None:
            clip = clip * checked_weights(costs, weights)
        divisor = costs.size if normalize_by is None else normalize_by
        return like(params, backward(clip / divisor, total))

    return fn


def norms(backward: Callable[[Array, Tree], Tree], costs: Array) -> Array:
    """‖gₙ‖ over all parameters, from one δ recursion."""
    squared = backward(jnp.ones_like(costs), squared_norm)
    return jnp.sqrt(sum(jax.tree.leaves(squared), jnp.zeros_like(costs)))


def check_separate(model: Layer) -> None:
    """Raises where an example's output depends on the other examples of its batch."""
    if model.mixes_examples:
        raise ModelError(
            f"{model.name}: mixes the examples of a batch, so no example has a gradient of its "
            "own; use a layer that does not, such as layer_norm or group_norm"
        )


def _check_positive(what: str, value: float) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    if not (value > 0) or math.isnan(value):
        raise ValueError(f"{what}: takes a number above 0, got {value}")
