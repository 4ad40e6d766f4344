"""K-FAC: natural-gradient steps with Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ..checks import ModelError, number, told, whole
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


def kfac(
    model: Model,
    loss: Loss | None,
    learning_rate: optax.ScalarOrSchedule,
    *,
    batch: tuple[Tree, Tree],
    damping: float = 1e-2,
    decay: float = 0.95,
    momentum: float = 0.0,
    max_step: float | None = 1e-2,
    estimate_every: int = 1,
    estimate_from: float = 0.25,
    inverse_every: int = 20,
    fisher: str = "sampled",
    shared: str = "expand",
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by Kronecker-factored curvature.

        A ← decay A + (1 − decay) Â,   G ← decay G + (1 − decay) Ĝ         (as averages from 0)
        u = (G + √λ/π I)⁻¹ g (A + π √λ I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)
        u ← u · min(1, √(κ / (η² ⟨u, g⟩)))
        θ ← θ − η (momentum of u)

    λ is the damping, split between the factors by π; κ, ``max_step``, bounds the squared length
    of a step in the metric of the Fisher matrix, and with it how far predictions move. (Martens
    & Grosse 2015, section 6.3; Ba et al. 2017, section 5.)

    Â and Ĝ are of the batch's own pass forward and back, as sampled targets ask for, so they are
    taken from a part of it; they change slowly, so inverses are kept for some steps (the same,
    section 8: τ₁ = 1/8, T₃ = 20). With the defaults a step costs some 2 to 2.5 steps of Adam, at
    widths up to 256 and batches of 128 on two cores; with everything at each step, 5 to 8.

    Args:
      learning_rate: η, or an optax schedule.
      batch: ``(x, y)`` of any size, or its shapes: which parameters have factors, and of what
        shapes, shows only with inputs.
      damping: λ, above 0.
      decay: of the averages of A and G, in [0, 1).
      momentum: of the steps, in [0, 1). ``max_step`` bounds u before momentum adds up steps.
      max_step: κ, above 0; None for no bound.
      estimate_every: steps from one Â, Ĝ to the next.
      estimate_from: the part of the batch that they are of, τ₁, above 0 up to 1: examples that
        lie evenly in it, at least one.
      inverse_every: steps from one inversion to the next, T₃. The first three steps estimate and
        invert whatever these options say, as in the paper's algorithm 2.
      fisher, shared, microbatch: as in ``bp.kronecker_factors``.

    Returns:
      A transformation whose ``update(gradient, state, params, *, x, y, weights=None, key=None)``
      also takes the batch that the gradient is of, and a key if ``fisher`` is ``"sampled"``. A
      parameter without factors is stepped along its gradient. Where some parameters are frozen or
      state, and so None in ``params``, ``untrained`` is a tree that has them.

    Raises:
      ModelError: for an argument out of its range, and as ``bp.kronecker_factors``.

    Example:
      >>> model, loss = bp.dense(2), bp.losses.softmax_cross_entropy
      >>> params = model.init(jax.random.key(0), jnp.ones(3))
      >>> x, y = jax.random.normal(jax.random.key(1), (64, 3)), jnp.arange(64) % 2
      >>> optimizer = bp.kfac(model, loss, 0.1, batch=(x, y))
      >>> run = bp.fit(model, loss, params, [(x, y)], optimizer, epochs=3, key=jax.random.key(2))
      >>> bool(run.history.loss[-1] < run.history.loss[0])
      True
    """
    _check_options(learning_rate, batch, damping, decay, momentum, max_step)
    number("estimate_from", estimate_from, above=0, most=1)
    whole("estimate_every", estimate_every)
    whole("inverse_every", inverse_every)
    estimate = kronecker_factors(model, loss, fisher=fisher, shared=shared, microbatch=microbatch)

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

    def update(
        gradient: Tree,
        state: KfacState,
        params: Tree = None,
        *,
        x: Tree,
        y: Tree,
        weights: Array | None = None,
        key: Array | None = None,
        untrained: Tree = None,
        **_: Any,
    ) -> tuple[Tree, KfacState]:
        every = params if untrained is None else merged(params, untrained)
        part = _part(estimate_from, x, y, weights)

        def estimated() -> tuple[Array, Tree]:
            found = _where_trained(gradient, estimate(every, *part[:2], weights=part[2], key=key))
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
        step = jax.tree.map(_preconditioned, gradient, inverses)
        if max_step is not None:
            step = _bounded(step, gradient, learning_rate, state.steps, max_step)
        return step, KfacState(state.steps + 1, estimates, factors, inverses)

    natural = optax.GradientTransformationExtraArgs(init, update)
    rest = optax.trace(momentum), optax.scale_by_learning_rate(learning_rate)
    return optax.with_extra_args_support(optax.chain(natural, *rest))


def _check_options(
    learning_rate: Any,
    batch: Any,
    damping: Any,
    decay: Any,
    momentum: Any,
    max_step: Any,
) -> None:
    if not callable(learning_rate):
        number("learning_rate", learning_rate, least=0)
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ModelError(f"batch: takes the tuple (x, y) of a batch, got {told(batch)}")
    number("damping", damping, above=0)
    number("decay", decay, least=0, below=1)
    number("momentum", momentum, least=0, below=1)
    if max_step is not None:
        number("max_step", max_step, above=0)


def _part(share: float, x: Tree, y: Tree, weights: Array | None) -> tuple[Tree, Tree, Tree]:
    """A share of a batch, at least one example. They lie evenly, so that a batch that is split
    among devices gives as many from each."""
    n = check_batch(x, y)
    count = math.ceil(share * n)
    return jax.tree.map(lambda leaf: leaf[:: n // count][:count], (x, y, weights))


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


def _bounded(step: Tree, gradient: Tree, learning_rate: Any, steps: Array, most: float) -> Tree:
    """The step, shortened where η² ⟨u, g⟩ is more than ``most``."""
    rate = learning_rate(steps) if callable(learning_rate) else learning_rate
    products = jax.tree.map(lambda u, g: jnp.vdot(u, g), step, gradient)
    length = rate**2 * sum(jax.tree.leaves(products))
    shrink = jnp.sqrt(most / jnp.maximum(most, length))
    return jax.tree.map(lambda u: (shrink * u).astype(u.dtype), step)


def damped_inverses(factors: Kronecker, damping: float) -> Kronecker:
    """(A + π √λ I)⁻¹ and (G + √λ/π I)⁻¹, π² = (tr A / dim A) / (tr G / dim G).

    An all-zero factor, of a parameter that has had no gradient yet, leaves π = 1.
    """

    def mean_eigenvalue(m: Array) -> Array:
        return jnp.trace(m, axis1=-2, axis2=-1) / m.shape[-1]

    a, g = mean_eigenvalue(factors.A), mean_eigenvalue(factors.G)
    usual = (a > 0) & (g > 0)
    pi = jnp.sqrt(jnp.where(usual, a, 1) / jnp.where(usual, g, 1))
    root = damping**0.5
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


def _preconditioned(g: Array, inverses: Kronecker | None) -> Array:
    if inverses is None:
        return g
    A, G = inverses
    matrix = g.reshape(*G.shape[:-1], A.shape[-1])  # a kernel of more axes lies as its matrix
    return jnp.matmul(jnp.matmul(G, matrix), A).reshape(g.shape).astype(g.dtype)
