"""A stack of layers of one kind, as a scan."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import ModelError, described, random_key, whole
from ..contractions import join_results, keep
from ..docstrings import explained
from ..layer import Layer, a_layer, combined, output_shape, placed, shapes_of

Tree = Any


@explained(
    forward="a^0 = x,  a^l = layer(a^{l−1}; θ^l),  l = 1 … n",
    backward="∂C/∂a^{l−1} from ∂C/∂a^l,  l = n … 1      (BP2)",
)
def repeat(layer: Layer, n: int) -> Layer:
    """``n`` layers of one kind, one after another, each with parameters of its own.

    As ``chain`` of ``n`` of them, but as a scan: compile time does not grow with ``n``. Each
    layer's factors meet their contraction inside the backward scan, so nothing ever holds
    the δ of all layers.

    Parameters are the layer's, every leaf with the ``n`` layers on a new first axis.

    Raises:
      ModelError: where the layer changes its input's shape or dtype.

    Example:
      >>> deep = bp.repeat(bp.chain(bp.dense(8), bp.tanh), 12)
      >>> deep.init(jax.random.key(0), jnp.ones(8))[0]["weight"].shape
      (12, 8, 8)
    """
    one = placed("repeat", a_layer("repeat: layer", layer))
    whole("repeat: n", n)

    def init(key: Array, x: Tree) -> Tree:
        random_key("key", key, or_none=False)
        params = jax.vmap(lambda k: one.init(k, x))(jax.random.split(key, n))
        first = jax.tree.map(lambda leaf: leaf[0], params)
        _check_kept(layer, shapes_of(x), output_shape(one, first, x))
        return params

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_stack(n, params)
        keys = None if key is None else jax.random.split(key, n)

        def step(a: Tree, of_layer: Tree) -> tuple[Tree, _Shared]:
            p, k = of_layer
            y, r = one.forward(p, a, k)
            _check_kept(layer, a, y)
            return y, _Shared.of(a, y, r)

        y, stack = lax.scan(step, x, (params, keys), length=n)
        return y, (stack, y if stack.has_output else None)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        def step(below: Tree, of_layer: Tree) -> tuple[Tree, Tree]:
            delta, y = below
            p, shared, c = of_layer
            dx, results = one.backward(p, shared.residuals(y), delta, c)
            return (dx, shared.input), results

        stack, y = residuals
        of_layers = (params, stack, contract)
        (dx, _), results = lax.scan(step, (dy, y), of_layers, length=n, reverse=True)
        return dx, join_results(contract, results)

    def renew(params: Tree, residuals: Tree) -> Tree:
        def step(y: Tree, of_layer: Tree) -> tuple[Tree, Tree]:
            p, shared = of_layer
            return shared.input, one.renew(p, shared.residuals(y))

        stack, y = residuals
        return lax.scan(step, y, (params, stack), length=n, reverse=True)[1]

    stack = combined(
        f"repeat({layer.name}, {n})",
        (layer,),
        lambda part: repeat(part, n),
        init=init,
        forward=forward,
        backward=backward,
        renew=renew,
        is_state=one.is_state,
    )
    return dataclasses.replace(stack, unrolled=lambda: _unrolled(stack, (layer,) * n))


def _unrolled(stack: Layer, layers: tuple[Layer, ...]) -> Layer:
    """The stack with a part for each of its layers, and no scan: every layer can be looked into."""

    def of_one(tree: Tree, i: int) -> Tree:
        return jax.tree.map(lambda leaf: leaf[i], tree)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        residuals = []
        for i, layer in enumerate(layers):
            x, r = layer.forward(of_one(params, i), x, keys[i])
            residuals.append(r)
        return x, residuals

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        results = []
        for i, layer in reversed(list(enumerate(layers))):
            asked = of_one(contract, i)
            dy, result = layer.backward(of_one(params, i), residuals[i], dy, asked)
            results.append(result)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reversed(results))
        return dy, join_results(contract, stacked)

    def rebuild(*layers: Layer) -> Layer:
        return _unrolled(stack, layers)

    return dataclasses.replace(
        stack, forward=forward, backward=backward, parts=layers, rebuild=rebuild, unrolled=None
    )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["places", "tree", "x_at"]
)
@dataclass(frozen=True)
class _Shared:
    """One layer's residuals in a stack, each array once.

    What two rules of a layer both keep is kept once, and the layer's output not at all where its
    input is kept: it is the input of the layer above, which the way back has just seen.

    ``places`` says for each leaf of the residuals which of ``kept`` it is, ``_OUTPUT`` if it is
    the layer's output; ``x_at`` which of ``kept`` is the input, where ``_OUTPUT`` is used.
    """

    kept: tuple[Array, ...]
    places: tuple[int, ...]
    tree: Any
    x_at: int | None

    @classmethod
    def of(cls, x: Tree, y: Tree, residuals: Tree) -> _Shared:
        """The residuals of one layer with input ``x`` and output ``y``."""
        leaves, tree = jax.tree.flatten(residuals)
        kept = list({id(leaf): leaf for leaf in leaves}.values())
        ids = [id(leaf) for leaf in kept]
        x_at = None
        if id(x) in ids and id(y) in ids and x is not y:
            del kept[ids.index(id(y))], ids[ids.index(id(y))]
            x_at = ids.index(id(x))
        places = tuple(ids.index(id(leaf)) if id(leaf) in ids else _OUTPUT for leaf in leaves)
        return cls(tuple(kept), places, tree, x_at)

    @property
    def has_output(self) -> bool:
        """Whether the layer's output is among its residuals, and not kept."""
        return self.x_at is not None

    @property
    def input(self) -> Array | None:
        """The layer's input, which is the output of the layer below, where that is needed."""
        return None if self.x_at is None else self.kept[self.x_at]

    def residuals(self, y: Tree) -> Tree:
        """The residuals, given the layer's output where it is one of them."""
        return self.tree.unflatten([y if at == _OUTPUT else self.kept[at] for at in self.places])


_OUTPUT = -1


def _check_kept(layer: Layer, x: Tree, y: Tree) -> None:
    if described(y) != described(x):
        raise ModelError(
            f"repeat {layer.name}: takes a layer that keeps the shape and dtype of its input, "
            f"got {described(x)} to {described(y)}"
        )


def _check_stack(n: int, params: Tree) -> None:
    for leaf in jax.tree.leaves(params):
        if getattr(leaf, "shape", ())[:1] != (n,):
            raise ModelError(
                f"repeat: takes parameters with {n} layers on the first axis, got {described(leaf)}"
            )
