"""Time in blocks, so that what is alive fits the cache and totals are folded on the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = Any

ROWS = 512
"""Examples × steps whose products are made together: enough for a matrix product to run at its
speed, few enough for a block to stay in the cache and to be small beside what all steps save."""


@dataclass(frozen=True)
class Blocks:
    """Time in blocks, in the order in which the recursion runs: backwards where ``reverse``.

    A block is called with ``start``, the number of steps before it in that order, and ``size``.
    What blocks return is stacked, with the last one apart where it is shorter.
    """

    steps: int
    size: int
    reverse: bool

    @classmethod
    def of(cls, x: Array, checkpoint: bool | int, *, reverse: bool) -> Blocks:
        """Those of a batch of sequences, ``(n, t, …)``: √t or so many steps where no more than a
        state is kept for each block, else as many as fit the cache."""
        examples, steps = x.shape[:2]
        if checkpoint is True:
            size = math.ceil(math.sqrt(steps))
        else:
            size = checkpoint or _block_size(examples, steps)
        return cls(steps, min(steps, size), reverse)

    def read(self, sequence: Array, start: Array | int, size: int) -> Array:
        """``(n, t, …)`` to the block's ``(t, n, …)``."""
        start = self.steps - start - size if self.reverse else start
        block = lax.dynamic_slice_in_dim(sequence, start, size, axis=1)
        block = jnp.moveaxis(block, 1, 0)
        return jnp.flip(block, 0) if self.reverse else block

    def join(self, stacked: tuple[Tree, Tree]) -> Tree:
        """Every array of stacked blocks of ``(t, n, …)`` to ``(n, t, …)``."""

        def joined(blocks: Array, last: Array | None) -> Array:
            steps = blocks.reshape(-1, *blocks.shape[2:])
            steps = steps if last is None else jnp.concatenate([steps, last])
            return jnp.moveaxis(jnp.flip(steps, 0) if self.reverse else steps, 0, 1)

        blocks, last = stacked
        if last is None:
            return jax.tree.map(lambda b: joined(b, None), blocks)
        return jax.tree.map(joined, blocks, last)

    def forward(self, block: Callable[..., Any], carry: Tree) -> tuple[Tree, tuple[Tree, Tree]]:
        whole, rest = divmod(self.steps, self.size)
        carry, blocks = lax.scan(
            lambda carry, start: block(carry, start, self.size), carry, self._starts()
        )
        last = None
        if rest:
            carry, last = block(carry, whole * self.size, rest)
        return carry, (blocks, last)

    def backward(
        self, block: Callable[..., Any], carry: Tree, saved: tuple[Tree, Tree]
    ) -> tuple[Tree, Tree, tuple[Tree, Tree]]:
        """``block: (carry, start, size, saved) -> (carry, sums, stacked)``, last block first;
        ``sums`` are added over the blocks."""
        whole, rest = divmod(self.steps, self.size)
        blocks, last = saved
        if rest:
            carry, sums, last = block(carry, whole * self.size, rest, last)
        else:
            one = jax.tree.map(lambda leaf: leaf[0], blocks)
            shapes = jax.eval_shape(lambda: block(carry, 0, self.size, one)[1])
            sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def step(so_far: Tree, of_block: Tree) -> tuple[Tree, Tree]:
            carry, sums = so_far
            start, saved = of_block
            carry, more, stacked = block(carry, start, self.size, saved)
            return (carry, jax.tree.map(jnp.add, sums, more)), stacked

        of_blocks = (self._starts(), blocks)
        (carry, sums), blocks = lax.scan(step, (carry, sums), of_blocks, reverse=True)
        return carry, sums, (blocks, last)

    def _starts(self) -> Array:
        return jnp.arange(self.steps // self.size) * self.size


def _block_size(examples: int, steps: int) -> int:
    """The steps of a block: all of them if they are few, else 8 to 40 with about ``ROWS`` rows;
    if possible all blocks are of one size."""
    if examples * steps <= ROWS:
        return steps
    least = min(20, max(8, ROWS // examples))
    return next((size for size in range(least, 2 * least) if steps % size == 0), least)
