"""Losses: the last layer of the recursion.

A loss takes the model's output a and the target y of one example and gives the cost C. Its
backward begins the recursion: ∂C/∂a, which is δ^L where the loss is fused with its activation.

    loss.value(a, y) -> C           a scalar
    loss.delta(a, y) -> ∂C/∂a       the shape of a
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .factors import accumulator
from .layer import ModelError

Tree = Any


@dataclass(frozen=True, eq=False)
class Loss:
    """C(a, y) for one example and its derivative by a. Make one with ``bp.losses.loss``."""

    name: str
    value: Callable[[Tree, Tree], Array]
    delta: Callable[[Tree, Tree], Tree]
    check: Callable[[Tree, Tree], None]

    def __repr__(self) -> str:
        return self.name


def _any_target(a: Tree, y: Tree) -> None:
    """Fits every output and target."""


def loss(
    value: Callable[[Tree, Tree], Array],
    delta: Callable[[Tree, Tree], Tree],
    *,
    name: str | None = None,
    check: Callable[[Tree, Tree], None] = _any_target,
) -> Loss:
    """A loss from its value and its derivative, both for one example.

    Args:
      value: ``(a, y) -> C``, a scalar.
      delta: ``(a, y) -> ∂C/∂a``, of a's shape.
      name: how errors call it.
      check: ``(a, y) -> None`` for a whole batch, raising ``bp.ModelError`` where the target
        does not fit; y may be traced.
    """
    return Loss(name or value.__name__, value, delta, check)


def _same_shape(a: Array, y: Array) -> None:
    _is_array(a, y)
    if a.shape != y.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ModelError(
            f"takes targets of the outputs' shape, {tuple(a.shape[1:])} for each example, as "
            f"floating-point numbers; got {y.dtype}{tuple(y.shape[1:])}"
        )


def _is_array(a: Tree, y: Tree) -> None:
    if not (hasattr(a, "shape") and hasattr(y, "shape")):
        raise ModelError(f"takes one array of outputs and one of targets, got {a} and {y}")


def _ids_or_probabilities(a: Array, y: Array) -> None:
    _is_array(a, y)
    *outer, classes = a.shape
    if y.shape == a.shape and jnp.issubdtype(y.dtype, jnp.floating):
        return
    if y.shape != tuple(outer) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ModelError(
            f"takes for each example class ids of shape {tuple(outer[1:])}, as integers, or "
            f"probabilities of shape {tuple(a.shape[1:])}; got {y.dtype}{tuple(y.shape[1:])}"
        )
    if not isinstance(y, jax.core.Tracer):
        ids = np.asarray(y)
        if ids.size and not (ids.min() >= 0 and ids.max() < classes):
            raise ModelError(
                f"takes class ids from 0 to {classes - 1}, got {ids.min()} to {ids.max()}"
            )


def _half_squared(a: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((a - y) ** 2, dtype=accumulator(a))


squared_error = loss(
    _half_squared, lambda a, y: (a - y).astype(a.dtype), name="squared_error", check=_same_shape
)
"""C = ½ ‖a − y‖²; ∂C/∂a = a − y. a and y have the same shape."""


def _is_ids(a: Array, y: Array) -> bool:
    return y.ndim < a.ndim


def _softmax_value(a: Array, y: Array) -> Array:
    a = a.astype(accumulator(a))
    log_z = jax.nn.logsumexp(a, axis=-1)
    if _is_ids(a, y):
        chosen = jnp.take_along_axis(a, y[..., None], axis=-1)[..., 0]
        return (log_z - chosen).mean()
    return (log_z * y.sum(-1) - (y * a).sum(-1)).mean()


def _softmax_delta(a: Array, y: Array) -> Array:
    positions = max(1, a.size // a.shape[-1])
    p = jax.nn.softmax(a.astype(accumulator(a)), axis=-1)
    if _is_ids(a, y):
        # p − one_hot(y) without making the one-hot. A scatter rather than a select: on two cores
        # XLA then overlaps the matrix products behind it better, 7 % of a small network's step.
        delta = p.reshape(-1, p.shape[-1])
        delta = delta.at[jnp.arange(positions), y.reshape(-1)].add(-1).reshape(p.shape)
    else:
        delta = p * y.sum(-1, keepdims=True) - y
    return (delta / positions).astype(a.dtype)


softmax_cross_entropy = loss(
    _softmax_value, _softmax_delta, name="softmax_cross_entropy", check=_ids_or_probabilities
)
"""Cross-entropy of softmax(a) with the target, from logits a ``(*positions, classes)``.

    p = softmax(a),  C = mean over positions of −Σ_k y_k log p_k
    δ^L = (p Σ_k y_k − y) / positions

y is the class ids ``(*positions)``, for which Σ_k y_k = 1, or probabilities of a's shape.
(Bridle 1990.)"""


def _sigmoid_value(a: Array, y: Array) -> Array:
    a = a.astype(accumulator(a))
    return jnp.sum(jnp.maximum(a, 0) - a * y + jnp.log1p(jnp.exp(-jnp.abs(a))))


sigmoid_cross_entropy = loss(
    _sigmoid_value,
    lambda a, y: (jax.lax.logistic(a) - y).astype(a.dtype),
    name="sigmoid_cross_entropy",
    check=_same_shape,
)
"""Cross-entropy of sigmoid(a) with the target, from logits, summed over outputs.

    p = sigmoid(a),  C = −Σ_k [y_k log p_k + (1 − y_k) log(1 − p_k)]
    δ^L = p − y

a and y have the same shape, y between 0 and 1."""
