"""Softmax cross-entropy over a vocabulary, with the linear layer before it, of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, is_traced, number
from ..contractions import Contraction
from ..losses import vocabulary
from ..traced.named import Named
from .checks import floating, integers, shaped

Tree = Any


def linear_softmax_cross_entropy(
    h: Array, weight: Array, ids: Array, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> Array:
    """The cost of each position: softmax cross-entropy of ``h @ weight.T``, never all there.

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
    times that of words. Where only some positions count, leave the others out by
    ``jnp.where(mask, costs, 0)``. (Milakov & Gimelshein 2018; Szegedy et al. 2016, α; Chowdhery et
    al. 2022, ζ.) There is a backward pass, and no forward mode (``jax.jvp``). A batch is better
    given on leading axes than by ``vmap``, under which W's gradients are made for each example and
    then added.

    Args:
      h: ``(…, t, d)``, any leading axes.
      weight: W, ``(vocabulary, d)``, such as an embedding's table.
      ids: ``(…, t)``, integers.
      smoothing: α, from 0 to 1.
      z_loss: ζ, from 0.

    Returns:
      ``(…, t)``, in float32 at least.

    Raises:
      ModelError: for shapes that do not fit and ids outside the vocabulary. One that is traced
        gives NaN.

    Example:
      >>> h, weight, ids = jnp.ones((2, 5, 8)), jnp.ones((100, 8)), jnp.zeros((2, 5), int)
      >>> print(bp.ops.linear_softmax_cross_entropy(h, weight, ids).mean().round(3))
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
    rule = _rule(float(smoothing), float(z_loss))
    (costs,) = rule.one(h.reshape(-1, h.shape[-1]), weight, ids.reshape(-1))
    return costs.reshape(ids.shape)


@functools.cache
def _rule(smoothing: float, z_loss: float) -> Named:
    """Of h ``(t, d)``; options are in the name, since a program has no others."""

    def forward(h: Array, weight: Array, ids: Array) -> tuple[list[Array], Tree]:
        costs, kept = vocabulary.forward(weight, h, ids, smoothing, z_loss)
        return [costs], kept

    def backward(
        operands: tuple[Array, ...], kept: Tree, dy: list[Array], contract: Contraction
    ) -> list[Any]:
        dh, factor = vocabulary.backward(operands[1], kept, dy[0], smoothing, z_loss)
        left_out = jnp.isnan(kept.wanted) & (dy[0] == 0)[..., None]  # with an id that is none
        dh = jnp.where(left_out, 0, dh)
        return [dh, contract(factor), None]

    given = {"smoothing": smoothing, "z_loss": z_loss}
    said = ", ".join(f"{name}={value}" for name, value in given.items() if value)
    name = "functional_bp.linear_softmax_cross_entropy" + (f"({said})" if said else "")
    return Named(name, forward, backward, shared=(1,), ranks=(2, 2, 1), reads=(2,))
