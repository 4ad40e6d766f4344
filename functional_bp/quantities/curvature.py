"""Curvature: products with the Hessian and the Gauss–Newton matrix, its diagonal, its Kronecker
factors.

The Hessian of the mean cost C(a(θ)) is JᵀHJ + (curvature of a), where J = ∂a/∂θ and H = ∇²C by a.
JᵀHJ is the generalised Gauss–Newton matrix (Schraudolph 2002), for these losses also the Fisher
matrix. With H = S Sᵀ it is Σ over the columns s of S of (Jᵀs)(Jᵀs)ᵀ, and Jᵀs is the δ recursion
begun at δ^L = s: whatever contraction the factors of a gradient have, those of curvature have.

A loss with parameters has no H by the model's outputs: its ``head`` says of which outputs it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import ModelError, choice, whole
from ..contractions import Moment, second_moment, second_order, squared_norms, total
from ..factors.factored import per_example
from ..freezing import merged
from ..layer import Layer
from ..losses.definition import Loss
from ..quantity import (
    AlongVector,
    Batch,
    OfBatch,
    Results,
    along_vector,
    in_batches,
    learned,
    like,
    of_batch,
)
from ..recursion import Model, forward_pass, paired, separate, with_loss
from .gradients import grad
from .heads import with_head
from .inner_products import vector

Tree = Any
Shared = Literal["expand", "reduce"]
Fisher = Literal["empirical", "sampled", "exact"]


def hvp(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> AlongVector[Tree]:
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

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> v = {"weight": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
      >>> product = bp.hvp(bp.dense(1), bp.losses.squared_error)
      >>> product(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)), v)["weight"].tolist()
      [[5.0]]
    """
    gradient = grad(model, loss, microbatch=microbatch)
    cost = with_loss(model, loss)

    def product(
        params: Tree, x: Tree, y: Tree, v: Tree, weights: Array | None, key: Array | None
    ) -> Tree:
        def of(trained: Tree) -> Tree:
            return gradient(merged(trained, params), x, y, weights=weights, key=key)

        return jax.jvp(of, (learned(cost, params),), (vector(cost, params, v),))[1]

    return along_vector(product)


