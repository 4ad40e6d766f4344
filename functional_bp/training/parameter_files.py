"""Parameters to and from safetensors files, by name."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import ModelError, arrays_of, path_of

Tree = Any


def named(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their path: ``{"0.weight": …, "0.bias": …}``, in the tree's order.

    Raises:
      ModelError: if two leaves have the same name, because a key has a dot in it.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ModelError(f"params: takes parameters of different names, got {name!r} twice")
        leaves[name] = leaf
    return leaves


def save_params(path: str | os.PathLike[str], params: Tree) -> None:
    """Writes parameters to a safetensors file, each under its path: ``0.weight``, ``0.bias``, ….

    A tied parameter is written once, at its source. The file appears whole or not at all. It has
    the mode of the one that it takes the place of, or that of any new file. (The extra
    ``safetensors``.)

    Raises:
      FileNotFoundError: if its folder does not exist.
      ModelError: if two parameters would have the same name.

    Example:
      >>> import os, tempfile
      >>> params = bp.dense(2).init(jax.random.key(0), jnp.ones(3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "dense.safetensors")
      ...     bp.save_params(path, params)
      ...     loaded = bp.load_params(path, like=params)
      >>> bool((loaded["weight"] == params["weight"]).all())
      True
    """
    safetensors = _safetensors()
    arrays_of("save_params: params", params)
    target = path_of("save_params: path", path).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_params: path: takes one in a folder, got {target}")
    # Row by row in memory: safetensors writes an array's buffer as it lies.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named(params).items()}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        written = Path(folder) / target.name
        safetensors.numpy.save_file(arrays, written)
        shutil.copymode(_with_its_mode(target, Path(folder)), written)
        os.replace(written, target)


def load_params(path: str | os.PathLike[str], like: Tree) -> Tree:
    """Parameters from a safetensors file, by name.

    Args:
      path: a file that ``bp.save_params`` or another library wrote.
      like: parameters of the same model, or their shapes:
        ``jax.eval_shape(model.init, key, x)``.

    Returns:
      The tree of ``like`` with the file's values.

    Raises:
      ModelError: if tensors are missing, unknown, or of another shape or dtype: all are named, and
        nothing is loaded.
      ValueError: if the file is not safetensors, or not whole.

    Example:
      >>> import os, tempfile
      >>> model, key = bp.dense(2), jax.random.key(0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "dense.safetensors")
      ...     bp.save_params(path, model.init(key, jnp.ones(3)))
      ...     loaded = bp.load_params(path, like=jax.eval_shape(model.init, key, jnp.ones(3)))
      >>> loaded["weight"].shape
      (2, 3)
    """
    safetensors = _safetensors()
    path = path_of("load_params: path", path)
    wanted = named(arrays_of("load_params: like", like))
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file with {len(wanted)} tensors, got "
            f"{os.path.getsize(path):,} bytes that are not a whole one: {error}"
        ) from None
    problems = [
        f"  {name}: the file has {_told(arrays.get(name))}, the model takes "
        f"{_told(wanted.get(name))}"
        for name in {**wanted, **arrays}
        if _told(arrays.get(name)) != _told(wanted.get(name))
    ]
    if problems:
        raise ModelError(f"{path}: does not hold this model's parameters:\n" + "\n".join(problems))
    return jax.tree.unflatten(
        jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted]
    )


def _with_its_mode(target: Path, folder: Path) -> Path:
    """A file with the mode of what is written to ``target``. (Only the system knows the umask.)"""
    if target.exists():
        return target
    new = folder / "new"
    new.touch()
    return new


def _told(leaf: Any) -> str:
    return "none" if leaf is None else f"{leaf.dtype}{tuple(leaf.shape)}"


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "parameters to and from files take safetensors; pip install "
            "'functional_bp[safetensors]'"
        ) from error
    return safetensors
