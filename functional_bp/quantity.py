"""What every quantity shares: a formula over one batch becomes a function that a user calls.

A quantity is a *formula*: what it takes from one δ recursion over a batch. Here that becomes a
function of ``(params, x, y, …)`` that checks what it is given, goes over the batch whole or a few
examples at a time, runs wherever the arrays lie, and gives gradients in their parameters' dtypes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, random_key, whole
from .freezing import trainable
from .layer import Layer
from .meshes import WHOLE, by_examples, like_arrays, on_mesh
from .recursion import check_batch, checked_weights, mean_weights

Tree = Any
T = TypeVar("T", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class OfBatch(Protocol[T]):
    """A function of a batch, whose examples may have weights."""

    def __call__(
        self,
        params: Tree,
        x: Tree,
        y: Tree,
        *,
        weights: Array | None = None,
        key: Array | None = None,
    ) -> T:
        """The quantity.

        Args:
          params: the model's parameters; ``(model's, loss's)`` for a loss that has parameters.
          x, y: inputs and targets, the examples on the first axis of every array.
          weights: wₙ, ``(batch,)``, finite and from 0; 1 if not given.
          key: for the noise of layers such as dropout; without it there is none.

        Raises:
          ModelError: for what does not fit the model.
        """
        ...


class OfExamples(Protocol[T]):
    """A function of a batch, for each of its examples by itself."""

    def __call__(self, params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> T:
        """The quantity.

        Args:
          params: the model's parameters; ``(model's, loss's)`` for a loss that has parameters.
          x, y: inputs and targets, the examples on the first axis of every array.
          key: for the noise of layers such as dropout; without it there is none.

        Raises:
          ModelError: for what does not fit the model.
        """
        ...


class AlongVector(Protocol[T]):
    """A function of a batch and of a vector in the space of the parameters."""

    def __call__(
        self,
        params: Tree,
        x: Tree,
        y: Tree,
        v: Tree,
        *,
        weights: Array | None = None,
        key: Array | None = None,
    ) -> T:
        """The quantity.

        Args:
          params, x, y, weights, key: as for a gradient of the same batch.
          v: a tree of the shapes of ``params``. At parameters that are state it is not read, and
            may be None.

        Raises:
          ModelError: for what does not fit the model.
        """
        ...


@dataclass(frozen=True)
class Recursion:
    """One pass forward over a batch, ready to run δ back.

    Attributes:
      costs: Cₙ, ``(batch,)``.
      weights: wₙ, in the dtype of the costs.
    """

    cost: Layer
    params: Tree
    residuals: Tree
    costs: Array
    weights: Array

    @property
    def ones(self) -> Array:
        """The weights of examples by themselves."""
        return jnp.ones_like(self.costs)

    def backward(self, weights: Array, contract: Tree) -> Tree:
        """What ``contract`` makes of the factors of Σₙ wₙ Cₙ."""
        return self.cost.backward(self.params, self.residuals, weights, contract)[1]

    def with_costs(self, weights: Array, contract: Tree) -> tuple[Array, Tree]:
        """The costs with what ``backward`` gives: those of its own sweep from a loss that makes
        them again there, so that the compiler drops the sweep before where nothing else needs it.
        """
        costs, results = self.cost.backward(self.params, self.residuals, weights, contract)
        return self.costs if costs is None else costs, results

    def renewed(self) -> Tree:
        """The parameters with their state as it is after this batch."""
        return self.cost.renew(self.params, self.residuals)


@dataclass(frozen=True)
class Batch:
    """A batch that a formula is asked of; ``given`` is what else it was told to need."""

    params: Tree
    x: Tree
    y: Tree
    weights: Array
    key: Array | None
    given: Tree

    def recursion(self, cost: Layer) -> Recursion:
        """Runs a model with its loss forward."""
        costs, residuals = cost.forward(self.params, (self.x, self.y), self.key)
        return Recursion(cost, self.params, residuals, costs, self.weights.astype(costs.dtype))


class Results(NamedTuple):
    """What a formula gives. Over microbatches gradients and sums add, and rows join.

    Attributes:
      gradients: a tree of the trained parameters, each with one array or a tree of its shape.
      sums: what else is a sum over examples, linear in the weights.
      rows: what has a row for each example.
      renewed: the parameters with renewed state.
    """

    gradients: Tree = ()
    sums: Tree = ()
    rows: Tree = ()
    renewed: Tree = ()


Formula = Callable[[Batch], Results]
Run = Callable[..., Results]


def in_batches(
    cost: Layer,
    formula: Formula,
    microbatch: int | None,
    *,
    mean: bool = False,
    trained: Callable[[Tree], Tree] | None = None,
) -> Run:
    """A formula over a whole batch, ``microbatch`` examples at a time.

    Args:
      cost: a model with its loss.
      formula: of what its ``Batch`` holds alone: it closes over no array.
      microbatch: examples at a time; None for all at once.
      mean: the formula's weights are wₙ / Σ w, else wₙ.
      trained: ``params -> `` those of which there are gradients; all but the state if not given.

    Returns:
      ``run(params, x, y, weights=None, key=None, given=()) -> Results``. Each microbatch gets a key
      of its own.

    Raises:
      ModelError: if ``microbatch`` is not a whole number above 0; if a layer mixes examples, which
        would then see those of a microbatch only.
    """
    if microbatch is not None:
        whole("microbatch", microbatch)
        if cost.mixes_examples:
            raise ModelError(
                f"{cost.name}: mixes the examples of a batch, so microbatches change what it "
                "computes; use a layer that does not, such as layer_norm or group_norm"
            )
    weighting = mean_weights if mean else checked_weights

    def run(
        params: Tree,
        x: Tree,
        y: Tree,
        weights: Array | None = None,
        key: Array | None = None,
        given: Tree = (),
    ) -> Results:
        n, weights = check_batch(x, y), weighting(x, y, weights)
        random_key("key", key)
        part = formula if microbatch is None or microbatch >= n else _split(formula, n, microbatch)

        def split(given: Results) -> tuple[Tree, ...]:
            """How the results are split among devices."""
            gradients = like_arrays((trained or functools.partial(learned, cost))(params))
            split = (gradients, WHOLE, by_examples(x), like_arrays(params))
            return tuple(() if of == () else how for of, how in zip(given, split))

        def of_arrays(*arrays: Tree) -> tuple[Tree, ...]:
            return tuple(part(Batch(*arrays)))

        arrays = (params, x, y, weights, key, given)
        return Results(*on_mesh(of_arrays, *arrays, results=split))

    return run


def documented(kind: type) -> Callable[[F], F]:
    """A function that a user calls, with the docstring of what it is."""

    def documented(function: F) -> F:
        function.__doc__ = inspect.getdoc(kind.__call__)
        return function

    return documented


def learned(cost: Layer, params: Tree) -> Tree:
    """The parameters with None at those that are state."""
    return trainable(params, cost.is_state(params))


def like(params: Tree, results: Tree) -> Tree:
    """Gradients in their parameters' dtypes."""
    return jax.tree.map(lambda p, g: g.astype(p.dtype), params, results)


