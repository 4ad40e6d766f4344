"""Meshes of devices whose axes are explicit, as ``jax.make_mesh`` makes them.

On such a mesh every operation must say how its result is split, and most operations of a rule
cannot know. Inside ``on_mesh`` the compiler decides, as on any other mesh; how the results are
split is said once, where they come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = Any

WHOLE = PartitionSpec()  # type: ignore[no-untyped-call]
"""How a result is split that every device holds whole."""


def on_mesh(function: Callable[..., Tree], *args: Tree, results: Callable[[], Tree]) -> Tree:
    """``function(*args)``, wherever its arrays lie.

    Args:
      function: of ``args`` alone: it closes over no array.
      results: gives how the results are split, a ``PartitionSpec`` for each or for all below a
        node; asked only where a mesh has explicit axes.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    axes = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results())
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*args)


def like_arrays(tree: Tree) -> Tree:
    """How the arrays of a tree are split."""
    return jax.tree.map(_split_of, tree)


def by_examples(x: Tree) -> PartitionSpec:
    """How arrays are split that have the examples of ``x`` on their first axis."""
    for leaf in jax.tree.leaves(x):
        axes = _split_of(leaf)
        if len(axes) and axes[0] is not None:
            return PartitionSpec(axes[0])  # type: ignore[no-untyped-call]
    return WHOLE


def _split_of(leaf: Any) -> PartitionSpec:
    return jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else WHOLE


def _explicit_mesh(tree: Tree) -> Any:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if AxisType.Explicit in (mesh.axis_types or ()):
                return mesh
    return None
