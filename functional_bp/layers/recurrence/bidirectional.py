"""A sequence read from both ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ...checks import ModelError
from ...contractions import keep
from ...docstrings import explained
from ...layer import Layer, a_layer
from ..chains import side_by_side
from ..shapes import Sizes
from .sequences import as_tree

Tree = Any


@explained(
    forward="y_t = [→h_t, ←h_t]",
    backward="[∂C/∂→h_t, ∂C/∂←h_t] = ∂C/∂y_t,  ∂C/∂x_t = the sum of ∂C/∂x_t through both",
)
def bidirectional(forward: Layer, backward: Layer | None = None) -> Layer:
    """Two recurrent layers over the same sequence, one from each end.

    (Schuster & Paliwal 1997, "Bidirectional recurrent neural networks".)

    Args:
      forward: a recurrent layer, ``bp.lstm(64)``, or a model with such layers.
      backward: the one that runs from the last valid step to the first, as
        ``bp.lstm(64, reverse=True)`` does; ``forward``'s own kind from that end, with parameters of
        its own, if not given.

    The input and the output are those of the two layers; of ``state``, ``forward`` takes the
    first and ``backward`` the second. Parameters are the tuple ``(forward's, backward's)``.

    Raises:
      ModelError: if ``backward`` is not given and there is no recurrent layer in ``forward``.

    Example:
      >>> layer = bp.bidirectional(bp.lstm(4))
      >>> params = layer.init(jax.random.key(0), jnp.ones((10, 3)))
      >>> layer.apply(params, jnp.ones((2, 10, 3))).shape
      (2, 10, 8)
    """
    a_layer("bidirectional: forward", forward)
    if backward is None:
        backward = _mirrored(forward)
    sides = side_by_side("bidirectional", (forward, a_layer("bidirectional: backward", backward)))

    def run(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        ys, residuals = sides.forward(params, _inputs(x), key)
        hs = [as_tree(y)["x"] for y in ys]
        y: Tree = jnp.concatenate(hs, axis=-1)
        if isinstance(x, dict):
            y = {**x, "x": y}
        if isinstance(x, dict) and "state" in x:
            y["state"] = (*x["state"][2:], *(y_["state"][0] for y_ in ys))
        return y, (residuals, Sizes(tuple(h.shape[-1] for h in hs)))

    def run_back(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        residuals, hidden = residuals
        dys = _output_deltas(dy, hidden)
        dxs, results = sides.backward(params, residuals, dys, contract)
        return _input_deltas(dy, dxs), results

    return dataclasses.replace(
        sides,
        init=lambda key, x: sides.init(key, _inputs(x)),
        forward=run,
        backward=run_back,
        renew=lambda params, residuals: sides.renew(params, residuals[0]),
        rebuild=bidirectional,
    )


def _mirrored(layer: Layer) -> Layer:
    """The layer with every recurrent layer in it from the other end."""

    def other_end(part: Layer, place: str) -> Layer:
        if part.mirrored is None:
            return part
        return dataclasses.replace(part.mirrored(), equations=part.equations, doc=part.doc)

    mirrored = layer.on_layers(other_end)
    if mirrored is layer:
        raise ModelError(f"bidirectional: takes a recurrent layer, got {layer!r}")
    return mirrored


def _inputs(x: Tree) -> tuple[Tree, Tree]:
    if "state" not in as_tree(x):
        return x, x
    if len(x["state"]) < 2:
        raise ModelError(
            f"bidirectional: state: takes a state for each direction, got {len(x['state'])}"
        )
    return {**x, "state": x["state"][:1]}, {**x, "state": x["state"][1:2]}


def _output_deltas(dy: Tree, hidden: Sizes) -> list[Tree]:
    dh = as_tree(dy)["x"]
    dhs = list(lax.split(dh, hidden.sizes, dh.ndim - 1))
    if not isinstance(dy, dict):
        return dhs
    dys = [{**dy, "x": dh} for dh in dhs]
    if "state" in dy:
        dys = [{**d, "state": (of_final,)} for d, of_final in zip(dys, dy["state"][-2:])]
    return dys


def _input_deltas(dy: Tree, dxs: tuple[Tree, Tree]) -> Tree:
    first, second = dxs
    if not isinstance(dy, dict):
        return first + second
    both = {**first, "x": first["x"] + second["x"]}
    if "state" in dy:
        both["state"] = (*first["state"], *second["state"], *dy["state"][:-2])
    return both
