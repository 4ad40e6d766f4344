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

from .checks import abstract

Tree = Any

WHOLE = PartitionSpec()  # type: ignore[no-untyped-call]
"""How a result is split that every device holds whole."""


def on_mesh(function: Callable[..., Tree], *args: Tree, results: Callable[[Any], Tree]) -> Tree:
    """``function(*args)``, wherever its arrays lie.

    Args:
      function: of ``args`` alone: it closes over no array.
      results: gives how results of these shapes are split, a ``PartitionSpec`` for each or for all
        below a node; asked only where a mesh has explicit axes.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    axes = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit
    )
    shapes = jax.eval_shape(function, *jax.tree.map(_anywhere, args))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results(shapes))
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


def _anywhere(leaf: Any) -> Any:
    """The shape and dtype of an array, wherever it lies."""
    return abstract(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _split_of(leaf: Any) -> PartitionSpec:
    return jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else WHOLE


def _explicit_mesh(tree: Tree) -> Any:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if AxisType.Explicit in (mesh.axis_types or ()):
                return mesh
    return None


def on_one_device(tree: Tree, platform: str | None = None) -> bool:
    """Whether all leaves are arrays of JAX's on one device, of such a platform."""
    leaves = jax.tree.leaves(tree)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return False
    devices = {device for leaf in leaves for device in leaf.devices()}
    return len(devices) <= 1 and all(platform in (None, device.platform) for device in devices)
