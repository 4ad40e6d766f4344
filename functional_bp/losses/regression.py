"""Losses of outputs that are numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import number
from ..docstrings import explained
from ..factors.factored import accumulator
from .definition import Loss, loss
from .targets import same_shape


def _half_squared(a: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((a - y) ** 2, dtype=accumulator(a))


squared_error = loss(
    _half_squared,
    lambda a, y: (a - y).astype(a.dtype),
    name="squared_error",
    check=same_shape,
    root=lambda a, y, e: e,
    sample=lambda key, a, y: jax.random.normal(key, a.shape, a.dtype),
    equations=("C = ½ Σ_j (a_j − y_j)²", "∂C/∂a = a − y,  ∇²C = I"),
    doc="""Half the squared error, summed over outputs, as in the derivation.

    a and y have the same shape, whatever it is.""",
)


def _mean_squared(a: Array, y: Array) -> Array:
    return jnp.mean((a - y) ** 2, dtype=accumulator(a))


mean_squared_error = loss(
    _mean_squared,
    lambda a, y: ((a - y) * (2 / max(1, a.size))).astype(a.dtype),
    name="mean_squared_error",
    check=same_shape,
    root=lambda a, y, e: e * (2 / max(1, a.size)) ** 0.5,
    sample=lambda key, a, y: jax.random.normal(key, a.shape, a.dtype) * (2 / max(1, a.size)) ** 0.5,
    equations=("C = (1/J) Σ_j (a_j − y_j)²", "∂C/∂a = 2 (a − y) / J,  ∇²C = 2 I / J"),
    doc="""The squared error, a mean over an example's J outputs.

    a and y have the same shape, whatever it is.""",
)

absolute_error = loss(
    lambda a, y: jnp.sum(jnp.abs(a - y), dtype=accumulator(a)),
    lambda a, y: jnp.sign(a - y).astype(a.dtype),
    name="absolute_error",
    check=same_shape,
    equations=("C = Σ_j |a_j − y_j|", "∂C/∂a = sign(a − y)"),
    doc="""The absolute error, summed over outputs.

    a and y have the same shape, whatever it is.""",
)


@explained(
    forward="""
        e = a − y
        C = Σ_j ½ e_j² where |e_j| ≤ t, else t (|e_j| − ½ t)""",
    backward="∂C/∂a = e clipped to [−t, t]",
    x="a",
    y="C",
)
def huber(threshold: float = 1.0) -> Loss:
    """Squared near the target, absolute away from it, summed over outputs.

    a and y have the same shape, whatever it is. (Huber 1964, "Robust estimation of a location
    parameter".)

    Args:
      threshold: t, above 0.

    Example:
      >>> float(bp.losses.huber(1.0).value(jnp.array([3.0]), jnp.array([0.0])))
      2.5
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
        check=same_shape,
    )


hinge = loss(
    lambda a, y: jnp.sum(jax.nn.relu(1 - y * a), dtype=accumulator(a)),
    lambda a, y: jnp.where(y * a < 1, -y, 0).astype(a.dtype),
    name="hinge",
    check=same_shape,
    equations=("C = Σ_j max(0, 1 − y_j a_j)", "∂C/∂a_j = −y_j where y_j a_j < 1, else 0"),
    doc="""The hinge loss of a support vector machine, summed over outputs.

    a and y have the same shape; y_j is −1 or 1. (Cortes & Vapnik 1995, "Support-vector
    networks".)""",
)
