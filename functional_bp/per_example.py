"""Per-example quantities: contractions of the factors that one δ recursion gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, choice, flag, number, whole
from .contractions import (
    Weighted,
    contract_factors,
    each,
    keep,
    squared_norms,
    total,
)
from .gradients import like
from .layer import Layer
from .losses import Loss
from .meshes import WHOLE, like_arrays
from .microbatches import in_microbatches
from .recursion import check_batch, check_separate, recursion

Tree = Any
GROUPS = ("model", "layer", "parameter")


def per_example_grads(
    model: Layer, loss: Loss, *, microbatch: int | None = None
) -> Callable[..., Tree]:
    """The gradient gₙ of each example's cost Cₙ, unweighted.

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, key=None) -> tree`` of ``params``, every leaf with a leading batch
      axis.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model, loss)
    run = in_microbatches(model, microbatch)

    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Tree:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            return (), like(params, backward(jnp.ones_like(costs), each))

        return run(part, params, x, y, None, key)[1]

    return fn


def per_example_grad_norms(
    model: Layer, loss: Loss, *, per: str = "model", microbatch: int | None = None
) -> Callable[..., Tree]:
    """‖gₙ‖, the L2 norm of each example's gradient, without ever forming the gradient.

    For a dense layer ‖δ aᵀ‖² = ‖δ‖² ‖a‖² (Goodfellow 2015, "Efficient per-example gradient
    computations"); each class in ``bp.factors`` has its own.

    Args:
      per: ``"model"``, the norm over all parameters; ``"layer"``, one norm for the parameters of
        each layer (of one dict) together; ``"parameter"``, one for each parameter.
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, key=None) -> (batch,)``; per layer or parameter a tree of such
      arrays, and of ``(batch, layers)`` in a ``repeat``, whose layers have a norm each.

    Raises:
      ValueError: for an unknown ``per``.
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model, loss)
    choice("per", per, GROUPS)
    run = in_microbatches(model, microbatch)

    def fn(params: Tree, x: Tree, y: Tree, *, key: Array | None = None) -> Tree:
        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            squared = backward(jnp.ones_like(costs), squared_norms)
            return (), _batch_first(_norms(squared, per, costs))

        return run(part, params, x, y, None, key)[1]

    return fn


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
    model: Layer,
    loss: Loss,
    max_norm: float,
    *,
    normalize_by: float | None = None,
    per: str = "model",
    recursions: int = 2,
    has_aux: bool = False,
    microbatch: int | None = None,
) -> Callable[..., Tree]:
    """The sum of clipped per-example gradients, divided by a constant.

        g = Σₙ wₙ gₙ min(1, max_norm / ‖gₙ‖) / normalize_by

    One forward pass and two δ recursions: the first gives the norms, the second starts from
    δ^L scaled by each example's clipping weight, and nothing per example is ever formed.
    (Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.)

    With ``recursions=1`` the factors of every parameter are kept from the first recursion and
    contracted twice. That saves the second recursion, at most a sixth of the time, and holds
    every layer's δ at once: more memory than ``jax.grad`` where the model is deep. Two
    recursions hold one layer's δ at a time, so they are the default.

    Args:
      max_norm: the L2 norm to which each example's gradient is clipped, finite and above 0.
      normalize_by: the divisor, above 0; the number of rows of the batch if not given.
      per: ``"model"``: one norm over all parameters. ``"layer"`` or ``"parameter"``: each of the
        K layers or parameters (as in ``per_example_grad_norms``; those of a ``repeat`` count one
        by one) is clipped by itself to max_norm / √K, so that the whole keeps to ``max_norm``.
        (McMahan et al. 2018, "Learning differentially private recurrent language models".)
      recursions: 2 or 1.
      has_aux: return ``(g, Clipped(loss, norms))``.
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, weights=None, key=None) -> tree`` of ``params``. Weights wₙ are 1 if
      not given; an example of weight 0 adds nothing and never changes the divisor. Adding or
      removing an example of weight w changes g by at most w · max_norm / normalize_by, where
      ``normalize_by`` is given: the number of rows, which stands in for it, is another then.
      An example whose gradient is not finite, or whose squared norm overflows, adds nothing. g is
      0 where no example is left, and wherever even what is left sums to no finite number.

    Raises:
      ValueError: if ``max_norm`` or ``normalize_by`` is not above 0, and for an unknown ``per``
        or ``recursions``.
      ModelError: if a layer mixes examples, and when called with what does not fit the model.
    """
    check_separate(model, loss)
    choice("per", per, GROUPS)
    number("max_norm", max_norm, above=0)
    if normalize_by is not None:
        number("normalize_by", normalize_by, above=0)
    if whole("recursions", recursions) > 2:
        raise ModelError(f"recursions: takes 1 or 2, got {recursions}")
    flag("has_aux", has_aux)
    run = in_microbatches(model, microbatch)

    def fn(
        params: Tree, x: Tree, y: Tree, *, weights: Array | None = None, key: Array | None = None
    ) -> Tree:
        divisor = check_batch(x, y) if normalize_by is None else normalize_by

        def clipped(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree, Array]:
            """Σₙ cₙ gₙ and Σₙ wₙ Cₙ; the norms of each group; which examples are finite."""
            costs, backward = recursion(model.batched, loss, params, x, y, key)
            ones = jnp.ones_like(costs)
            if recursions == 1:
                factors = backward(ones, keep)
                squared = contract_factors(squared_norms, factors)
            else:
                squared = backward(ones, squared_norms)
            norms = _norms(squared, per, costs)
            finite = _all_finite(norms)
            weights = jnp.where(finite, weights.astype(costs.dtype), 0)
            scales = _clipping_weights(norms, max_norm, weights / divisor)
            if recursions == 2 and per == "model":
                sums = backward(scales, total)
            else:
                contract = _with_weights(scales, squared)
                sums = (
                    contract_factors(contract, factors)
                    if recursions == 1
                    else backward(ones, contract)
                )
            return (sums, weights @ jnp.where(finite, costs, 0)), norms, finite

        def part(
            params: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
        ) -> tuple[Tree, Tree]:
            sums, norms, finite = clipped(params, x, y, weights, key)
            counted = jnp.where(finite, weights, 0)

            # 0 · NaN is NaN in Σₙ δₙ aₙᵀ, so a weight of 0 does not remove what is not finite:
            # where there is such an example, all is done once more with a finite one in its place
            # (not zeros, at which a model may be undefined). As a loop of no or one turn this
            # keeps nothing alive for the case that almost never is.
            def without(state: tuple[Tree, Array]) -> tuple[Tree, Array]:
                x_, y_ = jax.tree.map(lambda leaf: _replaced(finite, leaf), (x, y))
                again, _, _ = clipped(params, x_, y_, counted, key)
                return jax.tree.map(functools.partial(_finite_sum, finite), again), jnp.array(True)

            sums, _ = lax.while_loop(lambda s: ~s[1], without, (sums, finite.all()))
            return (*sums, counted.sum()), _batch_first(norms)

        (sums, cost, count), norms = run(
            *(part, params, x, y, weights, key), sums=lambda: (like_arrays(params), WHOLE, WHOLE)
        )
        gradient = like(params, sums)
        return (gradient, Clipped(cost / jnp.maximum(count, 1e-30), norms)) if has_aux else gradient

    return fn


def _norms(squared: Tree, per: str, costs: Array) -> Tree:
    """Norms of each group of parameters, ``(*layers of the stack, batch)``, from their squares."""
    if per == "parameter":
        return jax.tree.map(_root, squared)

    def norm(below: Tree) -> Tree:
        leaves = jax.tree.leaves(below)
        return _root(functools.reduce(jnp.add, leaves)) if leaves else below

    if per == "layer":
        return jax.tree.map(norm, squared, is_leaf=lambda node: isinstance(node, dict))
    leaves = jax.tree.leaves(squared)
    return _root(sum((s.sum(range(s.ndim - 1)) for s in leaves), jnp.zeros_like(costs)))


def _root(squared: Array) -> Array:
    """√, with a derivative of 0 at 0: that of the norm of a gradient that stays 0."""
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


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


def _with_weights(scales: Tree, squared: Tree) -> Tree:
    """A weighted total for each parameter, from the weights of the groups."""
    return jax.tree.map(
        lambda w, below: jax.tree.map(lambda s: Weighted(jnp.broadcast_to(w, s.shape)), below),
        scales,
        squared,
    )


def _all_finite(norms: Tree) -> Array:
    """Whether all of an example's norms are finite, ``(batch,)``."""
    finite = [jnp.isfinite(n).all(range(n.ndim - 1)) for n in jax.tree.leaves(norms)]
    return jnp.stack(finite).all(0)


def _batch_first(norms: Tree) -> Tree:
    return jax.tree.map(lambda norm: jnp.moveaxis(norm, -1, 0), norms)
