"""The quadratic model of the cost, and the step that minimises it along given directions.

    M(d) = C(θ) + ⟨∇C, d⟩ + ½ dᵀ (F + λI) d

F is the Gauss–Newton matrix; of it only the products dᵢᵀ F dⱼ of the directions are asked. (Martens
& Grosse 2015, sections 6.4, 6.5 and 7.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..factors.factored import per_example
from ..freezing import merged
from ..losses.definition import Loss
from ..quantities.heads import with_head
from ..quantities.inner_products import vector
from ..quantity import Batch, Results, in_batches, learned
from ..recursion import Model, paired, separate

Tree = Any


def ggn_inner_products(
    model: Model, loss: Loss | None, microbatch: int | None = None
) -> Callable[..., Array]:
    """Products of directions in the metric of the generalised Gauss–Newton matrix of the mean cost.

        dᵢᵀ F dⱼ = Σₙ wₙ (Jₙ dᵢ)ᵀ Hₙ (Jₙ dⱼ) / Σₙ wₙ

    A forward pass of tangents for each direction and no δ recursion. (The same, appendix C.)

    Returns:
      ``fn(params, x, y, directions, weights, key) -> (k, k)`` for k trees of ``params``.
    """
    cost = separate(model, loss)
    outputs, last = with_head(*paired(model, loss))

    def formula(batch: Batch) -> Results:
        params, y = batch.params, batch.y

        def a(trained: Tree) -> Tree:
            return outputs.forward(merged(trained, params), batch.x, batch.key)[0]

        def weighted(tangent: Tree) -> Tree:
            return jax.tree.map(lambda t: per_example(batch.weights, t), tangent)

        J, HJ = [], []
        for d in batch.given:
            of_d, Jd = jax.jvp(a, (learned(cost, params),), (d,))
            J.append(Jd)
            HJ.append(weighted(jax.jvp(lambda a: last.deltas(a, y), (of_d,), (Jd,))[1]))
        return Results(sums=jnp.array([[inner(Jd, HJe) for HJe in HJ] for Jd in J]))

    run = in_batches(cost, formula, microbatch, mean=True)

    def products(
        params: Tree, x: Tree, y: Tree, directions: Sequence[Tree], weights: Any, key: Any
    ) -> Array:
        zeros = jax.tree.map(jnp.zeros_like, params)
        given = tuple(vector(cost, params, merged(d, zeros)) for d in directions)
        return run(params, x, y, weights, key, given).sums

    return products


def inner(a: Tree, b: Tree) -> Array:
    """⟨a, b⟩ over all leaves."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))


def minimised(F: Array, slopes: Array) -> tuple[Array, Array]:
    """The c that minimises ½ cᵀ F c + ⟨slopes, c⟩, and the minimum.

    F is ``(k, k)``, positive semi-definite. Where directions depend on each other, or are 0, it is
    the shortest such c, with every direction at length 1.
    """
    length = jnp.sqrt(jnp.diag(F))
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    c = -scale * (jnp.linalg.pinv(F * scale[:, None] * scale, hermitian=True) @ (scale * slopes))
    return c, 0.5 * slopes @ c


def adapted(damping: Array, ratio: Array, factor: float, least: float) -> Array:
    """λ after a step that changed the cost by ``ratio`` times what M said.

        λ ← ωλ if ρ > 3/4,   λ/ω if ρ < 1/4

    The rule of Levenberg and Marquardt. (The same, section 6.5, after Nocedal & Wright 2006.)
    """
    grown = jnp.where(ratio > 0.75, factor, jnp.where(ratio < 0.25, 1 / factor, 1.0))
    return jnp.maximum(damping * grown, least).astype(damping.dtype)
