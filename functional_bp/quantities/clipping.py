"""The clipped gradient of private training."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import ModelError, choice, flag, number, whole
from ..contractions import contract_factors, keep, squared_norms, total, weighted
from ..factors.factored import wide
from ..losses.definition import Loss
from ..quantity import (
    Batch,
    OfBatch,
    Recursion,
    Results,
    documented,
    in_batches,
    learned,
    like,
)
from ..recursion import Model, check_batch, separate
from .norms import Groups, examples_first, norms_of

Tree = Any


class Clipped(NamedTuple):
    """What ``clipped_grad`` saw: the mean cost and the norms before clipping.

    Attributes:
      loss: Σ wₙ Cₙ / Σ wₙ over the examples whose gradients are finite.
      norms: ‖gₙ‖ as ``per_example_grad_norms`` gives them, not finite for an example that was
        left out for it.
    """

    loss: Array
    norms: Tree


def clipped_grad(
    model: Model,
    loss: Loss | None = None,
    max_norm: float | None = None,
    *,
    normalize_by: float | None = None,
    per: Groups = "model",
    recursions: Literal[1, 2] | None = None,
    has_aux: bool = False,
    microbatch: int | None = None,
) -> OfBatch[Any]:
    """The sum of clipped per-example gradients, divided by a constant.

        g = Σₙ wₙ gₙ min(1, max_norm / ‖gₙ‖) / normalize_by

    One forward pass and two δ recursions: the first gives the norms, the second starts from
    δ^L scaled by each example's clipping weight, and nothing per example is ever formed.
    (Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.)

    With ``recursions=1`` the factors of every parameter are kept from the first recursion and
    contracted twice. That saves the second recursion, at most a sixth of the time, and holds
    every layer's δ at once: more memory than ``jax.grad`` where the model is deep. Two
    recursions hold one layer's δ at a time, so they are the default; not so for a single layer
    of ``bp.from_function`` and its like, or a cost, whose δ are held at once by either.

    Args:
      max_norm: the L2 norm to which each example's gradient is clipped, finite and above 0.
      normalize_by: the divisor, above 0; the number of rows of the batch if not given.
      per: ``"model"``: one norm over all parameters. ``"layer"`` or ``"parameter"``: each of the
        K layers or parameters (as in ``per_example_grad_norms``; those of a ``repeat`` count one
        by one) is clipped by itself to max_norm / √K, so that the whole keeps to ``max_norm``.
        (McMahan et al. 2018, "Learning differentially private recurrent language models".)
      recursions: 2 or 1; None for what is said above.
      has_aux: return ``(g, aux)``: ``aux.loss``, the mean cost Σ wₙ Cₙ / Σ wₙ over the examples
        whose gradients are finite; ``aux.norms``, ‖gₙ‖ before clipping, as
        ``per_example_grad_norms`` gives them for this ``per``.
      microbatch: examples at a time; None for all at once. One by itself needs no second recursion:
        its gradient is made as in a plain step, and scaled. Where it has some hundred positions,
        as in a transformer, its matrix products are large enough, and ``microbatch=1`` is the
        fastest way on a CPU and anywhere the leanest.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params``. Weights wₙ are 1 if
      not given; an example of weight 0 adds nothing and never changes the divisor. Adding or
      removing an example of weight w changes g by at most w · max_norm / normalize_by. This bound
      needs ``normalize_by``: without it the divisor is the number of rows, which changes then.
      An example whose gradient is not finite, or whose squared norm overflows, adds nothing. g is
      0 where no example is left, and wherever even what is left sums to no finite number.

    Raises:
      ModelError: if ``max_norm`` or ``normalize_by`` is not above 0, and for an unknown ``per``
        or ``recursions``; if a layer mixes examples, and when called with what does not fit the
        model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> clipped = bp.clipped_grad(bp.dense(1), bp.losses.squared_error, max_norm=1.0)
      >>> clipped(params, jnp.array([[0.0], [0.0]]), jnp.array([[0.5], [5.0]]))["bias"].tolist()
      [-0.75]
    """
    cost = separate(model, loss)
    choice("per", per, Groups)
    bound = number("max_norm", max_norm, above=0)
    if normalize_by is not None:
        number("normalize_by", normalize_by, above=0)
    if recursions is None:
        recursions = 1 if cost.holds_deltas else 2
    if whole("recursions", recursions) > 2:
        raise ModelError(f"recursions: takes 1 or 2, got {recursions}")
    flag("has_aux", has_aux)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        return alone(batch, r) if len(r.weights) == 1 else together(batch, r)

    def alone(batch: Batch, r: Recursion) -> Results:
        costs, gradient = r.with_costs(r.ones, total)
        norms = norms_of(_squares(r, gradient), per, costs)
        finite, weights = _of_finite(norms, r.weights)
        scales = _clipping_weights(norms, bound, weights / batch.given)
        cost_ = weights @ jnp.where(finite, costs, 0)
        sums = cost_, weights.sum()
        return Results(_scaled(scales, gradient), sums, examples_first(norms))

    def together(batch: Batch, r: Recursion) -> Results:
        kept = r.backward(r.ones, keep) if recursions == 1 else None
        squared = _asked(r, squared_norms, kept)
        norms = norms_of(squared, per, r.costs)
        finite, weights = _of_finite(norms, r.weights)
        scales = _clipping_weights(norms, bound, weights / batch.given)

        def sums(r: Recursion, kept: Tree | None = None) -> tuple[Tree, Array]:
            """Σₙ cₙ gₙ and Σₙ wₙ Cₙ."""
            if kept is None and per == "model":
                gradients = r.backward(scales, total)
            else:
                gradients = _asked(r, _of_groups(scales, squared), kept)
            return gradients, weights @ jnp.where(finite, r.costs, 0)

        def again(x: Tree, y: Tree) -> tuple[Tree, Array]:
            return sums(dataclasses.replace(batch, x=x, y=y).recursion(cost))

        gradients, cost_ = _all_finite_sums(again, batch, sums(r, kept), finite)
        return Results(gradients, (cost_, weights.sum()), examples_first(norms))

    run = in_batches(cost, formula, microbatch)

    @documented(OfBatch)
    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Any:
        divisor = check_batch(x, y) if normalize_by is None else normalize_by
        gradients, (cost_, count), norms, _ = run(params, x, y, weights, key, divisor)
        gradient = like(learned(cost, params), gradients)
        mean = cost_ / jnp.maximum(count, 1e-30)
        return (gradient, Clipped(mean, norms)) if has_aux else gradient

    return fn


def _asked(r: Recursion, contract: Tree, kept: Tree | None) -> Tree:
    """What a contraction makes of factors that were kept, or else of one more recursion."""
    return r.backward(r.ones, contract) if kept is None else contract_factors(contract, kept)


def _squares(r: Recursion, gradient: Tree) -> Tree:
    """‖g‖² of one example's gradient, ``(*layers of a stack, 1)``."""
    squared = jax.eval_shape(lambda: r.backward(r.ones, squared_norms))
    return jax.tree.map(
        lambda s, g: (wide(g) ** 2).sum(range(s.ndim - 1, g.ndim))[..., None], squared, gradient
    )