def ggnvp(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> AlongVector[Tree]:
    """The generalised Gauss–Newton matrix of the mean cost times a vector.

        Σₙ wₙ Jₙᵀ Hₙ Jₙ v / Σₙ wₙ

    J v by one forward pass of tangents; then δ^L = H J v and the δ recursion.

    Args, returns and raises: as ``hvp``.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> v = {"weight": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
      >>> product = bp.ggnvp(bp.dense(1), bp.losses.squared_error)
      >>> product(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)), v)["weight"].tolist()
      [[5.0]]
    """
    cost = separate(model, loss)
    model, loss = with_head(*paired(model, loss))

    def formula(batch: Batch) -> Results:
        params, v = batch.params, batch.given
        a, backward = forward_pass(model, loss, params, batch.x, batch.y, batch.key)

        def outputs(trained: Tree) -> Tree:
            return model.forward(merged(trained, params), batch.x, batch.key)[0]

        _, jv = jax.jvp(outputs, (learned(cost, params),), (v,))
        _, hjv = jax.jvp(lambda a: loss.deltas(a, batch.y), (a,), (jv,))
        return Results(backward(_scaled(batch.weights, hjv), total))

    run = in_batches(cost, formula, microbatch, mean=True)

    def product(
        params: Tree, x: Tree, y: Tree, v: Tree, weights: Array | None, key: Array | None
    ) -> Tree:
        results = run(params, x, y, weights, key, vector(cost, params, v))
        return like(learned(cost, params), results.gradients)

    return along_vector(product)


def ggn_diagonal(
    model: Model,
    loss: Loss | None = None,
    *,
    samples: int | None = None,
    microbatch: int | None = None,
) -> OfBatch[Tree]:
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
      ModelError: if ``samples`` is not a whole number above 0; if a layer mixes examples, if the
        loss does not state what it takes, if the estimate gets no key, and when called with what
        does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> diagonal = bp.ggn_diagonal(bp.dense(1), bp.losses.squared_error)
      >>> print(diagonal(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))["weight"].round(2))
      [[5.]]
    """
    cost = separate(model, loss)
    model, loss = with_head(*paired(model, loss))
    if samples is None:
        deltas = _deltas(loss, "exact", 1)
    else:
        deltas = _deltas(loss, "sampled", whole("samples", samples))

    def formula(batch: Batch) -> Results:
        key, sample_key = _two_keys(batch.key)
        a, backward = forward_pass(model, loss, batch.params, batch.x, batch.y, key)

        def squares(delta: Tree) -> Tree:
            means = backward(_scaled(jnp.sqrt(batch.weights), delta), second_moment)
            return jax.tree.map(lambda m: m * batch.weights.size, means)

        return Results(deltas(a, batch.y, sample_key, squares))

    return of_batch(cost, formula, microbatch)


class Kronecker(NamedTuple):
    """The two factors of one parameter's curvature.

    Attributes:
      A: of its columns, ``(i, i)``: its inputs; of a vector, whose input is the constant 1,
        ``(1, 1)``.
      G: of its rows, ``(o, o)``: its δ. A kernel that another library stores as ``(in, out)`` has
        its δ in A and its inputs in G.
    """

    A: Array
    G: Array


def kronecker_factors(
    model: Model,
    loss: Loss | None = None,
    *,
    fisher: Fisher = "empirical",
    samples: int = 1,
    shared: Shared = "expand",
    microbatch: int | None = None,
) -> OfBatch[Tree]:
    """Kronecker factors of each parameter's block of the Fisher or Gauss–Newton matrix.

        mean of vec(gₙ) vec(gₙ)ᵀ ≈ A ⊗ G,   gₙ = δₙ aₙᵀ  (o, i), its columns one below the other
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
      ModelError: for an unknown ``fisher`` or ``shared``, or ``samples`` not above 0; if a layer
        mixes examples, if the loss does not state what it takes, if sampling gets no key, and when
        called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> factors = bp.kronecker_factors(bp.dense(1), bp.losses.squared_error)
      >>> found = factors(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))["weight"]
      >>> found.A.tolist(), found.G.tolist()
      ([[5.0]], [[20.0]])
    """
    cost = separate(model, loss)
    whole("samples", samples)
    choice("fisher", fisher, Fisher)
    choice("shared", shared, Shared)
    passes = (
        _of_targets(cost) if fisher == "empirical" else _of_hessian(model, loss, fisher, samples)
    )

    def formula(batch: Batch) -> Results:
        once, over_all = passes(batch)
        shapes = jax.eval_shape(lambda: once(squared_norms))

        def asked(of: str) -> Tree:
            def of_one(shape: Any) -> Any:
                weights = jnp.broadcast_to(batch.weights, shape.shape).astype(shape.dtype)
                return second_order(weights, of, shared)

            return jax.tree.map(of_one, shapes)

        inputs, outputs = once(asked("input")), over_all(asked("output"))
        pairs = jax.tree.map(
            lambda p, *both: _kronecker(*both), learned(cost, batch.params), inputs, outputs
        )
        return Results(sums=pairs)

    return of_batch(cost, formula, microbatch, then=lambda r: r.sums, gradients=False)


Ask = Callable[[Tree], Tree]
Passes = Callable[[Batch], tuple[Ask, Ask]]
"""``contract -> results`` of one δ recursion, and Σ results over the δ of a Fisher matrix."""


def _of_targets(cost: Layer) -> Passes:
    def passes(batch: Batch) -> tuple[Ask, Ask]:
        r = batch.recursion(cost)
        once = functools.partial(r.backward, r.ones)
        return once, once

    return passes


def _of_hessian(model: Model, loss: Loss | None, fisher: Fisher, samples: int) -> Passes:
    outputs, last = with_head(*paired(model, loss))
    deltas = _deltas(last, fisher, samples)

    def passes(batch: Batch) -> tuple[Ask, Ask]:
        key, sample_key = _two_keys(batch.key) if fisher == "sampled" else (batch.key, None)
        a, backward = forward_pass(outputs, last, batch.params, batch.x, batch.y, key)
        once = functools.partial(backward, last.deltas(a, batch.y))

        def over_all(contract: Tree) -> Tree:
            return deltas(a, batch.y, sample_key, lambda delta: backward(delta, contract))

        return once, over_all

    return passes


def _kronecker(inputs: Moment | None, outputs: Moment | None) -> Kronecker | None:
    if inputs is None or outputs is None:
        return None
    rows, columns = (inputs, outputs) if inputs.of_rows else (outputs, inputs)
    return Kronecker(columns.mean, rows.mean)


def _deltas(loss: Loss, fisher: Fisher, samples: int) -> Callable[..., Tree]:
    """``(a, y, key, result) -> Σ result(δ)`` over the δ that stand for H = Σ δ δᵀ."""

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

    return sampled if fisher == "sampled" else exact


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
