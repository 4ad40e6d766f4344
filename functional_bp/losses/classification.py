"""Losses of outputs that are logits: cross-entropies, fused with their last activation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import number
from ..docstrings import explained
from ..factors.factored import accumulator
from ..layer import place
from .definition import Loss, loss
from .targets import ids_or_probabilities, is_ids, probabilities, same_shape, target_and_mask

Tree = Any


def _product(y: Array, cost: Array) -> Array:
    """y ⊙ cost, and 0 where y is 0: what cannot happen costs nothing, however unlikely."""
    return jnp.where(y == 0, 0, y * jnp.where(y == 0, 0, cost))


def _below_highest(a: Array) -> Array:
    """The logits less what they have in common, which is exact: at 1e5, float32 would have two
    digits left for the cost. Cost and δ both begin with it, so that XLA takes e^a once for both."""
    a = a.astype(accumulator(a))
    highest = jax.lax.stop_gradient(a.max(-1, keepdims=True))
    return a - jnp.where(jnp.isfinite(highest), highest, 0)


def _softmax_value(a: Array, y: Tree) -> Array:
    y, mask = target_and_mask(a, y)
    a = _below_highest(a)
    log_z = jnp.log(jnp.exp(a).sum(-1))
    if is_ids(a, y):
        costs = log_z - jnp.take_along_axis(a, y[..., None], axis=-1)[..., 0]
    else:
        costs = _product(y, log_z[..., None] - a).sum(-1)
    if mask is None:
        return costs.mean()
    return jnp.where(mask, costs, 0).sum() / jnp.maximum(1, mask.sum())


def _softmax_delta(a: Array, y: Tree, weight: Array | float = 1.0) -> Array:
    """∂C/∂a times a weight."""
    y, mask = target_and_mask(a, y)
    positions: Any = max(1, a.size // a.shape[-1]) if mask is None else jnp.maximum(1, mask.sum())
    weight = weight / positions
    e = jnp.exp(_below_highest(a))
    z = e.sum(-1, keepdims=True)
    if is_ids(a, y):
        # p − one_hot(y) without making the one-hot, the weight in p before: what is last is not
        # computed again by each of the products that read δ. (The places do not wait for the
        # forward pass. With a second thing ready at the start, XLA's CPU runtime runs the products
        # in its own pool, not beside it in a third thread: of an MLP's step at batch 128, a compare
        # and a select in place of this took 7 to 9 % more on two cores.)
        target = (*jnp.indices(y.shape, sparse=True), y)
        delta = (e * (weight / z)).at[target].add(-weight, unique_indices=True)
    else:
        delta = (e / z * y.sum(-1, keepdims=True) - y) * weight
    delta = delta if mask is None else jnp.where(mask[..., None], delta, 0)
    return delta.astype(a.dtype)


def _root_of_position_weights(a: Array, y: Tree) -> Array:
    """√ of each position's share of ∇²C, ``(*positions, 1)``."""
    y, mask = target_and_mask(a, y)
    weights = jnp.ones(a.shape[:-1], a.dtype) if is_ids(a, y) else y.sum(-1)
    if mask is None:
        weights = weights / max(1, weights.size)
    else:
        weights = jnp.where(mask, weights, 0) / jnp.maximum(1, mask.sum())
    return jnp.sqrt(weights)[..., None].astype(a.dtype)


def _softmax_root(a: Array, y: Tree, e: Array) -> Array:
    p = jax.nn.softmax(a, axis=-1)
    se = jnp.sqrt(p) * e
    return _root_of_position_weights(a, y) * (se - p * se.sum(-1, keepdims=True))


def _softmax_sample(key: Array, a: Array, y: Tree) -> Array:
    drawn = jax.nn.one_hot(jax.random.categorical(key, a), a.shape[-1], dtype=a.dtype)
    return _root_of_position_weights(a, y) * (jax.nn.softmax(a, axis=-1) - drawn)


softmax_cross_entropy = loss(
    _softmax_value,
    _softmax_delta,
    name="softmax_cross_entropy",
    check=ids_or_probabilities,
    root=_softmax_root,
    sample=_softmax_sample,
    equations=(
        "p = softmax(a)\nC = mean over positions of −Σ_k y_k log p_k",
        "∂C/∂a = (p Σ_k y_k − y) / positions      (BP1: δ^L)\n"
        "∇²C = (diag(p) − p pᵀ) Σ_k y_k / positions",
    ),
    doc="""Cross-entropy of softmax(a) with the target.

    a are logits ``(*positions, classes)``; y is the class ids ``(*positions)``, for which
    Σ_k y_k = 1, or probabilities of a's shape. Where only some positions count, it is a tree of
    ``y`` and either ``length``, an integer: the first so many of the first axis do; or ``mask``,
    bools ``(*positions)``. The mean is over an example's valid positions, and 0 where it has none;
    y may be anything elsewhere. (Bridle 1990.)""",
)