def _scaled(scales: Tree, gradient: Tree) -> Tree:
    """One example's gradient times the weights of the groups; nothing where a weight is 0."""

    def scaled(w: Array, g: Array) -> Array:
        w = w.reshape(*w.shape[:-1], *(1,) * (g.ndim - w.ndim + 1))
        return jnp.where(w == 0, 0, w.astype(g.dtype) * g)

    return jax.tree.map(
        lambda w, below: jax.tree.map(lambda g: scaled(w, g), below), scales, gradient
    )


def _all_finite_sums(
    again: Callable[[Tree, Tree], Tree], batch: Batch, sums: Tree, finite: Array
) -> Tree:
    """The sums, over the finite examples alone.

    0 · NaN is NaN in Σₙ δₙ aₙᵀ, so a weight of 0 does not remove what is not finite: where there is
    such an example, they are made once more with a finite one in its place (not zeros, at which a
    model may be undefined). As a loop of no or one turn this keeps nothing alive for the case that
    almost never is.
    """

    def without(state: tuple[Tree, Array]) -> tuple[Tree, Array]:
        x, y = jax.tree.map(functools.partial(_replaced, finite), (batch.x, batch.y))
        found = again(x, y)
        return jax.tree.map(functools.partial(_finite_sum, finite), found), jnp.array(True)

    return lax.while_loop(lambda state: ~state[1], without, (sums, finite.all()))[0]


def _clipping_weights(norms: Tree, max_norm: float, weights: Array) -> Tree:
    """wₙ min(1, c / ‖gₙ‖) for each group, c = max_norm / √K."""
    groups = sum(math.prod(norm.shape[:-1]) for norm in jax.tree.leaves(norms))
    bound = max_norm / math.sqrt(groups)

    # c / max(c, ‖gₙ‖) is exact at ‖gₙ‖ = 0; where a norm is not finite the weight is 0 already.
    def of_group(norm: Array) -> Array:
        w = jnp.broadcast_to(weights, norm.shape)
        return jnp.where(w == 0, 0, w * bound / jnp.maximum(bound, norm))

    return jax.tree.map(of_group, norms)


def _replaced(finite: Array, leaf: Array) -> Array:
    """Example n of ``leaf`` where it is finite, elsewhere the first that is."""
    leaf = jnp.asarray(leaf)
    places = jnp.arange(len(finite))
    first = places == jnp.where(finite, places, len(finite)).min()
    mask, first = (m.reshape(-1, *(1,) * (leaf.ndim - 1)) for m in (finite, first))
    # A sum of one example and zeros, not a look-up, which would gather a batch that is split among
    # devices.
    stand_in = jnp.where(first, leaf, jnp.zeros((), leaf.dtype))
    stand_in = stand_in.any(0) if leaf.dtype == bool else stand_in.sum(0, dtype=leaf.dtype)
    return jnp.where(mask, leaf, stand_in)


def _finite_sum(finite: Array, sums: Array) -> Array:
    """The sums over the finite examples; 0 if there is none, and where one is not finite even so.
    (Number by number: a check of all together would hold all until it is done.)"""
    return jnp.where(finite.any() & jnp.isfinite(sums), sums, 0)


def _of_groups(scales: Tree, squared: Tree) -> Tree:
    """A weighted total for each parameter, from the weights of the groups."""
    return jax.tree.map(
        lambda w, below: jax.tree.map(lambda s: weighted(jnp.broadcast_to(w, s.shape)), below),
        scales,
        squared,
    )


def _of_finite(norms: Tree, weights: Array) -> tuple[Array, Array]:
    """Which examples have finite norms alone, ``(batch,)``, and the weights with 0 at others."""
    each = [jnp.isfinite(n).all(range(n.ndim - 1)) for n in jax.tree.leaves(norms)]
    finite = jnp.stack(each).all(0)
    return finite, jnp.where(finite, weights, 0)
