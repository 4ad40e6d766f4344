"""How the examples' gradients spread: second moments, noise, and every inner product.

Throughout, gₙ = ∂Cₙ/∂θ is one example's gradient, ḡ = Σₙ wₙ gₙ / Σₙ wₙ the batch's, and a weight
of w counts an example as w examples, so weights are not negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .checks import ModelError, described, told
from .contractions import Dot, gram, keep, second_moment, squared_norm, total
from .factors import Factored
from .gradients import like, mean_weights
from .layer import Layer, a_layer
from .losses import Loss, loss
from .meshes import WHOLE, like_arrays
from .microbatches import in_microbatches
from .recursion import check_batch, check_separate, checked_weights, recursion

Tree = Any


def grad_second_moment(
    model: Layer, loss: Loss, *, microbatch: int | None = None
) -> Callable[..., Tree]:
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
    """
    moments = _moments(model, loss, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        return like(params, moments(params, x, y, weights, key)[1])

    return fn


def grad_variance(
    model: Layer, loss: Loss, *, microbatch: int | None = None
) -> Callable[..., Tree]:
    """The variance of per-example gradients, Σₙ wₙ (gₙ − ḡ)² / Σₙ wₙ, element by element.

    It is the mean of gₙ² less ḡ²: two δ recursions. Times N / (N − 1) it is the unbiased estimate.

    Args, returns and raises: as ``grad_second_moment``.
    """
    moments = _moments(model, loss, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        first, second = moments(params, x, y, weights, key)
        return like(params, jax.tree.map(lambda m, s: jnp.maximum(s - m * m, 0), first, second))

    return fn


def _moments(model: Layer, loss: Loss, microbatch: int | None) -> Callable[..., tuple[Tree, Tree]]:
    """``(params, x, y, weights, key) -> (Σ wₙ gₙ / Σ wₙ, Σ wₙ gₙ² / Σ wₙ)``."""
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, weights: Array | None, key: Array | None
    ) -> tuple[Tree, Tree]:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            weights = weights.astype(costs.dtype)
            # δ scaled by √w squares to w gₙ².
            means = backward(jnp.sqrt(weights), second_moment)
            return (backward(weights, total), jax.tree.map(lambda m: m * costs.size, means)), ()

        return run(
            *(part, params, x, y, mean_weights(x, y, weights), key),
            sums=lambda: (like_arrays(params),) * 2,
        )[0]

    return fn


def grad_noise_scale(
    model: Layer, loss: Loss, *, microbatch: int | None = None
) -> Callable[..., Array]:
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
    """
    sums = _sums(model, loss, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Array:
        n, squares, square_of_sum = sums(params, x, y, weights, key)
        trace = (squares - square_of_sum / n) / jnp.where(n > 1, n - 1, jnp.nan)
        return trace / (square_of_sum / n**2 - trace / n)

    return fn


def grad_diversity(
    model: Layer, loss: Loss, *, microbatch: int | None = None
) -> Callable[..., Array]:
    """Gradient diversity, Σₙ wₙ ‖gₙ‖² / ‖Σₙ wₙ gₙ‖²: 1/N if all gₙ are equal, 1 if orthogonal.

    (Yin et al. 2018, "Gradient diversity: a key ingredient for scalable distributed learning".)

    Args and raises: as ``grad_noise_scale``.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> scalar``.
    """
    sums = _sums(model, loss, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Array:
        _, squares, square_of_sum = sums(params, x, y, weights, key)
        return squares / square_of_sum

    return fn


def _sums(model: Layer, loss: Loss, microbatch: int | None) -> Callable[..., tuple[Array, ...]]:
    """``(params, x, y, weights, key) -> (Σ wₙ, Σ wₙ ‖gₙ‖², ‖Σ wₙ gₙ‖²)``."""
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, weights: Array | None, key: Array | None
    ) -> tuple[Array, ...]:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            weights = weights.astype(costs.dtype)
            squares = backward(jnp.ones_like(costs), squared_norm)
            return (weights @ _summed(squares, costs), backward(weights, total)), ()

        weights = checked_weights(x, y, weights)
        (squares, sums), _ = run(
            *(part, params, x, y, weights, key), sums=lambda: (WHOLE, like_arrays(params))
        )
        square_of_sum = sum(((g * g).sum() for g in jax.tree.leaves(sums)), jnp.zeros(()))
        return weights.sum().astype(squares.dtype), squares, square_of_sum

    return fn


def grad_gram(model: Layer, loss: Loss, *, microbatch: int | None = None) -> Callable[..., Array]:
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
    """
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def factors(params: Tree, x: Tree, y: Tree, key: Array | None) -> Tree:
        costs, backward = recursion(model.batched, loss, params, x, y, key)
        return backward(jnp.ones_like(costs), keep)

    def fn(
        params: Tree, x: Tree, y: Tree, *, other: Tree = None, key: Array | None = None
    ) -> Array:
        n = check_batch(x, y)

        def whole(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            grams = backward(jnp.ones_like(costs), gram)
            return (), sum(jax.tree.leaves(grams), jnp.zeros((n, n), costs.dtype))

        if other is None and (microbatch is None or microbatch >= n):
            return run(whole, params, x, y, None, key)[1]
        second = (params, x, y) if other is None else _checked_other(params, other)

        def rows(
            given: Tree, x: Tree, y: Tree, weights: Array, key_n: Array | None
        ) -> tuple[Tree, Tree]:
            params, (params_m, x_m, y_m), key = given
            ours = factors(params, x, y, key_n)

            def columns(
                given: Tree, x: Tree, y: Tree, weights: Array, key_m: Array | None
            ) -> tuple[Tree, Tree]:
                params_m, ours = given
                return (), _gram_of(factors(params_m, x, y, key_m), ours)

            return (), run(columns, (params_m, ours), x_m, y_m, None, key)[1].T

        return run(rows, (params, second, key), x, y, None, key)[1]

    return fn


def _gram_of(ours: Tree, theirs: Tree) -> Array:
    def is_factor(node: Any) -> bool:
        return isinstance(node, Factored)

    grams = jax.tree.map(lambda f, g: f.gram(g), ours, theirs, is_leaf=is_factor)
    return sum(jax.tree.leaves(grams))  # type: ignore[return-value]


def _checked_other(params: Tree, other: Tree) -> tuple[Tree, Tree, Tree]:
    if not isinstance(other, tuple) or len(other) != 3:
        raise ModelError(f"other: takes the tuple (params, x, y) of a batch, got {told(other)}")
    check_like_params("other", params, other[0])
    return other


def empirical_ntk(model: Layer, *, microbatch: int | None = None) -> Callable[..., Array]:
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
    """
    grams = grad_gram(a_layer("model", model), _output, microbatch=microbatch)

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


def grad_dots(model: Layer, loss: Loss, *, microbatch: int | None = None) -> Callable[..., Array]:
    """The directional derivative of each example's cost, ⟨gₙ, v⟩.

    For a dense layer ⟨δ aᵀ, V⟩ = δ · V a.

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, v, *, key=None) -> (batch,)``; v has the tree and shapes of ``params``.

    Raises:
      ModelError: if a layer mixes examples, if v has not the tree and shapes of the parameters,
        and when called with what does not fit the model.
    """
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def fn(params: Tree, x: Tree, y: Tree, v: Tree, *, key: Array | None = None) -> Array:
        check_like_params("v", params, v)
        v = jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), params, v)

        def part(
            given: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            params, contract = given[0], jax.tree.map(Dot, given[1])
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            return (), _summed(backward(jnp.ones_like(costs), contract), costs)

        return run(part, (params, v), x, y, None, key)[1]

    return fn


def _summed(results: Tree, costs: Array) -> Array:
    """The sum over parameters of a number for each example."""
    return sum(jax.tree.leaves(results), jnp.zeros_like(costs))


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
