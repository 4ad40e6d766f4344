"""What is larger than the factors, made for some columns, positions or examples at a time.

``block(start, size)`` makes the part of ``size`` from ``start`` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Block = Callable[[Array | int, int], Array]


def block_size(length: int, factors: Any, intermediate: int) -> int:
    """How many of ``length`` to take at a time, so that intermediates of ``intermediate`` numbers
    for each of them are no larger than the factors; all blocks but the last have as many."""
    most = max(1, sum(leaf.size for leaf in jax.tree.leaves(factors)) // intermediate)
    return -(-length // -(-length // most))


def block_of(tree: Any, start: Array | int, size: int, axis: int) -> Any:
    """``size`` entries of an axis of every array, from ``start`` on."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, axis), tree)


def joined_blocks(block: Block, length: int, size: int) -> Array:
    """``block(start, size)``, which has ``size`` rows, for all ``length`` rows."""
    whole, rest = divmod(length, size)
    if whole == 1 and not rest:
        return block(0, size)
    rows = lax.map(lambda i: block(i * size, size), jnp.arange(whole))
    rows = rows.reshape(-1, *rows.shape[2:])
    return jnp.concatenate([rows, block(length - rest, rest)]) if rest else rows


def summed_blocks(block: Block, length: int, size: int) -> Array:
    """Σ ``block(start, size)`` over the blocks of ``length``."""
    whole, rest = divmod(length, size)
    sums = block(0, size)
    if whole > 1:
        sums = lax.fori_loop(1, whole, lambda i, sums: sums + block(i * size, size), sums)
    return sums + block(length - rest, rest) if rest else sums
