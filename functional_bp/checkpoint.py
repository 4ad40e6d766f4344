"""Checkpoints of a training run, by orbax.

What is on disk, for each step in the run's folder:

    state     every array of the parameters and the optimiser's state, and the key, by name
    history   the recorded losses and evaluations
    about     what the run is (model, loss, optimiser, the names and shapes of its arrays) and its
              position in the data, as JSON

orbax writes a checkpoint beside the others and renames it when it is complete.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .layer import ModelError
from .tensors import named

Tree = Any
Arrays = dict[str, np.ndarray]

_KEPT = 2


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done, epochs completed, batches done of the epoch it is in, the
    rows that batches are padded to, and whether a callback ended it."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    rows: int = 0
    stopped: bool = False


class Checkpoints:
    """A run's checkpoints in a folder; a context that is left when all is written.

    Args:
      folder: made if it is not there.
      run: what the run is: texts by name, of which each must be the same to resume it.
    """

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, str]) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoints: takes orbax-checkpoint; pip install 'functional_bp[checkpoint]'"
            ) from error
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoints: takes a folder, got the file {self.folder}")
        self._orbax = ocp.args
        self._run = run
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: Tree, history: Tree, position: Position) -> None:
        """Begins to write a checkpoint; the arrays are copied first."""
        args = self._orbax
        self._manager.save(
            position.step,
            args=args.Composite(
                state=args.StandardSave(_stored(state)),
                history=args.StandardSave(_stored(history)),
                about=args.JsonSave({"run": self._run, "position": dataclasses.asdict(position)}),
            ),
        )

    def restore(self, like: Tree) -> tuple[Tree, Arrays, Position]:
        """The latest checkpoint.

        Args:
          like: a state of the same run; gives the tree, shapes and dtypes to read.

        Raises:
          ModelError: if it is of another run, with every difference.
          ValueError: if it cannot be read.
        """
        args = self._orbax
        step = self.latest
        wanted = _stored(like)
        try:
            about = self._manager.restore(step, args=args.Composite(about=args.JsonRestore())).about
            position = Position(**about["position"])
            differences = _differences(about["run"], self._run)
            if not differences:
                read = self._manager.restore(
                    step,
                    args=args.Composite(
                        state=args.StandardRestore(wanted), history=args.StandardRestore()
                    ),
                )
        except Exception as error:
            others = [other for other in self._manager.all_steps() if other != step]
            raise ValueError(
                f"checkpoints: {self.folder / str(step)} cannot be read, expected the state of a "
                f"run in {len(wanted)} arrays: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}\n"
                f"Nothing was changed. Other checkpoints in the folder: {others or 'none'}"
            ) from error
        if differences:
            raise ModelError(
                f"checkpoints: {self.folder / str(step)} is of another run:\n" + differences
            )
        return _restored(read.state, like), dict(read.history), position


def described_run(state: Tree) -> dict[str, str]:
    """What a run's arrays are: the kinds of its optimiser's states, its key, and each array."""
    key = state["key"]
    arrays = named({"params": state["params"]}) | named({"opt_state": state["opt_state"]})
    return {
        "optimizer": ", ".join(_kinds(state["opt_state"])),
        "key": "none" if key is None else str(jax.random.key_data(key).tolist()),
    } | {name: f"{leaf.dtype}{tuple(leaf.shape)}" for name, leaf in arrays.items()}


def _kinds(state: Tree) -> list[str]:
    """The names of an optimiser's states, in order: equal arrays may belong to different ones."""
    if not isinstance(state, tuple):
        return []
    name = [type(state).__name__] if hasattr(state, "_fields") else []
    return name + [kind for part in state for kind in _kinds(part)]


def _differences(saved: dict[str, str], run: dict[str, str], most: int = 24) -> str:
    lines = [
        f"  {name}: it has {saved.get(name, 'none')}, this run has {run.get(name, 'none')}"
        for name in {**run, **saved}
        if saved.get(name) != run.get(name)
    ]
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(state: Tree) -> Arrays:
    """The arrays of a state by name, copied: training uses their buffers again. orbax stores no
    empty array, and there is nothing in one to store."""
    return {
        name: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for name, leaf in named(state).items()
        if leaf.size
    }


def _restored(arrays: Arrays, like: Tree) -> Tree:
    def leaf_of(name: str, old: Array) -> Array:
        if not old.size:
            return old
        if _is_key(old):
            return jax.random.wrap_key_data(
                jnp.asarray(arrays[name]), impl=jax.random.key_impl(old)
            )
        return jnp.asarray(arrays[name], old.dtype)

    leaves = [leaf_of(name, leaf) for name, leaf in named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
