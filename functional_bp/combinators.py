"""Combinators: layers made of layers.

Each composes rules over one example and, by the very same lines, rules over a batch: the batched
form of a combinator is the combinator of its parts' batched forms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .activations import identity
from .checks import ModelError, described, random_key, told, whole
from .contractions import Contraction, contract_factors, join_results, keep
from .factors import Sum
from .layer import Layer, a_layer, place, shapes_of

Tree = Any
Path = tuple[Any, ...]


def chain(*layers: Layer) -> Layer:
    """Layers one after another: a^0 = x, a^l = layer_l(a^{l−1}).

    Forward runs l = 1 … L; backward hands δ from L down to 1 (BP2), and each layer's factors to
    its contraction on the way.

    Parameters are a tuple with one entry per layer, ``()`` where a layer has none.

    Raises:
      ModelError: with the layer's place, ``chain[2] dense(256): …``.
    """
    _check_layers("chain", layers)

    def init(key: Array, x: Tree) -> Tree:
        params = []
        for i, (layer, k) in enumerate(zip(layers, _init_keys(key, len(layers)))):
            with place(f"chain[{i}]"):
                params.append(layer.init(k, x))
                x = output_shape(layer, params[-1], x)
        return tuple(params)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_parts("chain", layers, params)
        residuals = []
        for i, (layer, p, k) in enumerate(zip(layers, params, _keys(key, layers))):
            with place(f"chain[{i}]"):
                x, r = layer.forward(p, x, k)
            residuals.append(r)
        return x, tuple(residuals)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        results = []
        for i, layer in reversed(list(enumerate(layers))):
            with place(f"chain[{i}]"):
                dy, result = layer.backward(params[i], residuals[i], dy, contract[i])
            results.append(result)
        return dy, tuple(reversed(results))

    return _combined("chain", chain, layers, init, forward, backward)


def parallel(*layers: Layer) -> Layer:
    """Layers side by side on the same input: y = (layer_1(x), …, layer_k(x)), a tuple.

    Backward: ∂C/∂x = Σ_i ∂C/∂x through layer i. ``bp.add``, ``bp.multiply`` and
    ``bp.concatenate()`` make one array of the tuple.

    Parameters are a tuple with one entry per layer.
    """
    _check_layers("parallel", layers)

    def init(key: Array, x: Tree) -> Tree:
        params = []
        for i, (layer, k) in enumerate(zip(layers, _init_keys(key, len(layers)))):
            with place(f"parallel[{i}]"):
                params.append(layer.init(k, x))
        return tuple(params)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_parts("parallel", layers, params)
        ys, residuals = [], []
        for i, (layer, p, k) in enumerate(zip(layers, params, _keys(key, layers))):
            with place(f"parallel[{i}]"):
                y, r = layer.forward(p, x, k)
            ys.append(y)
            residuals.append(r)
        return tuple(ys), tuple(residuals)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        dxs, results = [], []
        for i, layer in enumerate(layers):
            with place(f"parallel[{i}]"):
                dx, result = layer.backward(params[i], residuals[i], dy[i], contract[i])
            dxs.append(dx)
            results.append(result)
        return jax.tree.map(lambda *terms: sum(terms), *dxs), tuple(results)

    return _combined("parallel", parallel, layers, init, forward, backward)


def residual(layer: Layer, shortcut: Layer = identity) -> Layer:
    """A layer and a way around it: y = layer(x) + shortcut(x).

    Backward: δ goes down both ways, ∂C/∂x = ∂C/∂x through layer + ∂C/∂x through shortcut.
    (He et al. 2016, "Deep residual learning", eq. 1 and 2.)

    Of a sequence with its length or states (``bp.through_time``) ``x`` alone is added; length and
    states are the layer's. Parameters are the tuple ``(layer's, shortcut's)``, the second ``()``
    for the identity.

    Raises:
      ModelError: where the two outputs differ in shape.
    """
    a_layer("residual: layer", layer)
    a_layer("residual: shortcut", shortcut)
    both = parallel(layer, shortcut)

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

    return _combined("residual", residual, (layer, shortcut), init, forward, backward)


def _is_sequence(tree: Tree) -> bool:
    return isinstance(tree, dict) and "x" in tree and ("length" in tree or "state" in tree)


def repeat(layer: Layer, n: int) -> Layer:
    """``n`` layers of one kind, one after another, each with parameters of its own.

    As ``chain`` of ``n`` of them, but as a scan: compile time does not grow with ``n``. Each
    layer's factors meet their contraction inside the backward scan, so nothing ever holds
    the δ of all layers.

    Parameters are the layer's, every leaf with the ``n`` layers on a new first axis.

    Raises:
      ModelError: where the layer changes its input's shape or dtype.
    """
    a_layer("repeat: layer", layer)
    whole("repeat: n", n)

    def check(x: Tree, y: Tree) -> None:
        if described(y) != described(x):
            raise ModelError(
                f"{layer.name}: takes a layer that keeps the shape and dtype of its input, "
                f"got {described(x)} to {described(y)}"
            )

    def init(key: Array, x: Tree) -> Tree:
        with place("repeat"):
            params = jax.vmap(lambda k: layer.init(k, x))(_init_keys(key, n))
            one = jax.tree.map(lambda leaf: leaf[0], params)
            check(shapes_of(x), output_shape(layer, one, x))
        return params

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        _check_stack(n, params)
        keys = None if key is None else jax.random.split(key, n)

        def step(a: Tree, layer_inputs: Tree) -> tuple[Tree, _Shared]:
            p, k = layer_inputs
            y, r = layer.forward(p, a, k)
            check(a, y)
            return y, _Shared.of(a, y, r)

        with place("repeat"):
            y, stack = lax.scan(step, x, (params, keys), length=n)
        return y, (stack, y if stack.has_output else None)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        def step(below: Tree, layer_inputs: Tree) -> tuple[Tree, Tree]:
            delta, y = below
            p, shared, c = layer_inputs
            dx, results = layer.backward(p, shared.residuals(y), delta, c)
            return (dx, shared.input()), results

        stack, y = residuals
        with place("repeat"):
            inputs = (params, stack, contract)
            (dx, _), results = lax.scan(step, (dy, y), inputs, length=n, reverse=True)
        return dx, join_results(contract, results)

    return Layer(
        name=f"repeat({layer.name}, {n})",
        init=init,
        forward=forward,
        backward=backward,
        lift=lambda: repeat(layer.batched, n),
        parts=(layer,),
        rebuild=lambda part: repeat(part, n),
        mixes_examples=layer.mixes_examples,
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

    def residuals(self, y: Tree) -> Tree:
        """The residuals, given the layer's output where it is one of them."""
        return self.tree.unflatten([y if at == _OUTPUT else self.kept[at] for at in self.places])

    def input(self) -> Array | None:
        """The layer's input, which is the output of the layer below, where that is needed."""
        return None if self.x_at is None else self.kept[self.x_at]


