"""K-FAC: natural-gradient steps with Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ..checks import ModelError, number, told, whole
from ..freezing import merged
from ..losses.definition import Loss
from ..quantities.curvature import Fisher, Shared
from ..quantities.gradients import value_and_grad
from ..recursion import Model
from .kronecker_curvature import (
    Curvature,
    Examples,
    KfacState,
    kronecker_curvature,
    preconditioned,
)
from .quadratic_model import adapted, ggn_inner_products, inner, minimised

Tree = Any
ADAPT_EVERY, OMEGA = 5, 19 / 20  # T₁ and ω₁^(1/T₁) of Martens & Grosse


class QuadraticState(NamedTuple):
    """Attributes: of the factors; λ; the step before."""

    curvature: KfacState
    damping: Array
    last: Tree


def kfac(
    model: Model,
    loss: Loss | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    batch: tuple[Tree, Tree],
    damping: float = 1e-2,
    decay: float = 0.95,
    momentum: float = 0.0,
    max_step: float | None = 1e-2,
    least_damping: float = 1e-3,
    estimate_every: int = 1,
    estimate_from: float = 0.25,
    inverse_every: int = 20,
    fisher: Fisher = "sampled",
    shared: Shared = "expand",
    microbatch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by Kronecker-factored curvature.

        A ← decay A + (1 − decay) Â,   G ← decay G + (1 − decay) Ĝ         (as averages from 0)
        u = (G + √λ/π I)⁻¹ g (A + π √λ I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

    λ is the damping, split between the factors by π. (Martens & Grosse 2015, section 6.3.) With a
    learning rate η,

        u ← u · min(1, √(κ / (η² ⟨u, g⟩)))
        θ ← θ − η (momentum of u)

    where κ, ``max_step``, bounds the squared length of a step in the metric of the Fisher matrix,
    and with it how far predictions move (Ba et al. 2017, section 5). Without one,

        θ ← θ + d,   d = −α u + μ d₀,   d₀ the step before
        (α, μ) minimise M(d) = ⟨g, d⟩ + ½ dᵀ (F + λI) d, F the Gauss–Newton matrix
        every 5 steps   λ ← ωλ if ρ > 3/4, λ/ω if ρ < 1/4,   ω = 0.95⁵
                        ρ = (C(θ + d) − C(θ)) / M(d)

    (Martens & Grosse, sections 6.4, 6.5 and 7). The lowest λ stands for their η there: on batches
    that are small λ falls as long as steps fit the batch, and less and less the data.

    Â and Ĝ take passes of their own, forward and with sampled targets back, so they are taken from
    a part of the batch; they change slowly, so inverses are kept for some steps (the same, section
    8: τ₁ = 1/8, τ₂ = 1/4, T₃ = 20).

    What it costs, in steps of Adam, on two cores, in batches of 128: 3.5 for layers 64-256-128-10
    (with a learning rate 3), 5.5 for 784-512-512-512-10. What is left is mostly the products with
    the inverses, (o + i) o i operations where a gradient takes 3 n o i: it grows with widths, not
    with the batch, so K-FAC asks for batches no smaller than layers are wide. On a CPU the inverses
    are OpenBLAS's, whose threads wait for each other where other work runs beside;
    ``OPENBLAS_NUM_THREADS=1`` spares that.

    Args:
      learning_rate: η, an optax schedule, or None: the paper's α, μ and λ.
      batch: ``(x, y)`` of any size, or its shapes: which parameters have factors, and of what
        shapes, shows only with inputs.
      damping: λ, above 0; without a learning rate, the first.
      decay: of the averages of A and G, in [0, 1).
      momentum: of the steps, in [0, 1). ``max_step`` bounds u before momentum adds up steps.
      max_step: κ, above 0; None for no bound. It and ``momentum`` are for steps with a learning
        rate, ``least_damping`` for those without.
      least_damping: the lowest λ, above 0.
      estimate_every: steps from one Â, Ĝ to the next.
      estimate_from: the part of the batch that they are of, τ₁, and F too, τ₂: above 0 up to 1, at
        least one example; they lie evenly in the batch.
      inverse_every: steps from one inversion to the next, T₃. The first three steps estimate and
        invert whatever these options say, as in the paper's algorithm 2.
      fisher, shared, microbatch: as in ``bp.kronecker_factors``.

    Returns:
      A transformation whose ``update(gradient, state, params, *, x, y, weights=None, key=None)``
      also takes the batch that the gradient is of, and a key if ``fisher`` is ``"sampled"``. A
      parameter without factors is stepped along its gradient. Where some parameters are frozen or
      state, and so None in ``params``, ``untrained`` is a tree that has them.

    Raises:
      ModelError: for an argument out of its range, and as ``bp.kronecker_factors``; without a
        learning rate, as ``bp.ggnvp``.

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
    number("least_damping", least_damping, above=0)
    number("estimate_from", estimate_from, above=0, most=1)
    whole("estimate_every", estimate_every)
    whole("inverse_every", inverse_every)
    curvature = kronecker_curvature(
        model,
        loss,
        batch,
        decay=decay,
        estimate_every=estimate_every,
        estimate_from=estimate_from,
        inverse_every=inverse_every,
        fisher=fisher,
        shared=shared,
        microbatch=microbatch,
    )
    if learning_rate is None:
        products = ggn_inner_products(model, loss, microbatch)
        cost = value_and_grad(model, loss, microbatch=microbatch)

        def model_of(params: Tree, directions: Sequence[Tree], examples: Examples) -> Array:
            x, y, weights, key = examples.part(estimate_from)
            return products(params, x, y, directions, weights, key)

        def cost_of(params: Tree, examples: Examples) -> Array:
            return cost(params, *examples[:2], weights=examples.weights, key=examples.key)[0]

        return _by_quadratic_model(curvature, model_of, cost_of, damping, least_damping)
    return _by_learning_rate(curvature, learning_rate, damping, momentum, max_step)


def _by_learning_rate(
    curvature: Curvature,
    learning_rate: optax.ScalarOrSchedule,
    damping: float,
    momentum: float,
    max_step: float | None,
) -> optax.GradientTransformationExtraArgs:
    def update(
        gradient: Tree, state: KfacState, params: Tree, every: Tree, examples: Examples
    ) -> tuple[Tree, KfacState]:
        new = curvature.renewed(state, gradient, every, examples, damping)
        step = jax.tree.map(preconditioned, gradient, new.inverses)
        if max_step is not None:
            step = _bounded(step, gradient, learning_rate, state.steps, max_step)
        return step, new

    natural = optax.GradientTransformationExtraArgs(curvature.init, _of_batches(update))
    rest = optax.trace(momentum), optax.scale_by_learning_rate(learning_rate)
    return optax.with_extra_args_support(optax.chain(natural, *rest))


def _by_quadratic_model(
    curvature: Curvature,
    products: Callable[[Tree, Sequence[Tree], Examples], Array],
    cost: Callable[[Tree, Examples], Array],
    damping: float,
    least_damping: float,
) -> optax.GradientTransformationExtraArgs:
    def init(params: Tree) -> QuadraticState:
        first = jnp.asarray(damping, jnp.result_type(*jax.tree.leaves(params)))
        return QuadraticState(curvature.init(params), first, jax.tree.map(jnp.zeros_like, params))

    def update(
        gradient: Tree, state: QuadraticState, params: Tree, every: Tree, examples: Examples
    ) -> tuple[Tree, QuadraticState]:
        damping = state.damping
        new = curvature.renewed(state.curvature, gradient, every, examples, damping)
        directions = jax.tree.map(preconditioned, gradient, new.inverses), state.last

        gram = jnp.array([[inner(d, e) for e in directions] for d in directions])
        F = products(every, directions, examples) + damping * gram
        c, change = minimised(F, jnp.array([inner(gradient, d) for d in directions]))
        step = jax.tree.map(lambda u, last: (c[0] * u + c[1] * last).astype(u.dtype), *directions)

        def after_trial() -> Array:
            there = merged(optax.apply_updates(params, step), every)
            ratio = (cost(there, examples) - cost(every, examples)) / change
            return adapted(damping, ratio, OMEGA**ADAPT_EVERY, least_damping)

        due = new.steps % ADAPT_EVERY == 0
        return step, QuadraticState(new, lax.cond(due, after_trial, lambda: damping), step)

    return optax.GradientTransformationExtraArgs(init, _of_batches(update))


def _of_batches(update: Callable[..., tuple[Tree, Any]]) -> Callable[..., tuple[Tree, Any]]:
    """``update(gradient, state, params, every, examples)`` as optax calls it: ``every`` is all
    parameters, ``examples`` the batch."""

    def of_batch(
        gradient: Tree,
        state: Any,
        params: Tree = None,
        *,
        x: Tree,
        y: Tree,
        weights: Array | None = None,
        key: Array | None = None,
        untrained: Tree = None,
        **_: Any,
    ) -> tuple[Tree, Any]:
        every = params if untrained is None else merged(params, untrained)
        return update(gradient, state, params, every, Examples(x, y, weights, key))

    return of_batch


def _check_options(
    learning_rate: Any,
    batch: Any,
    damping: Any,
    decay: Any,
    momentum: Any,
    max_step: Any,
) -> None:
    if not callable(learning_rate) and learning_rate is not None:
        number("learning_rate", learning_rate, least=0)
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ModelError(f"batch: takes the tuple (x, y) of a batch, got {told(batch)}")
    number("damping", damping, above=0)
    number("decay", decay, least=0, below=1)
    number("momentum", momentum, least=0, below=1)
    if max_step is not None:
        number("max_step", max_step, above=0)


def _bounded(step: Tree, gradient: Tree, learning_rate: Any, steps: Array, most: float) -> Tree:
    """The step, shortened where η² ⟨u, g⟩ is more than ``most``."""
    rate = learning_rate(steps) if callable(learning_rate) else learning_rate
    products = jax.tree.map(lambda u, g: jnp.vdot(u, g), step, gradient)
    length = rate**2 * sum(jax.tree.leaves(products))
    shrink = jnp.sqrt(most / jnp.maximum(most, length))
    return jax.tree.map(lambda u: (shrink * u).astype(u.dtype), step)
