"""A model as text: its layers, their parameters and outputs."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from jax import Array

from ..checks import described
from ..layer import Layer, a_layer, batch_of, one_of, shapes_of
from ..tables import columns

Tree = Any


def summary(model: Layer, x: Tree) -> str:
    """The layers of a model with their place, output, parameters and parameter count, as text.

    Nothing is computed: shapes alone are traced. A tied parameter is counted where it lives; the
    layers inside ``repeat`` are listed once, as one of the stack.

    Args:
      model: a layer.
      x: one example's input, or its ``ShapeDtypeStruct``.

    Raises:
      ModelError: with the layer's place, where the example does not fit the model.

    Example:
      >>> print(bp.summary(bp.chain(bp.dense(2), bp.relu), jnp.ones(3)))
      place  layer     output       parameters                count
      model  chain     float32(2,)                            8
      [0]    dense(2)  float32(2,)  bias (2,), weight (2, 3)  8
      [1]    relu      float32(2,)                            0
      total                                                   8
    """
    a_layer("summary: model", model)
    shapes_of(x)
    listed: dict[str, tuple[Layer, Tree, Tree]] = {}

    def watched(layer: Layer, place: str) -> Layer:
        """The layer, noting its parameters' and output's shapes as it is traced."""

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            y, residuals = layer.forward(params, x, key)
            listed[place] = (layer, jax.tree.map(_shape, params), jax.tree.map(_shape, y))
            return y, residuals

        return dataclasses.replace(layer, forward=forward)

    params = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.eval_shape(model.on_layers(watched).forward, params, batch_of(2, x))

    rows = [("place", "layer", "output", "parameters", "count")]
    for place in sorted(listed, key=_indices):
        layer, held, y = listed[place]
        kind = layer.name.partition("(")[0] if layer.parts else layer.name
        shapes = "" if layer.parts else _named(held)
        rows.append((place or "model", kind, described(one_of(y)), shapes, f"{_count(held):,}"))
    rows.append(("total", "", "", "", f"{_count(params):,}"))
    return columns(rows)


def _indices(place: str) -> list[int]:
    """``[2][0]`` as [2, 0]: in this order a combinator comes before its parts."""
    return [int(index) for index in re.findall(r"\d+", place)]


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # type: ignore[no-untyped-call]


def _count(params: Tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _named(params: Tree) -> str:
    """``weight (512, 784), bias (512,)``."""
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {tuple(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(params)
    )