_OUTPUT = -1


def tied(layer: Layer, ties: dict[Path, Path]) -> Layer:
    """``layer`` with one parameter used in several places.

    Args:
      layer: the layer or model whose parameters are tied.
      ties: for each tied parameter its source, both as the tuple of keys into the parameters:
        ``{(2, "weight"): (0, "weight")}`` makes layer 2 use the weight of layer 0.

    The gradient of the source is the sum over its uses, g = Σ_k f_k; its per-example norms have
    the cross terms ‖g‖² = Σ_jk ⟨f_j, f_k⟩.

    Parameters are the layer's with ``None`` at each tied place.

    Raises:
      ModelError: where a source is tied itself; at ``init``, where a path leads nowhere or to more
        than one parameter, or two tied parameters differ in shape.
    """
    a_layer("tied: layer", layer)
    _check_ties(ties)

    def init(key: Array, x: Tree) -> Tree:
        params = layer.init(key, x)
        for path, source in ties.items():
            ours, theirs = (_look_up_one(params, p) for p in (path, source))
            if described(ours) != described(theirs):
                raise ModelError(
                    f"tied: takes parameters of equal shapes, got {described(ours)} at {path} "
                    f"and {described(theirs)} at {source}"
                )
        for path in ties:
            params = _put(params, path, None)
        return params

    def filled(part: Layer) -> Layer:
        """``part`` over the tied parameters; its results are its own."""

        def fill(params: Tree) -> Tree:
            for path, source in ties.items():
                if _look_up(params, path) is not None:
                    raise ModelError(
                        f"tied: takes None at {path}, whose parameter is at {source}, got "
                        f"{described(_look_up(params, path))}; are they another model's?"
                    )
            for path, source in ties.items():
                params = _put(params, path, _look_up(params, source))
            return params

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            return part.forward(fill(params), x, key)

        def backward(
            params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
        ) -> tuple[Tree, Tree]:
            return part.backward(fill(params), residuals, dy, contract)

        name = f"tied({', '.join([part.name, *_told_ties(ties)])})"
        return Layer(name, init, forward, backward, parts=(part,), rebuild=filled)

    inner = filled(layer)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        asked = broadcast(contract, params)
        inside = asked
        for path, source in ties.items():
            wanted = _look_up(asked, source)
            use = wanted if wanted.additive else keep
            inside = _put(_put(inside, source, use), path, use)
        dx, results = inner.backward(params, residuals, dy, inside)
        for source in dict.fromkeys(ties.values()):
            places = [source, *(path for path, origin in ties.items() if origin == source)]
            uses = [_look_up(results, place) for place in places]
            wanted = _look_up(asked, source)
            if wanted.additive:
                result = jax.tree.map(lambda *terms: sum(terms), *uses)
            else:
                result = contract_factors(wanted, Sum(tuple(uses)))
            for place_ in places[1:]:
                results = _put(results, place_, None)
            results = _put(results, source, result)
        return dx, results

    return Layer(
        name=inner.name,
        init=init,
        forward=inner.forward,
        backward=backward,
        lift=lambda: tied(layer.batched, ties),
        parts=(layer,),
        rebuild=filled,
        mixes_examples=layer.mixes_examples,
    )