def perplexity(a: Array, y: Tree) -> Array:
    """exp of the mean, over all valid positions of a batch, of −log p of the target.

    Args:
      a: logits, ``(n, *positions, classes)``.
      y: targets as ``softmax_cross_entropy`` takes them, the examples first.

    Returns:
      A scalar: 1 for a perfect prediction, the number of classes for a uniform one.

    Raises:
      ModelError: where the targets do not fit.

    Example:
      >>> float(bp.losses.perplexity(jnp.zeros((2, 4)), jnp.array([0, 3])))
      4.0
    """
    with place("perplexity:"):
        softmax_cross_entropy.check(a, y)
    costs = jax.vmap(_softmax_value)(a, y)
    _, mask = jax.vmap(target_and_mask)(a, y)
    if mask is None:
        return jnp.exp(costs.mean())
    counts = mask.sum(range(1, mask.ndim))
    return jnp.exp(counts @ costs / jnp.maximum(1, counts.sum()))


def _sigmoid_value(a: Array, y: Array) -> Array:
    a = a.astype(accumulator(a))
    y = y.astype(a.dtype)
    either = jnp.log1p(jnp.exp(-jnp.abs(a)))  # log(1 + e^a) = max(a, 0) + this, also of −a
    if_1, if_0 = jnp.maximum(-a, 0) + either, jnp.maximum(a, 0) + either
    return jnp.sum(_product(y, if_1) + _product(1 - y, if_0))


sigmoid_cross_entropy = loss(
    _sigmoid_value,
    lambda a, y: (jax.lax.logistic(a) - y).astype(a.dtype),
    name="sigmoid_cross_entropy",
    check=same_shape,
    root=lambda a, y, e: e * jnp.exp(0.5 * (jax.nn.log_sigmoid(a) + jax.nn.log_sigmoid(-a))),
    sample=lambda key, a, y: (
        jax.lax.logistic(a) - jax.random.bernoulli(key, jax.lax.logistic(a)).astype(a.dtype)
    ),
    equations=(
        "p = sigmoid(a)\nC = −Σ_k [y_k log p_k + (1 − y_k) log(1 − p_k)]",
        "∂C/∂a = p − y      (BP1: δ^L),  ∇²C = diag(p (1 − p))",
    ),
    doc="""Cross-entropy of sigmoid(a) with the target, summed over outputs.

    a are logits; y has their shape and lies between 0 and 1.""",
)


def _kl_value(a: Array, y: Array) -> Array:
    entropy = -jax.scipy.special.xlogy(y, y).sum(-1, dtype=accumulator(a)).mean()
    return _softmax_value(a, y) - entropy


kl_divergence = loss(
    _kl_value,
    _softmax_delta,
    name="kl_divergence",
    check=probabilities,
    root=_softmax_root,
    sample=_softmax_sample,
    equations=(
        "p = softmax(a)\nC = mean over positions of Σ_k y_k log(y_k / p_k)",
        "∂C/∂a = (p Σ_k y_k − y) / positions",
    ),
    doc="""The Kullback–Leibler divergence KL(y ‖ softmax(a)).

    Its δ is the cross-entropy's: the entropy of y does not depend on a. a are logits
    ``(*positions, classes)``, y probabilities of their shape. (Kullback & Leibler 1951.)""",
)


@explained(
    forward="""
        q = (1 − α) one_hot(y) + α / K,  p = softmax(a)
        C = mean over positions of −Σ_k q_k log p_k""",
    backward="∂C/∂a = (p Σ_k q_k − q) / positions",
    x="a",
    y="C",
)
def smoothed_softmax_cross_entropy(smoothing: float) -> Loss:
    """Softmax cross-entropy with smoothed labels, from logits and class ids.

    a are logits ``(*positions, K)``, y the class ids ``(*positions)`` or probabilities. (Szegedy
    et al. 2016, "Rethinking the Inception architecture", section 7.)

    Args:
      smoothing: α, from 0 to 1.

    Example:
      >>> loss = bp.losses.smoothed_softmax_cross_entropy(0.1)
      >>> loss.delta(jnp.zeros(2), jnp.array(0)).round(2).tolist()
      [-0.44999998807907104, 0.44999998807907104]
    """
    number("smoothed_softmax_cross_entropy: smoothing", smoothing, least=0, most=1)

    def smoothed(a: Array, y: Tree) -> Tree:
        if isinstance(y, dict):
            return {**y, "y": smoothed(a, y["y"])}
        q = jax.nn.one_hot(y, a.shape[-1], dtype=accumulator(a)) if is_ids(a, y) else y
        return (1 - smoothing) * q + smoothing / a.shape[-1]

    return loss(
        lambda a, y: _softmax_value(a, smoothed(a, y)),
        lambda a, y, weight=1.0: _softmax_delta(a, smoothed(a, y), weight),
        name=f"smoothed_softmax_cross_entropy({smoothing})",
        check=ids_or_probabilities,
    )
