"""Batches for training: where they come from, epoch by epoch, and one static size for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False, repr=False)
class Minibatches:
    """``epoch -> iterator`` over batches (x, y) of arrays; its length is that of an epoch.

    Attributes:
      examples: the arrays, (x, y).
      count: how many examples they hold.
      size: examples in a batch.
      seed: of the order; None for that of the arrays.
    """

    examples: Batch
    count: int
    size: int
    seed: int | None

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __repr__(self) -> str:
        order = "in order" if self.seed is None else f"shuffled with seed {self.seed}"
        return (
            f"minibatches({self.count:,} examples, {len(self):,} × {self.size} an epoch, {order})"
        )

    def __call__(self, epoch: int) -> Iterator[Batch]:
        if self.seed is None:
            return Epoch(self.examples, np.arange(self.count), self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return Epoch(self.examples, order, self.size)


class Epoch(Iterator[Batch]):
    """The batches of an epoch, one at a time or several in the same arrays."""

    def __init__(self, examples: Batch, order: np.ndarray, size: int) -> None:
        self.examples, self.order, self.size = examples, order, size
        self.begin = 0

    def __next__(self) -> Batch:
        if self.begin >= len(self.order):
            raise StopIteration
        return self._rows(self.size)

    def several(self, most: int) -> tuple[Batch, int] | None:
        """The next whole batches, one after the other in (x, y), and how many they are; None if
        there are not two."""
        count = min(most, (len(self.order) - self.begin) // self.size)
        return (self._rows(count * self.size), count) if count > 1 else None

    def _rows(self, rows: int) -> Batch:
        order = self.order[self.begin : self.begin + rows]
        self.begin += rows
        return jax.tree.map(lambda leaf: leaf[order], self.examples)


def minibatches(x: Tree, y: Tree, size: int, *, seed: int | None = None) -> Minibatches:
    """Batches of examples that are held in memory, as ``bp.fit`` and ``bp.evaluate`` take them.

    Args:
      x, y: arrays, or trees of arrays, with the examples on their first axis.
      size: examples in a batch; the last batch of an epoch has what is left.
      seed: shuffles every epoch anew, in an order that depends on the seed and the epoch alone,
        so that a resumed run meets the batches it would have met. None keeps the order.

    Returns:
      ``epoch -> iterator`` over batches (x, y). Its length is the number of batches in an epoch.

    Raises:
      ModelError: if ``size`` is not a whole number from 1, or ``seed`` one from 0; if x and y do
        not have as many examples.

    Example:
      >>> batches = bp.minibatches(np.arange(5), np.zeros(5), 2)
      >>> len(batches), [x.tolist() for x, y in batches(0)]
      (3, [[0, 1], [2, 3], [4]])
    """
    x, y = jax.tree.map(np.asarray, (x, y))
    n = check_batch(x, y)
    whole("size", size)
    if seed is not None:
        whole("seed", seed, 0)
    return Minibatches((x, y), n, int(size), seed)


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
    if isinstance(batches, Minibatches):  # to ask it once more is seen by nobody
        return next(batches(0)), source
    begun = iter(source(0))
    first = next(begun, None)
    if first is None:
        return None, source
    left = [itertools.chain([first], begun)]
    alike = isinstance(batches, Iterable) and not isinstance(batches, Iterator)

    def again(epoch: int) -> Iterable[Batch]:
        return left.pop() if left and (alike or epoch == 0) else source(epoch)

    return first, again


@dataclass(frozen=True, eq=False)
class Form:
    """What batches have in common that can be joined; one object for all of them.

    Attributes:
      told: their tree, shapes and dtypes.
      bytes: the size of one.
    """

    told: Any
    bytes: int


class Padded:
    """Makes batches (x, y, weights) of one size, so that none of them is compiled for anew.

    A batch with fewer examples than the largest so far is filled up with copies of its first
    example, which count for nothing: their weight is 0. (Copies, because zeros may lie outside
    what a model can take.)

    Attributes:
      rows: examples of the largest batch so far.
      examples: those of the latest, with those that fill it up.
      usual: whether the latest batch is as the full ones before it were.
      weighted: whether an example of it may count for more or less than one.
      form: its form; None where an array of it lies on a device.
    """

    def __init__(self, *, fill: bool = True, rows: int = 0) -> None:
        self.fill = fill
        self.rows = rows
        self.examples = 0
        self.usual = self.weighted = False
        self.form: Form | None = None
        self._forms: dict[Any, Form] = {}
        self._full: Any = None  # what a full batch looks like,
        self._full_form: Any = None  # its form
        self._ones: Any = None  # and its weights

    def __call__(self, batch: Batch) -> tuple[Tree, Tree, Array | np.ndarray]:
        leaves, tree = jax.tree.flatten(batch)
        looks = (
            tree,
            [
                (type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
                for leaf in leaves
            ],
        )
        self.usual = looks == self._full
        if self.usual:  # and so in order: nothing of what follows is paid for at every step
            x, y = batch
            self.weighted, self.form, self.examples = False, self._full_form, len(self._ones)
            return x, y, self._ones
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(
                f"batches: takes batches (x, y) or (x, y, weights), got {_told(batch)}"
            )
        x, y = jax.tree.map(_array, tuple(batch[:2]))
        x, y, weights = self._filled_up(x, y, check_batch(x, y), batch[2:])
        self.form, self.examples = self._form_of((x, y)), len(weights)
        if not self.weighted and all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves):
            self._full, self._full_form, self._ones = looks, self.form, weights
        return x, y, weights

    def _filled_up(
        self, x: Tree, y: Tree, n: int, given: Batch
    ) -> tuple[Tree, Tree, Array | np.ndarray]:
        dtype = jnp.result_type(float)
        self.rows = max(self.rows, n)
        missing = self.rows - n if self.fill else 0
        self.weighted = bool(given) or missing > 0
        if not self.weighted:
            return x, y, jnp.ones(n, dtype)
        weights = weights_of(n, np.asarray(given[0])).astype(dtype) if given else np.ones(n, dtype)
        if missing:
            x, y = jax.tree.map(lambda leaf: _filled(leaf, missing), (x, y))
            weights = np.concatenate([weights, np.zeros(missing, dtype)])
        return x, y, weights

    def _form_of(self, xy: Tree) -> Form | None:
        leaves, tree = jax.tree.flatten(xy)
        if any(isinstance(leaf, jax.Array) for leaf in leaves):
            return None
        told = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return self._forms.setdefault(told, Form(told, sum(leaf.nbytes for leaf in leaves)))


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
