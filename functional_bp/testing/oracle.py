"""The wanted values: autodiff of the textbook form, each example by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..factors.factored import per_example
from ..freezing import merged, trainable
from ..layer import Layer, textbook
from .comparing import float64, for_vjp

Tree = Any
Gradients = Callable[[Tree], tuple[Tree, Tree]]


def one_by_one(layer: Layer, params: Tree, examples: list[Tree]) -> tuple[Tree, Gradients]:
    """Outputs of a layer's textbook form over batches of one.

    Returns:
      y, the outputs one after another, and ``dy -> (dx, g)``: ∂C/∂x and each example's gradient
      gₙ, ``(n, *parameter)``, from ∂C/∂y.
    """
    runs = [_vjp(layer, params, jax.tree.map(lambda leaf: leaf[None], x)) for x in examples]

    def gradients(dy: Tree) -> tuple[Tree, Tree]:
        pairs = [
            pullback(for_vjp(y, jax.tree.map(lambda d: d[n : n + 1], dy)))  # noqa: B023  at once
            for n, (y, pullback) in enumerate(runs)
        ]
        dxs = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(dx for _, dx in pairs))
        return dxs, _stacked([g for g, _ in pairs])

    y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(y for y, _ in runs))
    return y, gradients


def together(
    layer: Layer, params: Tree, x: Tree, key: Array | None, *, separate: bool
) -> tuple[Tree, Gradients]:
    """Outputs of a layer's textbook form over a batch.

    Args:
      separate: gₙ is what comes down when every other example's ∂C/∂y is 0; if not, where examples
        need each other, there is one gradient, (1, *parameter).
    """
    y, pullback = _vjp(layer, params, x, key)

    def gradients(dy: Tree) -> tuple[Tree, Tree]:
        def alone(weights: np.ndarray) -> Tree:
            return jax.tree.map(lambda d: per_example(jnp.asarray(weights, d.dtype), d), dy)

        total, dx = pullback(for_vjp(y, dy))
        if not separate:
            return dx, _stacked([total])
        n = len(jax.tree.leaves(y)[0])
        return dx, _stacked([pullback(for_vjp(y, alone(one)))[0] for one in np.eye(n)])

    return y, gradients


def _vjp(layer: Layer, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Any]:
    formula, learned = textbook(layer), trainable(params, layer.is_state(params))
    return jax.vjp(lambda p, x: formula.forward(merged(p, params), x, key)[0], learned, x)


def _stacked(gradients: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack([float64(leaf) for leaf in leaves]), *gradients)
