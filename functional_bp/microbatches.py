"""Microbatches: a batch a few examples at a time, so that memory does not grow with it.

Whatever a δ recursion gives for a batch is either a sum over its examples or has a row for each.
Sums of microbatches add, rows join.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .layer import Layer, ModelError
from .recursion import check_batch, checked_weights

Tree = Any
Part = Callable[[Tree, Tree, Array, Array | None], tuple[Tree, Tree]]
Run = Callable[[Part, Tree, Tree, Array | None, Array | None], tuple[Tree, Tree]]


def in_microbatches(model: Layer, size: int | None) -> Run:
    """How to run part of a batch's computation over all of it, ``size`` examples at a time.

    Args:
      size: examples in a microbatch; None for the whole batch at once.

    Returns:
      ``run(part, x, y, weights, key) -> (sums, rows)`` for a
      ``part(x, y, weights, key) -> (sums, rows)``, whose sums are linear in the weights, (m,) for
      its m examples, and whose rows have the examples first. Weights are 1 if not given; each
      microbatch gets a key of its own.

    Raises:
      ValueError: if ``size`` is not a whole number above 0.
      ModelError: if a layer mixes examples, which would then see those of a microbatch only.
    """
    if size is None:
        return lambda part, x, y, weights, key: part(x, y, checked_weights(x, y, weights), key)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"microbatch: takes a whole number of examples above 0, got {size!r}")
    if model.mixes_examples:
        raise ModelError(
            f"{model.name}: mixes the examples of a batch, so microbatches change what it "
            "computes; use a layer that does not, such as layer_norm or group_norm"
        )

    def run(
        part: Part, x: Tree, y: Tree, weights: Array | None, key: Array | None
    ) -> tuple[Tree, Tree]:
        n, weights = check_batch(x, y), checked_weights(x, y, weights)
        if size >= n:
            return part(x, y, weights, key)
        count = -(-n // size)
        begins = jnp.arange(count) * size
        # The last microbatch of a batch that ``size`` does not divide slides back over examples
        # that were seen before, and gives these weight 0: nothing is padded, one program serves.
        starts = jnp.minimum(begins, n - size)
        fresh = starts[:, None] + jnp.arange(size) >= begins[:, None]
        keys = None if key is None else jax.random.split(key, count)

        def step(sums: Tree, inputs: tuple[Array, Array, Array | None]) -> tuple[Tree, Tree]:
            start, fresh, key = inputs
            x_part, y_part, w_part = jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), (x, y, weights)
            )
            more, rows = part(x_part, y_part, jnp.where(fresh, w_part, 0), key)
            return jax.tree.map(jnp.add, sums, more), rows

        # Closed over rather than passed, so that what is concrete is checked as such.
        shapes, _ = jax.eval_shape(lambda: part(x, y, weights, key))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, rows = lax.scan(step, zeros, (starts, fresh, keys))
        return sums, jax.tree.map(lambda leaf: _joined(leaf, n), rows)

    return run


def _joined(rows: Array, n: int) -> Array:
    """Rows ``(count, size, …)`` of microbatches as the ``(n, …)`` of the batch."""
    count, size, *shape = rows.shape
    if count * size == n:
        return rows.reshape(n, *shape)
    before = (count - 1) * size
    return jnp.concatenate([rows[:-1].reshape(before, *shape), rows[-1, before - n :]])