def broadcast(contract: Tree, params: Tree) -> Tree:
    """A contraction for every parameter, from a prefix of that tree."""
    return jax.tree.map(
        lambda c, below: jax.tree.map(lambda _: c, below),
        contract,
        params,
        is_leaf=lambda node: isinstance(node, Contraction),
    )


def output_shape(layer: Layer, params: Tree, x: Tree) -> Tree:
    """Shapes and dtypes of a layer's output, as a tree of ``ShapeDtypeStruct``."""
    return jax.eval_shape(lambda p, x: layer.forward(p, x)[0], params, x)


def _combined(name, make, layers, init, forward, backward) -> Layer:  # type: ignore[no-untyped-def]
    return Layer(
        name=f"{name}({', '.join(layer.name for layer in layers)})",
        init=init,
        forward=forward,
        backward=backward,
        lift=lambda: make(*(layer.batched for layer in layers)),
        parts=layers,
        rebuild=make,
        mixes_examples=any(layer.mixes_examples for layer in layers),
    )


def _keys(key: Array | None, layers: tuple[Layer, ...]) -> Any:
    return [None] * len(layers) if key is None else jax.random.split(key, len(layers))


def _init_keys(key: Array, n: int) -> Array:
    random_key("key", key, or_none=False)
    return jax.random.split(key, n)


def _check_layers(name: str, layers: tuple[Layer, ...]) -> None:
    if not layers:
        raise ModelError(f"{name}: takes at least one layer")
    for i, layer in enumerate(layers):
        a_layer(f"{name}[{i}]", layer)


def _check_parts(name: str, layers: tuple[Layer, ...], params: Tree) -> None:
    if not isinstance(params, tuple) or len(params) != len(layers):
        given = f"{len(params)} entries" if isinstance(params, tuple) else type(params).__name__
        raise ModelError(
            f"{name}: takes parameters as a tuple with one entry for each of its "
            f"{len(layers)} layers, got {given}; are they another model's?"
        )


def _check_stack(n: int, params: Tree) -> None:
    for leaf in jax.tree.leaves(params):
        if getattr(leaf, "shape", ())[:1] != (n,):
            raise ModelError(
                f"repeat: takes parameters with {n} layers on the first axis, got {described(leaf)}"
            )


def _told_ties(ties: dict[Path, Path]) -> list[str]:
    """Each tie as a name says it, ``2.weight=0.weight``, in an order that does not depend on the
    caller's."""
    return sorted(f"{'.'.join(map(str, p))}={'.'.join(map(str, s))}" for p, s in ties.items())


def _check_ties(ties: dict[Path, Path]) -> None:
    if not isinstance(ties, dict):
        raise ModelError(f"tied: takes a dict of paths, {{path: source path}}, got {told(ties)}")
    for path, source in ties.items():
        if not (isinstance(path, tuple) and isinstance(source, tuple)):
            raise ModelError(
                f"tied: takes paths as tuples of keys into the parameters, such as (2, 'weight'), "
                f"got {path!r}: {source!r}"
            )
        if source in ties:
            raise ModelError(
                f"tied: takes sources that are not tied themselves, got {path} to {source}"
            )


def _look_up_one(params: Tree, path: Path) -> Array:
    """The one parameter at a path."""
    found = _look_up(params, path)
    if not hasattr(found, "shape"):
        raise ModelError(
            f"tied: takes paths to single parameters, got {path}, which leads to {described(found)}"
        )
    return found


def _look_up(tree: Tree, path: Path) -> Tree:
    for depth, key in enumerate(path):
        try:
            if hasattr(tree, "shape"):
                raise KeyError("a path ends at a parameter")
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                f"tied: takes paths into the parameters, got {path}, of which {path[: depth + 1]} "
                "does not exist"
            ) from None
    return tree


def _put(tree: Tree, path: Path, value: Tree) -> Tree:
    """``tree`` with ``value`` at ``path``."""
    if not path:
        return value
    key, *rest = path
    new = _put(tree[key], tuple(rest), value)
    if isinstance(tree, dict):
        return {**tree, key: new}
    entries = list(tree)
    entries[key] = new
    return tuple(entries)
