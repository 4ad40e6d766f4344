"""Softmax cross-entropy over a vocabulary, with the linear layer before it, of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, is_traced, number
from ..contractions import Contraction
from ..factors.factored import accumulator
from ..losses import by_positions, vocabulary
from ..traced.named import Named
from .checks import floating, integers, shaped

Tree = Any


def linear_softmax_cross_entropy(
    h: Array,
    weight: Array,
    ids: Array,
    weights: Array | None = None,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Array:
    """The cost of each position, or their weighted sum: softmax cross-entropy of ``h @ weight.T``,
    never all there.

    Forward:

        z_t = W h_t,  λ_t = log Σ_k e^{z_tk},  p_t = e^{z_t − λ_t}
        q_t = (1 − α) one_hot(ids_t) + α / K
        C_t = λ_t − Σ_k q_tk z_tk + ζ λ_t²

    Backward:

        u_t = ∂C/∂C_t ((1 + 2 ζ λ_t) p_t − q_t)
        ∂C/∂h_t = Wᵀ u_t
        ∂C/∂W = Σ_t u_t h_tᵀ

    The logits z are made for some words at a time, twice, as in
    ``bp.losses.linear_softmax_cross_entropy``: memory does not grow with the number of positions
    times that of words. Where ``weights`` are given, C is Σ_t weights_t C_t. Its gradients are then
    made with it, each logit once, three products in place of four: say ``weights=1 / ids.size`` for
    a mean and ``weights=mask / mask.sum()`` where only some positions count. (Milakov & Gimelshein
    2018; Szegedy et al. 2016, α; Chowdhery et al. 2022, ζ.) There is a backward pass, and no
    forward mode (``jax.jvp``). A batch is better given on leading axes than by ``vmap``, under
    which W's gradients are made for each example and then added.

    Args:
      h: ``(…, t, d)``, any leading axes.
      weight: W, ``(vocabulary, d)``, such as an embedding's table.
      ids: ``(…, t)``, integers.
      weights: of the positions, ``(…, t)`` or what broadcasts to that; None for no sum. A position
        of weight 0 does not count, whatever stands there.
      smoothing: α, from 0 to 1.
      z_loss: ζ, from 0.

    Returns:
      ``(…, t)``, or with weights one number; in float32 at least.

    Raises:
      ModelError: for shapes that do not fit and ids outside the vocabulary. One that is traced
        gives NaN.

    Example:
      >>> h, weight, ids = jnp.ones((2, 5, 8)), jnp.ones((100, 8)), jnp.zeros((2, 5), int)
      >>> bp.ops.linear_softmax_cross_entropy(h, weight, ids).shape
      (2, 5)
      >>> print(bp.ops.linear_softmax_cross_entropy(h, weight, ids, 1 / ids.size).round(3))
      4.605
    """
    op = "ops.linear_softmax_cross_entropy"
    h, weight = floating(f"{op}: h", h), floating(f"{op}: weight", weight)
    ids = integers(f"{op}: ids", ids)
    for name, option in (("smoothing", smoothing), ("z_loss", z_loss)):
        if is_traced(option):
            raise ModelError(f"{op}: {name}: takes a number that is known, got a traced one")
    number(f"{op}: smoothing", smoothing, least=0, most=1)
    number(f"{op}: z_loss", z_loss, least=0)
    if h.ndim < 1:
        raise ModelError(f"{op}: h: takes (…, features), got {h.shape}")
    if weight.ndim != 2 or weight.shape[1] != h.shape[-1] or len(weight) < 2:
        raise ModelError(f"{op}: weight: takes (vocabulary, {h.shape[-1]}), got {weight.shape}")
    shaped(f"{op}: ids", ids, h.shape[:-1])
    if not is_traced(ids) and ids.size:
        given = np.asarray(ids)
        if given.min() < 0 or given.max() >= len(weight):
            raise ModelError(
                f"{op}: ids: takes 0 to {len(weight) - 1}, got {given.min()} to {given.max()}"
            )
    operands = [h.reshape(-1, h.shape[-1]), weight, ids.reshape(-1)]
    if weights is None:
        (costs,) = _rule(float(smoothing), float(z_loss), summed=False).one(*operands)
        return costs.reshape(ids.shape)
    operands.append(_broadcast(f"{op}: weights", weights, ids.shape).astype(accumulator(h)))
    (cost,) = _rule(float(smoothing), float(z_loss), summed=True).one(*operands)
    return cost


def _broadcast(what: str, weights: Any, shape: tuple[int, ...]) -> Array:
    """Of all positions, on one axis."""
    weights = floating(what, jnp.asarray(weights) if isinstance(weights, float) else weights)
    try:
        return jnp.broadcast_to(weights, shape).reshape(-1)
    except ValueError:
        raise ModelError(f"{what}: takes {shape}, got {weights.shape}") from None


@functools.cache
def _rule(smoothing: float, z_loss: float, summed: bool) -> Named:
    """Of h ``(t, d)``; options are in the name, since a program has no others."""
    options = smoothing, z_loss

    def forward(h: Array, weight: Array, ids: Array, *weights: Array) -> tuple[list[Array], Tree]:
        costs, kept = vocabulary.forward(weight, h, ids, *options)
        return [_summed(costs, *weights) if summed else costs], (kept, costs)

    def backward(
        operands: tuple[Array, ...], residuals: Tree, dy: list[Array], contract: Contraction
    ) -> list[Any]:
        (kept, costs), (d_costs,), weights = residuals, dy, operands[3:]
        d_weights = [d_costs[:, None] * costs for _ in weights]
        if summed:
            d_costs = d_costs[:, None] * weights[0]
        dh, factor = vocabulary.backward(operands[1], kept, d_costs, *options)
        left_out = jnp.isnan(kept.wanted) & (d_costs == 0)[..., None]  # with an id that is none
        return [jnp.where(left_out, 0, dh), contract(factor), None, *d_weights]

    def at_once(
        h: Array, weight: Array, ids: Array, *weights: Array
    ) -> tuple[list[Array], list[Any]] | None:
        if not summed or not by_positions.fits(len(h), len(weight)):
            return None
        costs, dh, dW = by_positions.swept(weight, h, ids, weights[0], smoothing, z_loss)
        dh = jnp.where((weights[0] == 0)[..., None], 0, dh)
        return [_summed(costs, *weights)], [dh, dW, None, costs]

    given = {"smoothing": smoothing, "z_loss": z_loss}
    said = [f"{name}={value}" for name, value in given.items() if value] + ["weights"] * summed
    name = "functional_bp.linear_softmax_cross_entropy" + f"({', '.join(said)})" * bool(said)
    ranks = (2, 2, 1, 1) if summed else (2, 2, 1)
    return Named(name, forward, backward, (1,), ranks, reads=(2,), at_once=at_once)


def _summed(costs: Array, weights: Array) -> Array:
    """Σ_t w_t C_t of each example."""
    return jnp.where(weights == 0, 0, weights * costs).sum(-1)
