"""Kronecker factors of the curvature along a run: their averages, and their damped inverses.

    A ← decay A + (1 − decay) Â,   G ← decay G + (1 − decay) Ĝ             (as averages from 0)
    u = (G + √λ/π I)⁻¹ g (A + π √λ I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

(Martens & Grosse 2015, sections 5 and 6.3.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..freezing import merged
from ..losses.definition import Loss
from ..quantities.curvature import Kronecker, kronecker_factors
from ..recursion import Model, check_batch, with_loss

Tree = Any
FIRST = 3  # steps in which factors and inverses are made anew, whatever the options say


class KfacState(NamedTuple):
    """Attributes: steps taken; estimates made, and their decayed sums; the damped inverses."""

    steps: Array
    estimates: Array
    factors: Tree
    inverses: Tree


class Examples(NamedTuple):
    """A batch, as a quantity takes it."""

    x: Tree
    y: Tree
    weights: Array | None
    key: Array | None

    def part(self, share: float) -> Examples:
        """A share of them, at least one. They lie evenly, so that a batch that is split among
        devices gives as many from each."""
        n = check_batch(self.x, self.y)
        count = math.ceil(share * n)
        given = (self.x, self.y, self.weights)
        x, y, weights = jax.tree.map(lambda leaf: leaf[:: n // count][:count], given)
        return Examples(x, y, weights, self.key)


class Curvature(NamedTuple):
    """``init(params) -> state`` and ``renewed(state, gradient, params, examples, damping) ->
    state``, the state after one more step, with factors and inverses made anew if they are due."""

    init: Callable[[Tree], KfacState]
    renewed: Callable[..., KfacState]


def kronecker_curvature(
    model: Model,
    loss: Loss | None,
    batch: tuple[Tree, Tree],
    *,
    decay: float,
    estimate_every: int,
    estimate_from: float,
    inverse_every: int,
    **options: Any,
) -> Curvature:
    """Its arguments are those of ``bp.kfac``, ``options`` those of ``bp.kronecker_factors``."""
    estimate = kronecker_factors(model, loss, **options)

    def init(params: Tree) -> KfacState:
        key = jax.random.key(0)
        one = jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[0], batch), batch)
        made = jax.eval_shape(with_loss(model, loss).init, key, one)
        every = merged(params, made) if jax.tree.leaves(made) else params
        shapes = jax.eval_shape(lambda p, x, y: estimate(p, x, y, key=key), every, *batch)
        shapes = _where_trained(params, shapes)

        def zeros() -> Tree:
            """In buffers of their own, so that a step may be given those of the state."""
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        steps, estimates = (jnp.zeros((), jnp.int32) for _ in range(2))
        return KfacState(steps, estimates, zeros(), zeros())

    def renewed(
        state: KfacState, gradient: Tree, params: Tree, examples: Examples, damping: Any
    ) -> KfacState:
        def estimated() -> tuple[Array, Tree]:
            x, y, weights, key = examples.part(estimate_from)
            found = _where_trained(gradient, estimate(params, x, y, weights=weights, key=key))
            factors = jax.tree.map(lambda f, n: decay * f + (1 - decay) * n, state.factors, found)
            return state.estimates + 1, factors

        before = state.estimates, state.factors
        estimates, factors = _if_due(estimate_every, state.steps, estimated, before)

        def inverted() -> Tree:
            unbiased = jax.tree.map(lambda f: f / (1 - decay**estimates), factors)
            return jax.tree.map(
                lambda f: damped_inverses(f, damping), unbiased, is_leaf=_is_kronecker
            )

        inverses = _if_due(inverse_every, state.steps, inverted, state.inverses)
        return KfacState(state.steps + 1, estimates, factors, inverses)

    return Curvature(init, renewed)


def _if_due(every: int, steps: Array, make: Callable[[], Tree], kept: Tree) -> Tree:
    """What ``make`` gives in each of the first three steps and in one of ``every``; else ``kept``.

    What is not due is not computed, unless ``vmap`` goes over ``steps``: then all of it is.
    """
    return lax.cond((steps < FIRST) | (steps % every == 0), make, lambda: kept)


def _where_trained(trained: Tree, tree: Tree) -> Tree:
    """``tree`` with None at the parameters that are not trained."""
    return jax.tree.map(
        lambda p, below: None if p is None else below, trained, tree, is_leaf=lambda p: p is None
    )


def damped_inverses(factors: Kronecker, damping: Any) -> Kronecker:
    """(A + π √λ I)⁻¹ and (G + √λ/π I)⁻¹, π² = (tr A / dim A) / (tr G / dim G).

    An all-zero factor, of a parameter that has had no gradient yet, leaves π = 1.
    """

    def mean_eigenvalue(m: Array) -> Array:
        return jnp.trace(m, axis1=-2, axis2=-1) / m.shape[-1]

    a, g = mean_eigenvalue(factors.A), mean_eigenvalue(factors.G)
    usual = (a > 0) & (g > 0)
    pi = jnp.sqrt(jnp.where(usual, a, 1) / jnp.where(usual, g, 1))
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    return Kronecker(_inverse(factors.A, pi * root), _inverse(factors.G, root / pi))


def _inverse(m: Array, damping: Array) -> Array:
    """(M + λI)⁻¹ = L⁻ᵀ L⁻¹ of a symmetric M, by Cholesky, M + λI = L Lᵀ.

    The last operation is a product, although two triangular solves are a little cheaper: those
    leave columns first, and every step, inverting or not, would then copy every inverse twice.
    """
    eye = jnp.eye(m.shape[-1], dtype=m.dtype)

    def one(m: Array, damping: Array) -> Array:
        L = jnp.linalg.cholesky(m + damping * eye)
        root = jax.scipy.linalg.solve_triangular(L, eye, lower=True)
        return root.T @ root

    return jnp.vectorize(one, signature="(i,i),()->(i,i)")(m, damping)


def _is_kronecker(node: Any) -> bool:
    return isinstance(node, Kronecker)


def preconditioned(g: Array, inverses: Kronecker | None) -> Array:
    """G⁻¹ g A⁻¹ of the damped factors, and g of a parameter that has none."""
    if inverses is None:
        return g
    A, G = inverses
    matrix = g.reshape(*G.shape[:-1], A.shape[-1])  # a kernel of more axes lies as its matrix
    return jnp.matmul(jnp.matmul(G, matrix), A).reshape(g.shape).astype(g.dtype)
