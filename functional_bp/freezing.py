"""Frozen parameters: named by a tree or a predicate, split off, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax

from .checks import ModelError, arrays_of, described, told

Tree = Any
Path = tuple[Any, ...]
Frozen = Tree | Callable[[Path], bool] | None


def check_frozen(frozen: Frozen) -> None:
    """Raises unless it is a tree of bools, a function or None."""
    if not _is_predicate(frozen) and not all(isinstance(f, bool) for f in jax.tree.leaves(frozen)):
        raise ModelError(f"frozen: takes a tree of bools or a predicate on paths, got {frozen}")


def _is_predicate(frozen: Frozen) -> bool:
    """A function; not so a tree of bools that can be called, as Equinox's modules can."""
    return callable(frozen) and jax.tree_util.all_leaves([frozen])


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
    if _is_predicate(frozen):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(frozen(plain_path(path))), params
        )
    check_frozen(frozen)
    try:
        return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), frozen, params)
    except ValueError as error:
        raise ModelError(
            f"frozen: takes a tree in the shape of the parameters, {jax.tree.structure(params)}, "
            f"or a prefix of it; got {jax.tree.structure(frozen)}: {error}"
        ) from None


def warn_if_none(params: Tree, frozen: Frozen, stacklevel: int) -> None:
    """Says so where a predicate freezes nothing.

    Args:
      stacklevel: of the caller's caller this is 2, as in ``warnings.warn``.
    """
    if not _is_predicate(frozen) or any(jax.tree.leaves(frozen_leaves(params, frozen))):
        return
    paths = [tuple(map(_plain_key, path)) for path, _ in jax.tree.leaves_with_path(params)]
    if paths:
        shown = ", ".join(map(repr, paths[:2])) + (", …" if len(paths) > 2 else "")
        warnings.warn(
            f"frozen: the predicate freezes none of the parameters, whose paths are {shown}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def trainable(params: Tree, frozen: Frozen) -> Tree:
    """``params`` with None at each frozen parameter: what an optimiser should see.

    Raises:
      ModelError: where ``frozen`` does not fit the parameters. A predicate that freezes nothing is
        said by a ``UserWarning``.

    Example:
      >>> params = {"weight": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
      >>> bp.trainable(params, lambda path: path == ("bias",))["bias"] is None
      True
    """
    arrays_of("params", params)
    warn_if_none(params, frozen, 2)
    return jax.tree.map(lambda flag, p: None if flag else p, frozen_leaves(params, frozen), params)


def merged(trained: Tree, params: Tree) -> Tree:
    """``trained``, with the leaves of ``params`` where it has None: ``trainable`` undone.

    Raises:
      ModelError: where ``trained`` is no such part of ``params``.

    Example:
      >>> bp.merged({"weight": 2, "bias": None}, {"weight": 1, "bias": 0})
      {'bias': 0, 'weight': 2}
    """

    def either(t: Any, below: Tree) -> Tree:
        if t is not None and not jax.tree_util.all_leaves([below]) and below is not None:
            raise TypeError("one array where there are several")
        return below if t is None else t

    try:
        return jax.tree.map(either, trained, params, is_leaf=lambda t: t is None)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"trained: takes the tree of the parameters, {described(params)}, with None at some of "
            f"them; got {told(trained)}: {error}"
        ) from None


def plain_path(path: Path) -> Path:
    """JAX's path to a leaf as the tuple of keys into the tree."""
    return tuple(map(_plain_key, path))


def _plain_key(key: Any) -> Any:
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
