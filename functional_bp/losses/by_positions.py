"""A loss over a vocabulary, and all that a step needs of it, in one sweep over the positions.

    z = W h,  λ = log Σ_k e^{z_k},  u = s e^{z − λ} − r − q one_hot(y)
    ∂C/∂h = Wᵀ u,  ∂C/∂W = Σ u hᵀ

All logits of some positions are there at a time, so each is made once: three products with W, where
a sweep over the vocabulary, which has λ at its end alone, takes four.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..factors.factored import accumulator, block_of, einsum
from ..factors.softmax_outer import over_blocks

LEAST = 256  # positions in a block, so that ∂C/∂W is not gone over too often
NUMBERS = 2**21  # logits in a block, where so many positions do not have more
MOST = 2**24  # logits in a block at all
ROWS = 1024  # of ∂C/∂W that one product adds to

Tree = Any


def fits(examples: int, vocabulary: int) -> bool:
    """Whether the logits of enough positions, one of each example at least, are few enough."""
    return max(LEAST, examples) * vocabulary <= MOST


def swept(
    weight: Array, h: Array, ids: Array, weights: Array, smoothing: float, z_loss: float
) -> tuple[Array, Array, Array]:
    """C_t ``(n, t)`` of each position, and ∂/∂h ``(n, t, d)`` and ∂/∂W of Σ w_t C_t.

    ``ids`` and ``weights`` are ``(n, t)``. A block has some positions of all examples: a batch that
    is split among devices stays where it is.
    """
    weight = jnp.asarray(weight)
    dtype, words, (n, t) = accumulator(h), len(weight), ids.shape
    mean = weight.mean(0, dtype=dtype)

    def step(found: Tree, first: Array | int, count: int) -> Tree:
        costs, dh, dW = found

        def some(a: Array) -> Array:  # on one axis: XLA makes e and u where z was if shapes agree
            return block_of(a, first, count, 1).reshape(n * count, *a.shape[2:])

        def put(a: Array, of_some: Array) -> Array:
            part = of_some.reshape(n, count, *a.shape[2:]).astype(a.dtype)
            return lax.dynamic_update_slice_in_dim(a, part, first, 1)

        a, y, w = some(h), some(ids), some(weights)
        target = weight.at[y].get(mode="fill", wrap_negative_indices=False)
        z = einsum("td,kd->tk", a, weight)
        highest = z.max(-1, keepdims=True)
        e = jnp.exp(z - highest)
        total = e.sum(-1, keepdims=True)
        log_sum = (highest + jnp.log(total))[:, 0]
        c = log_sum - (1 - smoothing) * einsum("td,td->t", a, target) + z_loss * log_sum**2
        u = e * ((w * (1 + 2 * z_loss * log_sum))[:, None] / total)
        if smoothing:
            c -= smoothing * einsum("td,d->t", a, mean)
            u -= (smoothing / words * w)[:, None]
        u = u.astype(h.dtype)  # but for q, which needs no other array of logits
        da = einsum("tk,kd->td", u, weight) - ((1 - smoothing) * w)[:, None] * target

        def add(dW: Array, k: Array | int, rows: int) -> Array:
            more = einsum("tk,td->kd", block_of(u, k, rows, 1), a)
            return lax.dynamic_update_slice_in_dim(dW, block_of(dW, k, rows, 0) + more, k, 0)

        return put(costs, c), put(dh, da), over_blocks(add, dW, words, ROWS)

    nothing = jnp.zeros((n, t), dtype), jnp.zeros_like(h), jnp.zeros(weight.shape, dtype)
    costs, dh, dW = over_blocks(step, nothing, t, max(-(-LEAST // n), NUMBERS // (n * words)))
    of_targets = (((1 - smoothing) * weights)[..., None] * h).astype(dtype)
    return costs, dh, dW.at[ids].add(-of_targets, mode="drop", wrap_negative_indices=False)
