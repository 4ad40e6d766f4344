"""Batches for training: where they come from, epoch by epoch, and one static size for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import weights_of, whole
from ..recursion import check_batch

Tree = Any
Batch = tuple[Tree, ...]
Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]


def minibatches(
    x: Tree, y: Tree, size: int, *, seed: int | None = None
) -> Callable[[int], Iterator[Batch]]:
    """Batches of examples that are held in memory, as ``bp.fit`` and ``bp.evaluate`` take them.

    Args:
      x, y: arrays, or trees of arrays, with the examples on their first axis.
      size: examples in a batch; the last batch of an epoch has what is left.
      seed: shuffles every epoch anew, in an order that depends on the seed and the epoch alone,
        so that a resumed run meets the batches it would have met. None keeps the order.

    Returns:
      ``epoch -> iterator`` over batches (x, y).

    Raises:
      ModelError: if ``size`` is not a whole number from 1, or ``seed`` one from 0; if x and y do
        not have as many examples.

    Example:
      >>> batches = bp.minibatches(np.arange(5), np.zeros(5), 2)
      >>> [x.tolist() for x, y in batches(0)]
      [[0, 1], [2, 3], [4]]
    """
    x, y = jax.tree.map(np.asarray, (x, y))
    n = check_batch(x, y)
    whole("size", size)
    if seed is not None:
        whole("seed", seed, 0)

    def epoch_of(epoch: int) -> Iterator[Batch]:
        order = (
            np.arange(n) if seed is None else np.random.default_rng((seed, epoch)).permutation(n)
        )
        for begin in range(0, n, size):
            rows = order[begin : begin + size]
            yield jax.tree.map(lambda leaf: leaf[rows], (x, y))  # noqa: B023  used at once

    return epoch_of


def each_epoch(batches: Batches, epochs: int | None = None) -> Callable[[int], Iterable[Batch]]:
    """``epoch -> iterable``, from whatever holds the batches.

    Raises:
      ValueError: if a one-shot iterator is asked for a second epoch; at once if ``epochs`` says so.
    """
    if callable(batches) and not isinstance(batches, Iterable):
        return batches
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches: takes an iterable or a function epoch -> iterable, got {batches!r}"
        )
    if not isinstance(batches, Iterator):
        return lambda epoch: batches

    def once(epoch: int) -> Iterable[Batch]:
        if epoch:
            raise ValueError(
                f"batches: an iterator is run through once, and epoch {epoch + 1} needs it again; "
                "give a list, or a function epoch -> iterable"
            )
        return batches

    once((epochs or 1) - 1)
    return once


def with_first(
    batches: Batches, source: Callable[[int], Iterable[Batch]]
) -> tuple[Batch | None, Callable[[int], Iterable[Batch]]]:
    """The first batch of epoch 0, None if there is none, and a source that still gives it.

    What is begun here is gone on with where it can be. A function of the epoch is asked for epoch 0
    once more where the run does not begin with it.

    Args:
      source: ``each_epoch`` of the batches.
    """
    begun = iter(source(0))
    first = next(begun, None)
    if first is None:
        return None, source
    left = [itertools.chain([first], begun)]
    alike = isinstance(batches, Iterable) and not isinstance(batches, Iterator)

    def again(epoch: int) -> Iterable[Batch]:
        return left.pop() if left and (alike or epoch == 0) else source(epoch)

    return first, again


class Padded:
    """Makes batches (x, y, weights) of one size, so that none of them is compiled for anew.

    A batch with fewer examples than the largest so far is filled up with copies of its first
    example, which count for nothing: their weight is 0. (Copies, because zeros may lie outside
    what a model can take.)
    """

    def __init__(self, *, fill: bool = True, rows: int = 0) -> None:
        self.fill = fill
        self.rows = rows
        self.usual = False  # whether the latest batch is as the full ones before it were
        self._form: Any = None
        self._ones: Any = None

    def __call__(self, batch: Batch) -> tuple[Tree, Tree, Array | np.ndarray]:
        leaves, tree = jax.tree.flatten(batch)
        form = (tree, [(type(leaf), getattr(leaf, "shape", None)) for leaf in leaves])
        self.usual = form == self._form
        if self.usual:  # and so in order: nothing of what follows is paid for at every step
            x, y = batch
            return x, y, self._ones
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(
                f"batches: takes batches (x, y) or (x, y, weights), got {_told(batch)}"
            )
        x, y = jax.tree.map(_array, tuple(batch[:2]))
        n = check_batch(x, y)
        dtype = jnp.result_type(float)
        self.rows = max(self.rows, n)
        if len(batch) == 2 and (n == self.rows or not self.fill):
            if all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves):
                self._form = form
            self._ones = jnp.ones(n, dtype)
            return x, y, self._ones
        weights = np.ones(n, dtype)
        if len(batch) == 3:
            weights = weights_of(n, np.asarray(batch[2])).astype(dtype)
        missing = self.rows - n if self.fill else 0
        if missing == 0:
            return x, y, weights
        x, y = jax.tree.map(lambda leaf: _filled(leaf, missing), (x, y))
        return x, y, np.concatenate([weights, np.zeros(missing, dtype)])


def _array(leaf: Any) -> Array | np.ndarray:
    return leaf if isinstance(leaf, (np.ndarray, jax.Array)) else np.asarray(leaf)


def _filled(leaf: Array | np.ndarray, missing: int) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.concatenate([leaf, np.repeat(leaf[:1], missing, axis=0)])


def _told(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    if hasattr(batch, "shape"):
        return f"an array of shape {tuple(batch.shape)}; is it a batch outside a list?"
    return repr(batch)
