"""How the examples' gradients spread: second moments, variance, noise.

Throughout, gₙ = ∂Cₙ/∂θ is one example's gradient, ḡ = Σₙ wₙ gₙ / Σₙ wₙ the batch's, and a weight
of w counts an example as w examples, so weights are not negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..contractions import second_moment, squared_norm, total
from ..losses.definition import Loss
from ..quantity import Batch, OfBatch, Recursion, Results, of_batch
from ..recursion import Model, separate

Tree = Any


def grad_second_moment(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> OfBatch[Tree]:
    """The mean of squared per-example gradients, Σₙ wₙ gₙ² / Σₙ wₙ, element by element.

    For a dense layer on plain vectors Σₙ (δₙ aₙᵀ)² = Σₙ δₙ² (aₙ²)ᵀ, one matrix product, and no gₙ
    is formed; over positions gₙ is formed for a few examples at a time. (Dangel et al. 2020,
    "BackPACK: packing more into backprop".)

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params``.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> moment = bp.grad_second_moment(bp.dense(1), bp.losses.squared_error)
      >>> print(moment(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))["bias"].round(2))
      [20.]
    """
    cost = separate(model, loss)

    def formula(batch: Batch) -> Results:
        return Results(_mean_square(batch.recursion(cost)))

    return of_batch(cost, formula, microbatch)


def grad_variance(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> OfBatch[Tree]:
    """The variance of per-example gradients, Σₙ wₙ (gₙ − ḡ)² / Σₙ wₙ, element by element.

    It is the mean of gₙ² less ḡ²: two δ recursions. Times N / (N − 1) it is the unbiased estimate.

    Args, returns and raises: as ``grad_second_moment``.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> variance = bp.grad_variance(bp.dense(1), bp.losses.squared_error)
      >>> print(variance(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))["bias"].round(2))
      [4.]
    """
    cost = separate(model, loss)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        means, squares = r.backward(r.weights, total), _mean_square(r)
        return Results(jax.tree.map(_Moments, means, squares))

    def variance(results: Results) -> Tree:
        return jax.tree.map(
            lambda m: jnp.maximum(m.square - m.mean * m.mean, 0),
            results.gradients,
            is_leaf=lambda node: isinstance(node, _Moments),
        )

    return of_batch(cost, formula, microbatch, then=variance)


class _Moments(NamedTuple):
    """Σₙ wₙ gₙ and Σₙ wₙ gₙ² of one parameter."""

    mean: Array
    square: Array


def _mean_square(r: Recursion) -> Tree:
    """Σₙ wₙ gₙ²: a δ scaled by √w squares to w gₙ², of which the contraction gives the mean."""
    means = r.backward(jnp.sqrt(r.weights), second_moment)
    return jax.tree.map(lambda m: m * r.costs.size, means)


def grad_noise_scale(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> OfBatch[Array]:
    """The simple gradient noise scale: the batch size at which noise and gradient are equal.

        B = tr Σ̂ / Ĝ²,   tr Σ̂ = Σₙ wₙ ‖gₙ − ḡ‖² / (N − 1),   Ĝ² = ‖ḡ‖² − tr Σ̂ / N,   N = Σₙ wₙ

    Both estimates are unbiased; Ĝ², and with it B, may come out negative where N is far below
    B. (McCandlish et al. 2018, "An empirical model of large-batch training", eq. 2.9 and A.1.)
    Norms and one gradient: no gₙ is formed.

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> B``, a scalar; NaN for fewer than 2 examples.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> noise = bp.grad_noise_scale(bp.dense(1), bp.losses.squared_error)
      >>> x = jnp.array([[1.0], [1.1], [0.9]])
      >>> float(noise(params, x, jnp.zeros((3, 1)))) < 1  # nearly equal gradients
      True
    """

    def scale(results: Results) -> Array:
        n, squares, square_of_sum = _sums(results)
        trace = (squares - square_of_sum / n) / jnp.where(n > 1, n - 1, jnp.nan)
        return trace / (square_of_sum / n**2 - trace / n)

    return _of_sums(model, loss, microbatch, scale)


def grad_diversity(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> OfBatch[Array]:
    """Gradient diversity, Σₙ wₙ ‖gₙ‖² / ‖Σₙ wₙ gₙ‖²: 1/N if all gₙ are equal, 1 if orthogonal.

    (Yin et al. 2018, "Gradient diversity: a key ingredient for scalable distributed learning".)

    Args and raises: as ``grad_noise_scale``.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> scalar``.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> diversity = bp.grad_diversity(bp.dense(1), bp.losses.squared_error)
      >>> float(diversity(params, jnp.ones((4, 1)), jnp.zeros((4, 1))))
      0.25
    """

    def diversity(results: Results) -> Array:
        _, squares, square_of_sum = _sums(results)
        return squares / square_of_sum

    return _of_sums(model, loss, microbatch, diversity)


def _of_sums(
    model: Model, loss: Loss | None, microbatch: int | None, then: Callable[[Results], Array]
) -> OfBatch[Array]:
    """A quantity of Σ wₙ, Σ wₙ ‖gₙ‖² and Σ wₙ gₙ."""
    cost = separate(model, loss)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        squares = sum(jax.tree.leaves(r.backward(r.ones, squared_norm)), jnp.zeros_like(r.costs))
        sums = r.weights.sum(), r.weights @ squares
        return Results(r.backward(r.weights, total), sums)

    return of_batch(cost, formula, microbatch, mean=False, then=then, gradients=False)


def _sums(results: Results) -> tuple[Array, Array, Array]:
    """Σ wₙ, Σ wₙ ‖gₙ‖² and ‖Σ wₙ gₙ‖²."""
    leaves = jax.tree.leaves(results.gradients)
    return *results.sums, sum(((g * g).sum() for g in leaves), jnp.zeros(()))
