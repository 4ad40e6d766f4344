"""Layers that only move numbers about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from ..layer import check_array, no_parameters
from ..rules import rule

Tree = Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class Sizes:
    """Sizes of axes as a residual: known when tracing, and no array."""

    sizes: tuple[int, ...]


def _flatten_forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Sizes]:
    return x.reshape(-1), Sizes(x.shape)


def _flatten_backward(params: Tree, shape: Sizes, dy: Array) -> tuple[Array, Tree]:
    return dy.reshape(shape.sizes), ()


flatten = rule(
    no_parameters,
    _flatten_forward,
    _flatten_backward,
    name="flatten",
    check=lambda params, x: check_array(x),
    equations=("y = the numbers of x on one axis", "∂C/∂x = ∂C/∂y in the shape of x"),
    doc="""All numbers of one example's array on one axis, row by row.""",
)
