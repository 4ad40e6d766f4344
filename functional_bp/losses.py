"""Losses: the last layer of the recursion.

A loss takes the model's output a and the target y of one example and gives the cost C. Its
backward begins the recursion: ∂C/∂a, which is δ^L where the loss is fused with its activation.

    loss.value(a, y) -> C           a scalar
    loss.delta(a, y) -> ∂C/∂a       the shape of a

One example's cost, with p = softmax(a) or sigmoid(a):

    squared_error                   ½ Σ_j (a_j − y_j)²
    mean_squared_error              mean over j of (a_j − y_j)²
    absolute_error                  Σ_j |a_j − y_j|
    huber(t)                        Σ_j ½ e_j², or t (|e_j| − ½ t) beyond t;  e = a − y
    hinge                           Σ_j max(0, 1 − y_j a_j);  y_j −1 or 1
    softmax_cross_entropy           mean over positions of −Σ_k y_k log p_k
    smoothed_softmax_cross_entropy(α)   the same with (1 − α) one_hot(y) + α / K
    kl_divergence                   mean over positions of Σ_k y_k log(y_k / p_k)
    sigmoid_cross_entropy           −Σ_k [y_k log p_k + (1 − y_k) log(1 − p_k)]

For ``softmax_cross_entropy`` a is ``(*positions, classes)`` and y the class ids ``(*positions)``
or probabilities of a's shape. Where only some positions count, y is a dict of ``y`` and ``length``,
the first so many, or of ``y`` and ``mask``, bools ``(*positions)``; the mean is over those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .checks import ModelError, described, function, number, text
from .factors import accumulator
from .layer import place

Tree = Any


@dataclass(frozen=True, eq=False)
class Loss:
    """C(a, y) for one example and its derivative by a. Make one with ``bp.losses.loss``."""

    name: str
    value: Callable[[Tree, Tree], Array]
    delta: Callable[[Tree, Tree], Tree]
    check: Callable[[Tree, Tree], None]
    root: Callable[[Tree, Tree, Tree], Tree] | None = None
    sample: Callable[[Array, Tree, Tree], Tree] | None = None

    # Compiled, because vmap outside jit goes from operation to operation, 10 ms for a loss whose
    # arithmetic is microseconds. Inside jit they are inlined and leave no trace.

    @functools.cached_property
    def costs(self) -> Callable[[Tree, Tree], Array]:
        """``value`` over a batch: ``(a, y) -> (batch,)``."""

        def scalar(a: Tree, y: Tree) -> Array:
            cost = self.value(a, y)
            if jnp.shape(cost) != ():
                raise ModelError(f"takes a value that is a scalar, got {described(cost)}")
            return cost

        return jax.jit(jax.vmap(scalar), inline=True)

    @functools.cached_property
    def deltas(self) -> Callable[[Tree, Tree], Tree]:
        """``delta`` over a batch."""

        def of_outputs(a: Tree, y: Tree) -> Tree:
            delta = self.delta(a, y)
            if jax.tree.map(jnp.shape, delta) != jax.tree.map(jnp.shape, a):
                raise ModelError(
                    f"{self.name}: takes a delta of the outputs' shape, {described(a)}, got "
                    f"{described(delta)}"
                )
            return delta

        return jax.jit(jax.vmap(of_outputs), inline=True)

    def __repr__(self) -> str:
        return self.name


def _any_target(a: Tree, y: Tree) -> None:
    """Fits every output and target."""


def loss(
    value: Callable[[Tree, Tree], Array],
    delta: Callable[[Tree, Tree], Tree],
    *,
    name: str | None = None,
    check: Callable[[Tree, Tree], None] = _any_target,
    root: Callable[[Tree, Tree, Tree], Tree] | None = None,
    sample: Callable[[Array, Tree, Tree], Tree] | None = None,
) -> Loss:
    """A loss from its value and its derivative, both for one example.

    Args:
      value: ``(a, y) -> C``, a scalar.
      delta: ``(a, y) -> ∂C/∂a``, of a's shape.
      name: how errors call it.
      check: ``(a, y) -> None`` for a whole batch, raising ``bp.ModelError`` where the target
        does not fit; y may be traced.
      root: ``(a, y, e) -> S e``, linear in e of a's shape, for the S with ∇²C = S Sᵀ (by a).
        Exact curvature needs it.
      sample: ``(key, a, y) -> δ̂``, a random δ with mean of δ̂ δ̂ᵀ = ∇²C: the δ of a target drawn
        from the model's own prediction. Sampled curvature needs it.
    """
    given: dict[str, Any] = {"value": value, "delta": delta, "check": check}
    for what, argument in given.items():
        function(f"loss: {what}", argument)
    function("loss: root", root, or_none=True)
    function("loss: sample", sample, or_none=True)
    name = getattr(value, "__name__", "loss") if name is None else name
    return Loss(text("loss: name", name), value, delta, check, root, sample)


def _same_shape(a: Array, y: Array) -> None:
    _is_array(a, y)
    if a.shape != y.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ModelError(
            f"takes targets of the outputs' shape, {tuple(a.shape[1:])} for each example, as "
            f"floating-point numbers; got {y.dtype}{tuple(y.shape[1:])}"
        )


def _is_array(a: Tree, y: Tree) -> None:
    if not (hasattr(a, "shape") and hasattr(y, "shape")):
        raise ModelError(
            "takes one array of outputs and one of targets, or a dict of y and length or mask "
            f"where the loss knows them, got {described(a)} and {described(y)}"
        )


def _ids_or_probabilities(a: Array, y: Tree) -> None:
    mask = None
    if isinstance(y, dict):
        _check_masked(a, y)
        y, mask = jax.vmap(_target_and_mask)(a, y)
    _is_array(a, y)
    if a.ndim < 2:
        raise ModelError(f"takes outputs of shape (..., classes), got {tuple(a.shape[1:])}")
    *outer, classes = a.shape
    if y.shape == a.shape and jnp.issubdtype(y.dtype, jnp.floating):
        return
    if y.shape != tuple(outer) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ModelError(
            f"takes for each example class ids of shape {tuple(outer[1:])}, as integers, or "
            f"probabilities of shape {tuple(a.shape[1:])}; got {y.dtype}{tuple(y.shape[1:])}"
        )
    if not isinstance(y, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        ids = np.asarray(y) if mask is None else np.asarray(y)[np.asarray(mask)]
        if ids.size and not (ids.min() >= 0 and ids.max() < classes):
            raise ModelError(
                f"takes class ids from 0 to {classes - 1}, got {ids.min()} to {ids.max()}"
            )


def _half_squared(a: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((a - y) ** 2, dtype=accumulator(a))


squared_error = loss(
    _half_squared,
    lambda a, y: (a - y).astype(a.dtype),
    name="squared_error",
    check=_same_shape,
    root=lambda a, y, e: e,
    sample=lambda key, a, y: jax.random.normal(key, a.shape, a.dtype),
)
"""C = ½ ‖a − y‖²; ∂C/∂a = a − y; ∇²C = I. a and y have the same shape."""


def _is_ids(a: Array, y: Array) -> bool:
    return y.ndim < a.ndim


def _check_masked(a: Tree, y: Tree) -> None:
    _is_array(a, y.get("y"))
    n, *positions = a.shape[:-1]
    if set(y) == {"y", "length"} and jnp.issubdtype(y["length"].dtype, jnp.integer):
        if y["length"].shape == (n,) and positions:
            return
    elif set(y) == {"y", "mask"} and y["mask"].dtype == bool and y["mask"].shape == a.shape[:-1]:
        return
    raise ModelError(
        "takes a target as an array or a tree of y and, for each example, either length, an "
        f"integer, or mask, bools of shape {tuple(positions)}; got {described(y)}"
    )


def _target_and_mask(a: Array, y: Tree) -> tuple[Array, Array | None]:
    """One example's target, and which of its positions count; None for all."""
    if not isinstance(y, dict):
        return y, None
    if "mask" in y:
        return y["y"], y["mask"]
    before_end = jnp.arange(a.shape[0]) < y["length"]
    return y["y"], jnp.broadcast_to(before_end.reshape(-1, *(1,) * (a.ndim - 2)), a.shape[:-1])


