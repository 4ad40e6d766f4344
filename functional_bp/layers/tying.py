"""One parameter used in several places, named by its paths into the tree of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import jax
from jax import Array

from ..checks import ModelError, described, told
from ..contractions import asks_layers, broadcast, contract_factors, keep
from ..docstrings import explained
from ..factors.combined import Sum
from ..layer import Layer, a_layer, combined
from ..losses.definition import Loss

Tree = Any
Path = tuple[Any, ...]
Ties = dict[Path, Path]


@overload
def tied(layer: Layer, ties: Ties) -> Layer: ...
@overload
def tied(layer: Loss, ties: Ties) -> Loss: ...
@explained(
    forward="y = layer(x; θ),  with θ[path] = θ[source] for every tie",
    backward="∂C/∂θ[source] = Σ over its uses,  g = Σ_k f_k;  ‖g‖² = Σ_jk ⟨f_j, f_k⟩",
)
def tied(layer: Any, ties: Ties) -> Any:
    """``layer`` with one parameter used in several places.

    Args:
      layer: the layer or model whose parameters are tied; or a loss with parameters, some of which
        are the model's. The parameters are then the pair ``(model's, loss's)``.
      ties: for each tied parameter its source, both as the tuple of keys into the parameters:
        ``{(2, "weight"): (0, "weight")}`` makes layer 2 use the weight of layer 0, and
        ``{(1, "weight"): (0, 2, "weight")}`` a loss that of the model's layer 2.

    Parameters are the layer's with ``None`` at each tied place.

    Raises:
      ModelError: where a source is tied itself, or a loss's tie is not from the loss to the model;
        at ``init``, where a path leads nowhere, to more than one parameter or to state, or two
        tied parameters differ in shape.

    Example:
      >>> pair = bp.chain(bp.dense(4), bp.tanh, bp.dense(4))
      >>> model = bp.tied(pair, {(2, "weight"): (0, "weight")})
      >>> model.init(jax.random.key(0), jnp.ones(4))[2]["weight"] is None
      True
    """
    _check_ties(ties)
    if isinstance(layer, Loss):
        return _tied_loss(layer, ties)
    a_layer("tied: layer", layer)

    def filled(params: Tree) -> Tree:
        """The parameters with each tied one in its places."""
        for path in ties:
            if _look_up(params, path) is not None:
                raise ModelError(
                    f"tied: takes None at {path}, whose parameter is at {ties[path]}, got "
                    f"{described(_look_up(params, path))}; are they another model's?"
                )
        for path, source in ties.items():
            params = _put(params, path, _look_up(params, source))
        return params

    def emptied(tree: Tree) -> Tree:
        for path in ties:
            tree = _put(tree, path, None)
        return tree

    def init(key: Array, x: Tree) -> Tree:
        params = layer.init(key, x)
        _check_tied(params, layer.is_state(params), ties)
        return emptied(params)

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        if asks_layers(contract):
            return layer.backward(filled(params), residuals, dy, contract)
        asked = broadcast(contract, params)
        of_uses = _asked_of_uses(asked, ties)
        dx, results = layer.backward(filled(params), residuals, dy, of_uses)
        return dx, emptied(_sums_of_uses(asked, results, ties))

    return combined(
        f"tied({', '.join([layer.name, *_told_ties(ties)])})",
        (layer,),
        lambda part: tied(part, ties),
        init=init,
        forward=lambda params, x, key=None: layer.forward(filled(params), x, key),
        backward=backward,
        renew=lambda params, residuals: emptied(layer.renew(filled(params), residuals)),
        is_state=lambda params: emptied(layer.is_state(filled(params))),
    )


def _tied_loss(loss: Loss, ties: Ties) -> Loss:
    if not loss.has_parameters:
        raise ModelError(f"tied: takes a loss that has parameters, got {loss.name}")
    for path, source in ties.items():
        if path[:1] != (1,) or source[:1] != (0,):
            raise ModelError(
                "tied: takes ties of a loss from its own parameters, (1, …), to the model's, "
                f"(0, …), got {path}: {source}"
            )
    name = f"tied({', '.join([loss.name, *_told_ties(ties)])})"
    inner = loss.joined
    return dataclasses.replace(loss, name=name, joined=lambda pair: tied(inner(pair), ties))


def _asked_of_uses(asked: Tree, ties: Ties) -> Tree:
    """What each use of a tied parameter is asked: what its source is, or its factors where results
    cannot be added."""
    for path, source in ties.items():
        wanted = _look_up(asked, source)
        use = wanted if wanted.additive else keep
        asked = _put(_put(asked, source, use), path, use)
    return asked


def _sums_of_uses(asked: Tree, results: Tree, ties: Ties) -> Tree:
    """The results with those of all uses of a parameter together at its source."""
    for source in dict.fromkeys(ties.values()):
        places = [source, *(path for path, origin in ties.items() if origin == source)]
        uses = [_look_up(results, place) for place in places]
        wanted = _look_up(asked, source)
        if wanted.additive:
            result = jax.tree.map(lambda *terms: sum(terms), *uses)
        else:
            result = contract_factors(wanted, Sum(tuple(uses)))
        results = _put(results, source, result)
    return results


def _told_ties(ties: Ties) -> list[str]:
    """Each tie as a name says it, ``2.weight=0.weight``, in an order that does not depend on the
    caller's."""
    return sorted(f"{'.'.join(map(str, p))}={'.'.join(map(str, s))}" for p, s in ties.items())


def _check_ties(ties: Ties) -> None:
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


def _check_tied(params: Tree, is_state: Tree, ties: Ties) -> None:
    for path, source in ties.items():
        ours, theirs = (_look_up_one(params, p) for p in (path, source))
        if described(ours) != described(theirs):
            raise ModelError(
                f"tied: takes parameters of equal shapes, got {described(ours)} at {path} "
                f"and {described(theirs)} at {source}"
            )
        for p in (path, source):
            if _look_up(is_state, p):
                raise ModelError(f"tied: takes parameters that are trained, got the state at {p}")


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
