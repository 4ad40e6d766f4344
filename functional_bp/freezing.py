"""Frozen parameters: named by a tree or a predicate, split off, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .checks import ModelError

Tree = Any
Path = tuple[Any, ...]
Frozen = Tree | Callable[[Path], bool] | None


def frozen_leaves(params: Tree, frozen: Frozen) -> Tree:
    """True at each frozen parameter, False at each other.

    Args:
      params: the parameters.
      frozen: a tree of bools in the shape of ``params`` or a prefix of it (one bool for all that
        is below), or a predicate on paths, the tuples of keys into the parameters:
        ``lambda path: path[0] < 3`` freezes a chain's first three layers. None freezes nothing.

    Raises:
      ModelError: where the tree does not fit the parameters or has something else than bools.
    """
    if frozen is None:
        return jax.tree.map(lambda _: False, params)
    if callable(frozen):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(frozen(tuple(map(_plain_key, path)))), params
        )
    if not all(isinstance(flag, bool) for flag in jax.tree.leaves(frozen)):
        raise ModelError(f"frozen: takes a tree of bools or a predicate on paths, got {frozen}")
    try:
        return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), frozen, params)
    except ValueError as error:
        raise ModelError(
            f"frozen: takes a tree in the shape of the parameters, {jax.tree.structure(params)}, "
            f"or a prefix of it; got {jax.tree.structure(frozen)}: {error}"
        ) from None


def trainable(params: Tree, frozen: Frozen) -> Tree:
    """``params`` with None at each frozen parameter: what an optimiser should see."""
    return jax.tree.map(lambda flag, p: None if flag else p, frozen_leaves(params, frozen), params)


def merged(trained: Tree, params: Tree) -> Tree:
    """``trained``, with the leaves of ``params`` where it has None: ``trainable`` undone."""
    return jax.tree.map(
        lambda t, below: below if t is None else t, trained, params, is_leaf=lambda t: t is None
    )


def _plain_key(key: Any) -> Any:
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