def _product(y: Array, cost: Array) -> Array:
    """y ⊙ cost, and 0 where y is 0: what cannot happen costs nothing, however unlikely."""
    return jnp.where(y == 0, 0, y * jnp.where(y == 0, 0, cost))


def _softmax_value(a: Array, y: Tree) -> Array:
    y, mask = _target_and_mask(a, y)
    a = a.astype(accumulator(a))
    # What all logits have in common is taken off first, which is exact: at 1e5, float32 would have
    # two digits left for the cost.
    highest = jax.lax.stop_gradient(a.max(-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    log_z = jnp.log(jnp.exp(a - highest).sum(-1))
    if _is_ids(a, y):
        costs = log_z - (jnp.take_along_axis(a, y[..., None], axis=-1) - highest)[..., 0]
    else:
        costs = _product(y, log_z[..., None] - (a - highest)).sum(-1)
    if mask is None:
        return costs.mean()
    return jnp.where(mask, costs, 0).sum() / jnp.maximum(1, mask.sum())


def _softmax_delta(a: Array, y: Tree) -> Array:
    y, mask = _target_and_mask(a, y)
    positions: Any = max(1, a.size // a.shape[-1])
    p = jax.nn.softmax(a.astype(accumulator(a)), axis=-1)
    if _is_ids(a, y):
        # p − one_hot(y) without making the one-hot.
        classes = jax.lax.broadcasted_iota(y.dtype, p.shape, p.ndim - 1)
        delta = jnp.where(classes == y[..., None], p - 1, p)
    else:
        delta = p * y.sum(-1, keepdims=True) - y
    if mask is not None:
        delta, positions = jnp.where(mask[..., None], delta, 0), jnp.maximum(1, mask.sum())
    return (delta / positions).astype(a.dtype)


def _root_of_position_weights(a: Array, y: Tree) -> Array:
    """√ of each position's share of ∇²C, ``(*positions, 1)``."""
    y, mask = _target_and_mask(a, y)
    weights = jnp.ones(a.shape[:-1], a.dtype) if _is_ids(a, y) else y.sum(-1)
    if mask is None:
        weights = weights / max(1, weights.size)
    else:
        weights = jnp.where(mask, weights, 0) / jnp.maximum(1, mask.sum())
    return jnp.sqrt(weights)[..., None].astype(a.dtype)


def _softmax_root(a: Array, y: Tree, e: Array) -> Array:
    p = jax.nn.softmax(a, axis=-1)
    se = jnp.sqrt(p) * e
    return _root_of_position_weights(a, y) * (se - p * se.sum(-1, keepdims=True))


def _softmax_sample(key: Array, a: Array, y: Tree) -> Array:
    drawn = jax.nn.one_hot(jax.random.categorical(key, a), a.shape[-1], dtype=a.dtype)
    return _root_of_position_weights(a, y) * (jax.nn.softmax(a, axis=-1) - drawn)


softmax_cross_entropy = loss(
    _softmax_value,
    _softmax_delta,
    name="softmax_cross_entropy",
    check=_ids_or_probabilities,
    root=_softmax_root,
    sample=_softmax_sample,
)
"""Cross-entropy of softmax(a) with the target, from logits a ``(*positions, classes)``.

    p = softmax(a),  C = mean over positions of −Σ_k y_k log p_k
    δ^L = (p Σ_k y_k − y) / positions
    ∇²C = (diag(p) − p pᵀ) Σ_k y_k / positions = S Sᵀ,  S ∝ diag(√p) − p √pᵀ

y is the class ids ``(*positions)``, for which Σ_k y_k = 1, or probabilities of a's shape.
Where only some positions count, it is a tree of ``y`` and either ``length``, an integer: the
first so many of the first axis do; or ``mask``, bools ``(*positions)``. The mean is over an
example's valid positions, and 0 where it has none; y may be anything elsewhere. (Bridle 1990.)"""


def perplexity(a: Array, y: Tree) -> Array:
    """exp of the mean, over all valid positions of a batch, of −log p of the target.

    Args:
      a: logits, ``(n, *positions, classes)``.
      y: targets as ``softmax_cross_entropy`` takes them, the examples first.

    Returns:
      A scalar: 1 for a perfect prediction, the number of classes for a uniform one.

    Raises:
      ModelError: where the targets do not fit.
    """
    with place("perplexity:"):
        softmax_cross_entropy.check(a, y)
    costs = jax.vmap(_softmax_value)(a, y)
    _, mask = jax.vmap(_target_and_mask)(a, y)
    if mask is None:
        return jnp.exp(costs.mean())
    counts = mask.sum(range(1, mask.ndim))
    return jnp.exp(counts @ costs / jnp.maximum(1, counts.sum()))


def _sigmoid_value(a: Array, y: Array) -> Array:
    a = a.astype(accumulator(a))
    y = y.astype(a.dtype)
    either = jnp.log1p(jnp.exp(-jnp.abs(a)))  # log(1 + e^a) = max(a, 0) + this, also of −a
    if_1, if_0 = jnp.maximum(-a, 0) + either, jnp.maximum(a, 0) + either
    return jnp.sum(_product(y, if_1) + _product(1 - y, if_0))


sigmoid_cross_entropy = loss(
    _sigmoid_value,
    lambda a, y: (jax.lax.logistic(a) - y).astype(a.dtype),
    name="sigmoid_cross_entropy",
    check=_same_shape,
    root=lambda a, y, e: e * jnp.exp(0.5 * (jax.nn.log_sigmoid(a) + jax.nn.log_sigmoid(-a))),
    sample=lambda key, a, y: (
        jax.lax.logistic(a) - jax.random.bernoulli(key, jax.lax.logistic(a)).astype(a.dtype)
    ),
)
"""Cross-entropy of sigmoid(a) with the target, from logits, summed over outputs.

    p = sigmoid(a),  C = −Σ_k [y_k log p_k + (1 − y_k) log(1 − p_k)]
    δ^L = p − y,  ∇²C = diag(p (1 − p))

a and y have the same shape, y between 0 and 1."""


def _mean_squared(a: Array, y: Array) -> Array:
    return jnp.mean((a - y) ** 2, dtype=accumulator(a))


mean_squared_error = loss(
    _mean_squared,
    lambda a, y: ((a - y) * (2 / max(1, a.size))).astype(a.dtype),
    name="mean_squared_error",
    check=_same_shape,
    root=lambda a, y, e: e * (2 / max(1, a.size)) ** 0.5,
    sample=lambda key, a, y: jax.random.normal(key, a.shape, a.dtype) * (2 / max(1, a.size)) ** 0.5,
)
"""C = mean over j of (a_j − y_j)²; ∂C/∂a = 2 (a − y) / J, J the number of outputs."""

absolute_error = loss(
    lambda a, y: jnp.sum(jnp.abs(a - y), dtype=accumulator(a)),
    lambda a, y: jnp.sign(a - y).astype(a.dtype),
    name="absolute_error",
    check=_same_shape,
)
"""C = Σ_j |a_j − y_j|; ∂C/∂a = sign(a − y)."""


def huber(threshold: float = 1.0) -> Loss:
    """Squared near the target, absolute away from it, summed over outputs.

        e = a − y
        C = Σ_j ½ e_j² where |e_j| ≤ t, else t (|e_j| − ½ t)
        ∂C/∂a = e clipped to [−t, t]

    (Huber 1964, "Robust estimation of a location parameter".)
    """
    number("huber: threshold", threshold, above=0)

    def value(a: Array, y: Array) -> Array:
        size = jnp.abs(a - y)
        inside = jnp.minimum(size, threshold)
        return jnp.sum(inside * (size - 0.5 * inside), dtype=accumulator(a))

    return loss(
        value,
        lambda a, y: jnp.clip(a - y, -threshold, threshold).astype(a.dtype),
        name=f"huber({threshold})",
        check=_same_shape,
    )


hinge = loss(
    lambda a, y: jnp.sum(jax.nn.relu(1 - y * a), dtype=accumulator(a)),
    lambda a, y: jnp.where(y * a < 1, -y, 0).astype(a.dtype),
    name="hinge",
    check=_same_shape,
)
"""C = Σ_j max(0, 1 − y_j a_j), y_j = −1 or 1; ∂C/∂a_j = −y_j where y_j a_j < 1, else 0.
(Cortes & Vapnik 1995.)"""


def _kl_value(a: Array, y: Array) -> Array:
    entropy = -jax.scipy.special.xlogy(y, y).sum(-1, dtype=accumulator(a)).mean()
    return _softmax_value(a, y) - entropy


kl_divergence = loss(_kl_value, _softmax_delta, name="kl_divergence", check=_same_shape)
"""KL(y ‖ p) = Σ_k y_k log(y_k / p_k), p = softmax(a), mean over positions; δ^L as the
cross-entropy's: the entropy of y does not depend on a. a and y have the same shape.
(Kullback & Leibler 1951.)"""


def smoothed_softmax_cross_entropy(smoothing: float) -> Loss:
    """Softmax cross-entropy with smoothed labels, from logits and class ids.

        q = (1 − α) one_hot(y) + α / K,  p = softmax(a)
        C = mean over positions of −Σ_k q_k log p_k
        δ^L = (p − q) / positions

    (Szegedy et al. 2016, "Rethinking the Inception architecture", section 7.)

    Args:
      smoothing: α, from 0 to 1.
    """
    number("smoothed_softmax_cross_entropy: smoothing", smoothing, least=0, most=1)

    def smoothed(a: Array, y: Array) -> Array:
        q = jax.nn.one_hot(y, a.shape[-1], dtype=accumulator(a)) if _is_ids(a, y) else y
        return (1 - smoothing) * q + smoothing / a.shape[-1]

    return loss(
        lambda a, y: _softmax_value(a, smoothed(a, y)),
        lambda a, y: _softmax_delta(a, smoothed(a, y)),
        name=f"smoothed_softmax_cross_entropy({smoothing})",
        check=_ids_or_probabilities,
    )