def of_batch(
    cost: Layer,
    formula: Formula,
    microbatch: int | None,
    *,
    mean: bool = True,
    then: Callable[[Results], Tree] = lambda results: results.gradients,
    gradients: bool = True,
) -> OfBatch[Any]:
    """A quantity of a batch whose examples may have weights.

    Args:
      cost, formula, microbatch, mean: as for ``in_batches``.
      then: what is made of the results.
      gradients: that is a tree of the parameters, and takes their dtypes.
    """
    run = in_batches(cost, formula, microbatch, mean=mean)

    @documented(OfBatch)
    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Any:
        found = then(run(params, x, y, weights, key))
        return like(learned(cost, params), found) if gradients else found

    return fn


def of_examples(cost: Layer, formula: Formula, microbatch: int | None) -> OfExamples[Any]:
    """A quantity with a row for each example."""
    run = in_batches(cost, formula, microbatch)

    @documented(OfExamples)
    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Any:
        return run(params, x, y, None, key).rows

    return fn


def along_vector(product: Callable[..., Any]) -> AlongVector[Any]:
    """``product(params, x, y, v, weights, key)`` as a user calls it."""

    @documented(AlongVector)
    def fn(
        params: Tree,
        x: Tree,
        y: Tree,
        v: Tree,
        *,
        weights: Array | None = None,
        key: Array | None = None,
    ) -> Any:
        return product(params, x, y, v, weights, key)

    return fn


def _split(formula: Formula, n: int, size: int) -> Formula:
    """``formula`` of n examples, ``size`` at a time.

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

    def parts(batch: Batch) -> Results:
        keys = None if batch.key is None else jax.random.split(batch.key, count)

        def step(sums: Tree, of_part: tuple[Array, Array | None]) -> tuple[Tree, Tree]:
            k, key = of_part
            x, y, weights = jax.tree.map(
                functools.partial(of, k), (batch.x, batch.y, batch.weights)
            )
            weights = jnp.where(places(k) < n, weights, 0)
            results = formula(Batch(batch.params, x, y, weights, key, batch.given))
            return jax.tree.map(jnp.add, sums, _sums(results)), results.rows

        # Closed over rather than passed, so that what is concrete is checked as such.
        shapes = jax.eval_shape(lambda: _sums(formula(batch)))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (gradients, sums), rows = lax.scan(step, zeros, (jnp.arange(count), keys))
        return Results(gradients, sums, jax.tree.map(joined, rows))

    return parts


def _sums(results: Results) -> tuple[Tree, Tree]:
    return results.gradients, results.sums
