"""Curvature: products with the Hessian and the Gauss–Newton matrix, its diagonal, its Kronecker
factors.

The Hessian of the mean cost C(a(θ)) is JᵀHJ + (curvature of a), where J = ∂a/∂θ and H = ∇²C by a.
JᵀHJ is the generalised Gauss–Newton matrix (Schraudolph 2002), for these losses also the Fisher
matrix. With H = S Sᵀ it is Σ over the columns s of S of (Jᵀs)(Jᵀs)ᵀ, and Jᵀs is the δ recursion
begun at δ^L = s: whatever contraction the factors of a gradient have, those of curvature have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, choice, whole
from .contractions import SecondOrder, second_moment, squared_norms, total
from .factors import per_example
from .gradients import grad, like, mean_weights
from .layer import Layer
from .losses import Loss
from .meshes import like_arrays
from .microbatches import in_microbatches
from .moments import check_like_params
from .recursion import check_separate, forward_pass

Tree = Any
SHARED = ("expand", "reduce")
FISHER = ("empirical", "sampled", "exact")


def hvp(model: Layer, loss: Loss, *, microbatch: int | None = None) -> Callable[..., Tree]:
    """The Hessian of the mean cost times a vector: ∇²C v, forward over the δ recursion.

    (Pearlmutter 1994, "Fast exact multiplication by the Hessian".)

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, v, *, weights=None, key=None) -> tree`` of ``params``; so is v. Through
      a recurrent layer that is truncated it is the derivative of the truncated gradient, which is
      no Hessian: it need not be symmetric.

    Raises:
      ModelError: if v has not the tree and shapes of the parameters, and when called with what
        does not fit the model.
    """
    gradient = grad(model, loss, microbatch=microbatch)

    def fn(
        params: Tree,
        x: Tree,
        y: Tree,
        v: Tree,
        *,
        weights: Array | None = None,
        key: Array | None = None,
    ) -> Tree:
        def of(params: Tree) -> Tree:
            return gradient(params, x, y, weights=weights, key=key)

        return jax.jvp(of, (params,), (_vector(params, v),))[1]

    return fn


def ggnvp(model: Layer, loss: Loss, *, microbatch: int | None = None) -> Callable[..., Tree]:
    """The generalised Gauss–Newton matrix of the mean cost times a vector.

        Σₙ wₙ Jₙᵀ Hₙ Jₙ v / Σₙ wₙ

    J v by one forward pass of tangents; then δ^L = H J v and the δ recursion.

    Args, returns and raises: as ``hvp``.
    """
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree,
        x: Tree,
        y: Tree,
        v: Tree,
        *,
        weights: Array | None = None,
        key: Array | None = None,
    ) -> Tree:
        v = _vector(params, v)

        def part(
            given: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            params, v = given
            a, backward = forward_pass(model.batched, loss, params, x, y, key)
            _, jv = jax.jvp(lambda p: model.batched.forward(p, x, key)[0], (params,), (v,))
            _, hjv = jax.jvp(lambda a: loss.deltas(a, y), (a,), (jv,))
            return backward(_scaled(weights, hjv), total), ()

        products, _ = run(
            *(part, (params, v), x, y, mean_weights(x, y, weights), key),
            sums=lambda: like_arrays(params),
        )
        return like(params, products)

    return fn


def ggn_diagonal(
    model: Layer, loss: Loss, *, samples: int | None = None, microbatch: int | None = None
) -> Callable[..., Tree]:
    """The diagonal of the generalised Gauss–Newton matrix of the mean cost.

        Σₙ wₙ Σ_s (Jₙᵀ s)² / Σₙ wₙ          over the columns s of S: as many recursions as outputs
        Σₙ wₙ mean of (Jₙᵀ δ̂)² / Σₙ wₙ      over samples of δ̂, each with E δ̂ δ̂ᵀ = S Sᵀ

    (Dangel et al. 2020, "BackPACK", DiagGGNExact and DiagGGNMC.)

    Args:
      samples: draws for the unbiased Monte Carlo estimate; None for the exact diagonal.
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params``. The estimate needs a
      key.

    Raises:
      ValueError: if ``samples`` is not a whole number above 0.
      ModelError: if a layer mixes examples, if the loss does not state what it takes, if the
        estimate gets no key, and when called with what does not fit the model.
    """
    check_separate(model, loss)
    fisher = "exact" if samples is None else "sampled"
    deltas = _deltas(loss, fisher, 1 if samples is None else samples)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            key, sample_key = _two_keys(key)
            a, backward = forward_pass(model.batched, loss, params, x, y, key)

            def squares(delta: Tree) -> Tree:
                means = backward(_scaled(jnp.sqrt(weights), delta), second_moment)
                return jax.tree.map(lambda m: m * weights.size, means)

            return deltas(a, y, sample_key, squares), ()

        diagonal, _ = run(
            *(part, params, x, y, mean_weights(x, y, weights), key),
            sums=lambda: like_arrays(params),
        )
        return like(params, diagonal)

    return fn


class Kronecker(NamedTuple):
    """The two factors of one parameter's curvature.

    Attributes:
      A: of its inputs, ``(i, i)``; of a vector, whose input is the constant 1, ``(1, 1)``.
      G: of its δ, ``(o, o)``.
    """

    A: Array
    G: Array


def kronecker_factors(
    model: Layer,
    loss: Loss,
    *,
    fisher: str = "empirical",
    samples: int = 1,
    shared: str = "expand",
    microbatch: int | None = None,
) -> Callable[..., Tree]:
    """Kronecker factors of each parameter's block of the Fisher or Gauss–Newton matrix.

        mean of gₙ gₙᵀ ≈ A ⊗ G,   gₙ = δₙ aₙᵀ  (o, i)
        A = Σₙ wₙ aₙ aₙᵀ / Σₙ wₙ,   G = Σₙ wₙ δₙ δₙᵀ / Σₙ wₙ

    Conventions: δₙ is ∂Cₙ/∂z of one example's own cost, so the 1/N of the mean stands in A and G
    alike and nowhere else. A bias is a parameter of its own, a weight of one column whose input
    is 1: A = 1. Where a weight is used at T positions (or places, if it is tied):

        expand   A = mean over n, t of a_t a_tᵀ,   G = mean over n of Σ_t δ_t δ_tᵀ
        reduce   A = mean over n of ā āᵀ, ā = mean over t of a_t,
                 G = mean over n of δ̄ δ̄ᵀ, δ̄ = Σ_t δ_t

    (Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature"; Eschenhagen et al. 2023 for expand and reduce.)

    Args:
      fisher: which δ: ``"empirical"``, of the targets y; ``"sampled"``, of targets drawn from the
        model's prediction; ``"exact"``, the sum over the columns of S, ∇²C = S Sᵀ (for softmax
        the expectation over all labels; KFLR of Botev et al. 2017).
      samples: draws for ``"sampled"``, averaged.
      shared: ``"expand"`` or ``"reduce"``.
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params`` with a
      ``Kronecker(A, G)`` at each parameter, the layers of a ``repeat`` on a first axis of both;
      None at a parameter whose gradient is not a sum of δ aᵀ.

    Raises:
      ValueError: for an unknown ``fisher`` or ``shared``, or ``samples`` not above 0.
      ModelError: if a layer mixes examples, if the loss does not state what it takes, if sampling
        gets no key, and when called with what does not fit the model.
    """
    check_separate(model, loss)
    choice("shared", shared, SHARED)
    deltas = _deltas(loss, fisher, samples)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            key, sample_key = _two_keys(key) if fisher == "sampled" else (key, None)
            a, backward = forward_pass(model.batched, loss, params, x, y, key)
            delta = loss.deltas(a, y)
            shapes = jax.eval_shape(lambda: backward(delta, squared_norms))

            def asked(of: str) -> Tree:
                return jax.tree.map(
                    lambda s: SecondOrder(
                        jnp.broadcast_to(weights, s.shape).astype(s.dtype), of, shared
                    ),
                    shapes,
                )

            A = backward(delta, asked("input"))
            G = deltas(a, y, sample_key, lambda delta: backward(delta, asked("output")))
            return (A, G), ()

        (A, G), _ = run(part, params, x, y, mean_weights(x, y, weights), key)
        return jax.tree.map(lambda _, a, g: None if a is None else Kronecker(a, g), params, A, G)

    return fn


def _deltas(loss: Loss, fisher: str, samples: int) -> Callable[..., Tree]:
    """``(a, y, key, result) -> Σ result(δ)`` over the δ that stand for H = Σ δ δᵀ."""
    whole("samples", samples)
    choice("fisher", fisher, FISHER)

    def empirical(a: Tree, y: Tree, key: Array | None, result: Callable[[Tree], Tree]) -> Tree:
        return result(loss.deltas(a, y))

    def sampled(a: Tree, y: Tree, key: Array | None, result: Callable[[Tree], Tree]) -> Tree:
        if key is None:
            raise ModelError("key: targets are drawn from the prediction, which takes a key")
        draw = _stated(loss, "sample")

        def one(key: Array) -> Tree:
            keys = jax.random.split(key, jax.tree.leaves(a)[0].shape[0])
            return result(jax.vmap(draw)(keys, a, y))

        sums = _sum_over(one, jax.random.split(key, samples))
        return jax.tree.map(lambda s: s / samples, sums)

    def exact(a: Array, y: Tree, key: Array | None, result: Callable[[Tree], Tree]) -> Tree:
        root = _stated(loss, "root")
        shape = a.shape[1:]

        def one(column: Array) -> Tree:
            e = (jnp.arange(math.prod(shape)) == column).astype(a.dtype).reshape(shape)
            return result(jax.vmap(root, (0, 0, None))(a, y, e))

        return _sum_over(one, jnp.arange(math.prod(shape)))

    return dict(zip(FISHER, (empirical, sampled, exact)))[fisher]


def _stated(loss: Loss, what: str) -> Callable[..., Tree]:
    stated = getattr(loss, what)
    if stated is None:
        raise ModelError(
            f"{loss.name}: does not state the {what} of its Hessian; give {what}= to "
            "bp.losses.loss, or use the empirical Fisher or bp.ggnvp"
        )
    return stated


def _sum_over(function: Callable[[Array], Tree], xs: Array) -> Tree:
    """Σ function(x), one x at a time."""
    shapes = jax.eval_shape(function, xs[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.scan(lambda s, x: (jax.tree.map(jnp.add, s, function(x)), None), zeros, xs)[0]


def _two_keys(key: Array | None) -> tuple[Array | None, Array | None]:
    """One for the layers, one for the samples."""
    if key is None:
        return None, None
    layers, samples = jax.random.split(key)
    return layers, samples


def _scaled(weights: Array, delta: Tree) -> Tree:
    return jax.tree.map(lambda d: per_example(weights, d), delta)


def _vector(params: Tree, v: Tree) -> Tree:
    check_like_params("v", params, v)
    return jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), params, v)
