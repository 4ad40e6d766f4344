"""Inner products of the examples' gradients: with each other, and with a vector."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, described, told
from ..contractions import dot, gram, is_factor, keep
from ..layer import Layer, a_layer
from ..losses.definition import Loss, loss
from ..quantity import Batch, Results, documented, in_batches, learned
from ..recursion import Model, check_batch, separate

Tree = Any


class GramOfBatch(Protocol):
    """A function of a batch, or of two."""

    def __call__(
        self, params: Tree, x: Tree, y: Tree, *, other: Tree = None, key: Array | None = None
    ) -> Array:
        """The matrix; see ``bp.grad_gram``."""
        ...


class KernelOfInputs(Protocol):
    """A function of a batch of inputs, or of two."""

    def __call__(self, params: Tree, x: Tree, *, other: Tree = None) -> Array:
        """The kernel; see ``bp.empirical_ntk``."""
        ...


class DotsOfBatch(Protocol):
    """A function of a batch and of a vector in the space of the parameters."""

    def __call__(
        self, params: Tree, x: Tree, y: Tree, v: Tree, *, key: Array | None = None
    ) -> Array:
        """⟨gₙ, v⟩, ``(batch,)``; see ``bp.grad_dots``."""
        ...


def grad_gram(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> GramOfBatch:
    """The inner products ⟨gₙ, gₘ⟩ of all pairs of examples, of a batch or of two.

    For a dense layer ⟨δₙ aₙᵀ, δₘ aₘᵀ⟩ = (δₙ·δₘ)(aₙ·aₘ): two small Gram matrices.
    Every pair of examples meets: where a batch is split among devices, each of them is brought the
    δ and a of all examples. (No other quantity needs that.)

    Args:
      microbatch: examples at a time; None for all at once. The factors of each pair of
        microbatches are made anew: N / microbatch times the recursions.

    Returns:
      ``fn(params, x, y, *, other=None, key=None) -> (n, m)``. ``other`` is ``(params, x, y)`` of
      a second batch, under the same or other parameters of the same model, so that m counts its
      examples; without it m = n.

    Raises:
      ModelError: if a layer mixes examples, if ``other`` is not such a triple or has parameters
        of another tree, and when called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> gram = bp.grad_gram(bp.dense(1), bp.losses.squared_error)
      >>> gram(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))).tolist()
      [[8.0, 48.0], [48.0, 360.0]]
    """
    cost = separate(model, loss)

    def factors(batch: Batch) -> Tree:
        r = batch.recursion(cost)
        return r.backward(r.ones, keep)

    def of_whole(batch: Batch) -> Results:
        r = batch.recursion(cost)
        n = r.costs.size
        return Results(rows=_sum(r.backward(r.ones, gram), jnp.zeros((n, n), r.costs.dtype)))

    def columns(batch: Batch) -> Results:
        grams = jax.tree.map(lambda f, g: f.gram(g), factors(batch), batch.given, is_leaf=is_factor)
        return Results(rows=_sum(grams, 0))

    over_others = in_batches(cost, columns, microbatch)

    def rows(batch: Batch) -> Results:
        other, key = batch.given
        return Results(rows=over_others(*other, None, key, factors(batch)).rows.T)

    at_once, in_pairs = (in_batches(cost, formula, microbatch) for formula in (of_whole, rows))

    @documented(GramOfBatch)
    def fn(
        params: Tree, x: Tree, y: Tree, *, other: Tree = None, key: Array | None = None
    ) -> Array:
        if other is None and (microbatch is None or microbatch >= check_batch(x, y)):
            return at_once(params, x, y, None, key).rows
        second = (params, x, y) if other is None else _checked_other(params, other)
        return in_pairs(params, x, y, None, key, (second, key)).rows

    return fn


def _sum(results: Tree, zeros: Any) -> Any:
    """The sum over parameters."""
    return sum(jax.tree.leaves(results), zeros)


def _checked_other(params: Tree, other: Tree) -> tuple[Tree, Tree, Tree]:
    if not isinstance(other, tuple) or len(other) != 3:
        raise ModelError(f"other: takes the tuple (params, x, y) of a batch, got {told(other)}")
    check_like_params("other", params, other[0])
    return other


def empirical_ntk(model: Layer, *, microbatch: int | None = None) -> KernelOfInputs:
    """The empirical neural tangent kernel of the outputs.

        Θ[n, k, m, l] = ⟨∂a_nk/∂θ, ∂a_ml/∂θ⟩

    A Gram matrix in which every output of every example counts as an example: δ^L is one-hot.
    (Jacot et al. 2018, "Neural tangent kernel".)

    Args:
      microbatch: rows, pairs (n, k), at a time; None for all at once.

    Returns:
      ``fn(params, x, *, other=None) -> Θ`` of shape ``(n, *outputs, m, *outputs)``. ``other`` is a
      second batch of inputs; without it m = n. Nothing is random.

    Raises:
      ModelError: if a layer mixes examples, if the output is not one array, and when called with
        what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> bp.empirical_ntk(bp.dense(1))(params, jnp.array([[1.0], [3.0]]))[:, 0, :, 0].tolist()
      [[2.0, 4.0], [4.0, 10.0]]
    """
    grams = grad_gram(a_layer("model", model), _output, microbatch=microbatch)

    @documented(KernelOfInputs)
    def fn(params: Tree, x: Tree, *, other: Tree = None) -> Array:
        check_batch(x, x)
        a = jax.eval_shape(lambda: model.apply(params, x))
        if not hasattr(a, "shape"):
            raise ModelError(f"{model.name}: the kernel takes one array of outputs, got {a}")
        n, *outputs = a.shape
        size = math.prod(outputs)

        def each_output(x: Tree) -> tuple[Tree, Array]:
            m = check_batch(x, x)
            repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, size, 0), x)
            return repeated, jnp.tile(jnp.arange(size), m)

        against = None if other is None else (params, *each_output(other))
        kernel = grams(params, *each_output(x), other=against)
        return kernel.reshape(n, *outputs, -1, *outputs)

    return fn


_output = loss(
    lambda a, k: a.reshape(-1)[k],
    lambda a, k: (jnp.arange(a.size) == k).astype(a.dtype).reshape(a.shape),
    name="output",
)


def grad_dots(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> DotsOfBatch:
    """The directional derivative of each example's cost, ⟨gₙ, v⟩.

    For a dense layer ⟨δ aᵀ, V⟩ = δ · V a.

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, v, *, key=None) -> (batch,)``; v has the tree and shapes of ``params``.

    Raises:
      ModelError: if a layer mixes examples, if v has not the tree and shapes of the parameters,
        and when called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> dots = bp.grad_dots(bp.dense(1), bp.losses.squared_error)
      >>> v = {"weight": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
      >>> dots(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)), v).tolist()
      [2.0, 18.0]
    """
    cost = separate(model, loss)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        dots = r.backward(r.ones, jax.tree.map(dot, batch.given))
        return Results(rows=_sum(dots, jnp.zeros_like(r.costs)))

    run = in_batches(cost, formula, microbatch)

    @documented(DotsOfBatch)
    def fn(params: Tree, x: Tree, y: Tree, v: Tree, *, key: Array | None = None) -> Array:
        return run(params, x, y, None, key, vector(cost, params, v)).rows

    return fn


def vector(cost: Layer, params: Tree, v: Tree) -> Tree:
    """``v`` in the dtypes of the parameters, and None at their state."""
    trained = learned(cost, params)
    with contextlib.suppress(ValueError, TypeError):  # what does not fit is told below
        v = jax.tree.map(lambda state, v: None if state else v, cost.is_state(params), v)
    check_like_params("v", trained, v)
    return jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), trained, v)


def check_like_params(what: str, params: Tree, v: Tree) -> None:
    """Raises unless ``v`` has the tree and the shapes of the parameters."""
    tree: Any = jax.tree.structure(params)
    same = tree == jax.tree.structure(v) and all(
        np.shape(p) == np.shape(leaf) and not np.iscomplexobj(leaf)
        for p, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(v))
    )
    if not same:
        raise ModelError(
            f"{what}: takes the tree and shapes of the parameters, {described(params)}; got "
            f"{told(v)}"
        )
