"""A model that computes in a narrower dtype than that of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..contractions import keep
from ..layer import Layer, combined
from ..losses.definition import Loss
from ..recursion import cost_itself, with_loss

Tree = Any


def in_dtype(model: Layer, loss: Loss, dtype: Any) -> tuple[Layer, Loss]:
    """A model and its loss, of the same parameters, with both passes in ``dtype``.

    A loss without parameters computes in float32 from outputs in ``dtype``. One with parameters,
    and a cost, are a pass like the model's; what they give is then float32. Targets stay as they
    are.
    """
    if loss is cost_itself or loss.has_parameters:
        return _within(with_loss(model, loss), dtype, with_targets=True), cost_itself
    return _within(model, dtype), loss


def _within(layer: Layer, dtype: Any, *, with_targets: bool = False) -> Layer:
    """The layer with parameters and inputs cast to ``dtype``, and outputs to float32 at least.
    State stays as it is.

    Args:
      with_targets: its input is (x, y), of which y stays as it is.
    """

    def cast(leaf: Array) -> Array:
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if floating else leaf

    def inputs(x: Tree) -> Tree:
        return (jax.tree.map(cast, x[0]), x[1]) if with_targets else jax.tree.map(cast, x)

    def lowered(params: Tree) -> Tree:
        return jax.tree.map(lambda s, p: p if s else cast(p), layer.is_state(params), params)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        y, residuals = layer.forward(lowered(params), inputs(x), key)
        dtypes = jax.tree.map(lambda leaf: leaf[:0], y)  # of no numbers: says what δ must be
        return jax.tree.map(_wide, y), (residuals, dtypes)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        residuals, dtypes = residuals
        dy = jax.tree.map(lambda d, like: d.astype(like.dtype), dy, dtypes)
        return layer.backward(lowered(params), residuals, dy, contract)

    def renew(params: Tree, residuals: Tree) -> Tree:
        return layer.renew(params, residuals[0])

    return combined(
        layer.name,
        (layer,),
        lambda layer: _within(layer, dtype, with_targets=with_targets),
        init=layer.init,
        forward=forward,
        backward=backward,
        renew=renew,
        holds_deltas=layer.holds_deltas,
    )


def _wide(leaf: Array) -> Array:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if floating else leaf
