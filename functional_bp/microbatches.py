"""Microbatches: a batch a few examples at a time, so that memory does not grow with it.

Whatever a δ recursion gives for a batch is either a sum over its examples or has a row for each.
Sums of microbatches add, rows join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, random_key, whole
from .layer import Layer
from .meshes import WHOLE, by_examples, on_mesh
from .recursion import check_batch, checked_weights

Tree = Any
Part = Callable[[Tree, Tree, Tree, Array, Array | None], tuple[Tree, Tree]]
Run = Callable[..., tuple[Tree, Tree]]


def in_microbatches(model: Layer, size: int | None) -> Run:
    """How to run part of a batch's computation over all of it, ``size`` examples at a time.

    Args:
      size: examples in a microbatch; None for the whole batch at once.

    Returns:
      ``run(part, given, x, y, weights, key, sums=…) -> (sums, rows)`` for a
      ``part(given, x, y, weights, key) -> (sums, rows)``, whose sums are linear in the weights,
      (m,) for its m examples, and whose rows have the examples first. What is not of an example,
      such as the parameters, is in ``given``. Weights are 1 if not given; each microbatch gets a
      key of its own. ``sums`` gives how the sums are split among devices, whole on each if it is
      not given; rows are split as x is.

    Raises:
      ValueError: if ``size`` is not a whole number above 0.
      ModelError: if a layer mixes examples, which would then see those of a microbatch only.
    """
    if size is not None:
        whole("microbatch", size)
        if model.mixes_examples:
            raise ModelError(
                f"{model.name}: mixes the examples of a batch, so microbatches change what it "
                "computes; use a layer that does not, such as layer_norm or group_norm"
            )

    def run(
        part: Part,
        given: Tree,
        x: Tree,
        y: Tree,
        weights: Array | None,
        key: Array | None,
        sums: Callable[[], Tree] = lambda: WHOLE,
    ) -> tuple[Tree, Tree]:
        n, weights = check_batch(x, y), checked_weights(x, y, weights)
        random_key("key", key)
        part_by_part = part if size is None or size >= n else _split(part, n, size)
        return on_mesh(
            part_by_part, given, x, y, weights, key, results=lambda: (sums(), by_examples(x))
        )

    return run


def _split(part: Part, n: int, size: int) -> Part:
    """``part`` of n examples, ``size`` at a time.

    Microbatch k of K has the examples k, k + K, k + 2 K, …. A batch that is split among devices
    gives as many from each device, and nothing is moved. Where K · size is more than n, the last
    example stands in for those that are missing, with weight 0.
    """
    count = -(-n // size)

    def places(k: Array) -> Array:
        return jnp.arange(size) * count + k

    def of(k: Array, leaf: Array) -> Array:
        if n == count * size:
            return lax.dynamic_index_in_dim(
                leaf.reshape(size, count, *leaf.shape[1:]), k, axis=1, keepdims=False
            )
        return jnp.asarray(leaf)[jnp.minimum(places(k), n - 1)]

    def joined(rows: Array) -> Array:
        """``(K, size, …)`` to ``(n, …)``."""
        return jnp.swapaxes(rows, 0, 1).reshape(count * size, *rows.shape[2:])[:n]

    def parts(
        given: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
    ) -> tuple[Tree, Tree]:
        keys = None if key is None else jax.random.split(key, count)

        def step(sums: Tree, of_part: tuple[Array, Array | None]) -> tuple[Tree, Tree]:
            k, key = of_part
            x_k, y_k, w_k = jax.tree.map(functools.partial(of, k), (x, y, weights))
            w_k = jnp.where(places(k) < n, w_k, 0)
            more, rows = part(given, x_k, y_k, w_k, key)
            return jax.tree.map(jnp.add, sums, more), rows

        # Closed over rather than passed, so that what is concrete is checked as such.
        shapes, _ = jax.eval_shape(lambda: part(given, x, y, weights, key))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, rows = lax.scan(step, zeros, (jnp.arange(count), keys))
        return sums, jax.tree.map(joined, rows)

    return parts
