"""Layers for inputs that are dicts: work on one entry, or go on with one alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, text
from ..contractions import keep
from ..docstrings import explained
from ..layer import Layer, a_layer, combined, no_parameters, placed
from ..rules import rule

Tree = Any


@explained(
    forward="y[entry] = layer(x[entry]),  y[k] = x[k] for every other k",
    backward="∂C/∂x[entry] = ∂C/∂x[entry] through the layer,  ∂C/∂x[k] = ∂C/∂y[k]",
)
def at(entry: str, layer: Layer) -> Layer:
    """``layer`` on one entry of a dict; the others pass it by.

    ``bp.at("x", bp.embedding(256, 64))`` embeds the ids of a sequence and leaves its length and
    states as they are. Parameters are the layer's.

    Raises:
      ModelError: where the input is not a dict with that entry.

    Example:
      >>> layer = bp.at("x", bp.tanh)
      >>> layer.apply((), {"x": jnp.zeros((2, 3)), "length": jnp.array([1, 3])})["length"].tolist()
      [1, 3]
    """
    text("at: entry", entry)
    a_layer("at: layer", layer)
    name = f"at({entry!r}, {layer.name})"
    part = placed(f"at({entry!r})", layer)

    def init(key: Array, x: Tree) -> Tree:
        _check_entry(name, entry, x)
        return part.init(key, x[entry])

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_entry(name, entry, x)
        y, residuals = part.forward(params, x[entry], key)
        return {**x, entry: y}, residuals

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        dx, results = part.backward(params, residuals, dy[entry], contract)
        return {**dy, entry: dx}, results

    def rebuild(part: Layer) -> Layer:
        return at(entry, part)

    functions: Any = {"init": init, "forward": forward, "backward": backward}
    return combined(name, (layer,), rebuild, renew=part.renew, is_state=part.is_state, **functions)


@explained(
    forward="y = x[name]",
    backward="∂C/∂x[name] = ∂C/∂y,  0 for every other entry",
)
def entry(name: str) -> Layer:
    """One entry of a dict; the others end here.

    Raises:
      ModelError: where the input is not a dict with that entry.

    Example:
      >>> bp.entry("x").apply((), {"x": jnp.zeros((2, 3)), "length": jnp.array([1, 3])}).shape
      (2, 3)
    """
    text("entry: name", name)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        others = {k: jax.tree.map(_zero_delta, v) for k, v in x.items() if k != name}
        return x[name], others

    def backward(params: Tree, others: Tree, dy: Tree) -> tuple[Tree, Tree]:
        return {**others, name: dy}, ()

    return rule(
        no_parameters,
        forward,
        backward,
        name=f"entry({name!r})",
        check=lambda params, x: _check_entry("", name, x),
        batched=True,
    )


def _zero_delta(leaf: Array) -> Array | None:
    """No change of the cost; None for integers, which have no δ."""
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else None


def _check_entry(where: str, entry: str, x: Tree) -> None:
    if not isinstance(x, dict) or entry not in x:
        given = f"entries {sorted(x)}" if isinstance(x, dict) else f"{type(x).__name__}"
        raise ModelError(
            f"{where}: takes a dict with the entry {entry!r}, got {given}".lstrip(": ")
        )
