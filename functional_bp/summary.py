"""A model as text: its layers, their parameters and outputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax import Array

from .checks import described
from .layer import Layer, a_layer, shapes_of

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
    """
    a_layer("summary: model", model)
    shapes_of(x)
    outputs: dict[str, Tree] = {}
    listed: list[tuple[str, Layer]] = []

    def watched(layer: Layer, place: str) -> Layer:
        """The layer, noting its parameters' and output's shapes as it is traced."""
        listed.append((place, layer))
        if layer.rebuild is not None:
            parts = [watched(part, f"{place}[{i}]") for i, part in enumerate(layer.parts)]
            layer = dataclasses.replace(layer, forward=layer.rebuild(*parts).forward)

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            y, residuals = layer.forward(params, x, key)
            outputs[place] = (jax.tree.map(_shape, params), jax.tree.map(_shape, y))
            return y, residuals

        return dataclasses.replace(layer, forward=forward)

    params = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.eval_shape(watched(model, "").forward, params, x)

    rows = [("place", "layer", "output", "parameters", "count")]
    for place, layer in listed:
        held, y = outputs[place]
        kind = layer.name if layer.rebuild is None else layer.name.partition("(")[0]
        shapes = "" if layer.rebuild is not None else _named(held)
        rows.append((place or "model", kind, described(y), shapes, f"{_count(held):,}"))
    rows.append(("total", "", "", "", f"{_count(params):,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


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
