"""Layers made of layers: one after another, side by side, and around a shortcut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, described, random_key
from ..contractions import keep
from ..docstrings import explained
from ..layer import Layer, a_layer, combined, output_shape, placed
from .activations import identity

Tree = Any


@explained(
    forward="a^0 = x,  a^l = layer_l(a^{l−1}),  l = 1 … L",
    backward="∂C/∂a^{l−1} from ∂C/∂a^l,  l = L … 1      (BP2)",
)
def chain(*layers: Layer) -> Layer:
    """Layers one after another.

    On the way back each layer's factors meet their contraction as soon as its δ is known.

    Parameters are a tuple with one entry per layer, ``()`` where a layer has none.

    Raises:
      ModelError: with the layer's place, ``chain[2] dense(256): …``.

    Example:
      >>> model = bp.chain(bp.dense(3), bp.tanh, bp.dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones(4))
      >>> [sorted(p) for p in params]
      [['bias', 'weight'], [], ['bias', 'weight']]
    """
    parts = _placed("chain", layers)

    def init(key: Array, x: Tree) -> Tree:
        params = []
        for layer, k in zip(parts, _init_keys(key, len(parts))):
            params.append(layer.init(k, x))
            x = output_shape(layer, params[-1], x)
        return tuple(params)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_parts("chain", parts, params)
        residuals = []
        for layer, p, k in zip(parts, params, _keys(key, parts)):
            x, r = layer.forward(p, x, k)
            residuals.append(r)
        return x, tuple(residuals)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        results = []
        for i, layer in reversed(list(enumerate(parts))):
            dy, result = layer.backward(params[i], residuals[i], dy, contract[i])
            results.append(result)
        return dy, tuple(reversed(results))

    return _of_tuple("chain", parts, layers, chain, init=init, forward=forward, backward=backward)


@explained(
    forward="y = (layer_1(x), …, layer_k(x)), a tuple",
    backward="∂C/∂x = Σ_i ∂C/∂x through layer i",
)
def parallel(*layers: Layer, **named: Layer) -> Layer:
    """Layers side by side on the same input.

    ``bp.add``, ``bp.multiply`` and ``bp.concatenate()`` make one array of the tuple. Of layers that
    are given by name the outputs are a dict, as attention to another sequence takes it:
    ``bp.parallel(x=bp.entry("x"), context=bp.chain(bp.entry("source"), encoder))``.

    Parameters are a tuple with one entry per layer, in the order in which they are given.

    Raises:
      ModelError: without a layer, and where some are given by name and some not.

    Example:
      >>> model = bp.chain(bp.parallel(bp.dense(2), bp.dense(3)), bp.concatenate())
      >>> params = model.init(jax.random.key(0), jnp.ones(4))
      >>> model.apply(params, jnp.ones((1, 4))).shape
      (1, 5)
    """
    if layers and named:
        raise ModelError(
            f"parallel: takes all layers by name or none, got {len(layers)} without and "
            f"{', '.join(named)}"
        )
    return _by_name(named) if named else _on_one_input("parallel", layers, parallel)


def _by_name(named: dict[str, Layer]) -> Layer:
    def rebuild(*parts: Layer) -> Layer:
        return parallel(**dict(zip(named, parts)))

    sides = _on_one_input("parallel", tuple(named.values()), rebuild)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        ys, residuals = sides.forward(params, x, key)
        return dict(zip(named, ys)), residuals

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        return sides.backward(params, residuals, tuple(dy[n] for n in named), contract)

    told = ", ".join(f"{name}={layer.name}" for name, layer in named.items())
    return dataclasses.replace(sides, name=f"parallel({told})", forward=forward, backward=backward)


def _on_one_input(name: str, layers: tuple[Layer, ...], rebuild: Callable[..., Layer]) -> Layer:
    sides = side_by_side(name, layers)

    def copies(x: Tree) -> Tree:
        return (x,) * len(layers)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        dxs, results = sides.backward(params, residuals, dy, contract)
        return jax.tree.map(lambda *terms: sum(terms), *dxs), results

    return dataclasses.replace(
        sides,
        init=lambda key, x: sides.init(key, copies(x)),
        forward=lambda params, x, key=None: sides.forward(params, copies(x), key),
        backward=backward,
        rebuild=rebuild,
    )


@explained(
    forward="y = layer(x) + shortcut(x)",
    backward="∂C/∂layer(x) = ∂C/∂y,  ∂C/∂x = ∂C/∂x through layer + ∂C/∂x through shortcut",
)
def residual(layer: Layer, shortcut: Layer = identity) -> Layer:
    """A layer and a way around it; δ goes down both ways.

    (He et al. 2016, "Deep residual learning", eq. 1 and 2.)

    Of a sequence with its length or states (``bp.through_time``) ``x`` alone is added; length and
    states are the layer's. Parameters are the tuple ``(layer's, shortcut's)``, the second ``()``
    for the identity.

    Raises:
      ModelError: where the two outputs differ in shape.

    Example:
      >>> block = bp.residual(bp.chain(bp.dense(8), bp.relu))
      >>> params = block.init(jax.random.key(0), jnp.ones(8))
      >>> block.apply(params, jnp.ones((1, 8))).shape
      (1, 8)
    """
    a_layer("residual: layer", layer)
    a_layer("residual: shortcut", shortcut)
    both = _on_one_input("residual", (layer, shortcut), residual)

    def check(ys: Tree) -> None:
        if jax.tree.map(jnp.shape, ys[0]) != jax.tree.map(jnp.shape, ys[1]):
            raise ModelError(
                f"residual: takes a layer and a shortcut of equal output shapes, got "
                f"{described(ys[0])} and {described(ys[1])}"
            )

    def init(key: Array, x: Tree) -> Tree:
        params = both.init(key, x)
        check(output_shape(both, params, x))
        return params

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        ys, residuals = both.forward(params, x, key)
        check(ys)
        if _is_sequence(ys[0]):
            return {**ys[0], "x": ys[0]["x"] + ys[1]["x"]}, residuals
        return jax.tree.map(jnp.add, *ys), residuals

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        around = dy
        if _is_sequence(dy):
            around = {**jax.tree.map(jnp.zeros_like, dy), "x": dy["x"]}
        return both.backward(params, residuals, (dy, around), contract)

    return dataclasses.replace(both, init=init, forward=forward, backward=backward)


def _is_sequence(tree: Tree) -> bool:
    return isinstance(tree, dict) and "x" in tree and ("length" in tree or "state" in tree)


def side_by_side(name: str, layers: tuple[Layer, ...]) -> Layer:
    """Each layer on its own entry of a tuple: y_i = layer_i(x_i), ∂C/∂x_i = ∂C/∂x_i through it."""
    parts = _placed(name, layers)

    def init(key: Array, xs: Tree) -> Tree:
        keys = _init_keys(key, len(parts))
        return tuple(layer.init(k, x) for layer, k, x in zip(parts, keys, xs))

    def forward(params: Tree, xs: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_parts(name, parts, params)
        of_each = zip(parts, params, xs, _keys(key, parts))
        ys, residuals = zip(*(layer.forward(*given) for layer, *given in of_each))
        return ys, residuals

    def backward(
        params: Tree, residuals: Tree, dys: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        of_each = zip(parts, params, residuals, dys, (contract[i] for i in range(len(parts))))
        dxs, results = zip(*(layer.backward(*given) for layer, *given in of_each))
        return dxs, results

    def rebuild(*layers: Layer) -> Layer:
        return side_by_side(name, layers)

    return _of_tuple(name, parts, layers, rebuild, init=init, forward=forward, backward=backward)


def _of_tuple(
    name: str,
    placed: tuple[Layer, ...],
    layers: tuple[Layer, ...],
    rebuild: Callable[..., Layer],
    **functions: Any,
) -> Layer:
    """A layer whose parameters and residuals are tuples of its parts'."""

    def renew(params: Tree, residuals: Tree) -> Tree:
        return tuple(layer.renew(*of_one) for layer, *of_one in zip(placed, params, residuals))

    def is_state(params: Tree) -> Tree:
        _check_parts(name, layers, params)
        return tuple(layer.is_state(p) for layer, p in zip(placed, params))

    told = f"{name}({', '.join(layer.name for layer in layers)})"
    return combined(told, layers, rebuild, renew=renew, is_state=is_state, **functions)


def _placed(name: str, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    if not layers:
        raise ModelError(f"{name}: takes at least one layer")
    return tuple(
        placed(f"{name}[{i}]", a_layer(f"{name}[{i}]", layer)) for i, layer in enumerate(layers)
    )


def _keys(key: Array | None, layers: tuple[Layer, ...]) -> Any:
    return [None] * len(layers) if key is None else jax.random.split(key, len(layers))


def _init_keys(key: Array, n: int) -> Array:
    random_key("key", key, or_none=False)
    return jax.random.split(key, n)


def _check_parts(name: str, layers: tuple[Layer, ...], params: Tree) -> None:
    if not isinstance(params, tuple) or len(params) != len(layers):
        given = f"{len(params)} entries" if isinstance(params, tuple) else type(params).__name__
        raise ModelError(
            f"{name}: takes parameters as a tuple with one entry for each of its "
            f"{len(layers)} layers, got {given}; are they another model's?"
        )
