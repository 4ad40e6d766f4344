"""Checkpoints of a training run, by orbax.

What is on disk, for each step in the run's folder:

    state     every array of the parameters and the optimiser's state, and the key, by name
    history   the recorded losses and evaluations
    about     what the run is (``Identity``) and its position in the data, as JSON

orbax writes a checkpoint beside the others and renames it when it is complete. One run at a time
writes in a folder: it holds a lock on the file ``.lock`` there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, path_of
from .parameter_files import named
from .run_identity import Identity

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

Tree = Any
Arrays = dict[str, np.ndarray]

_KEPT = 2


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done, epochs completed, batches done of the epoch it is in, the
    rows that batches are padded to, whether a callback ended it, and the step of its last look."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    rows: int = 0
    stopped: bool = False
    looked: int = 0


class Checkpoints:
    """A run's checkpoints in a folder; a context that is left when all is written.

    Args:
      folder: made if it is not there.
      identity: what the run is.

    Raises:
      ValueError: for a file in place of a folder, and for a folder in which another run writes.
      OSError: for a folder that cannot be written to; for a checkpoint that cannot be written, here
        or at the next one or when the context is left, because orbax writes beside the training.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Identity) -> None:
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
        self._identity = identity
        self._writing = 0
        self._failed = False
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder))
            stack.enter_context(_without_tracebacks())
            self._manager = ocp.CheckpointManager(self.folder, options=options)
            self._opened = stack.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._told():
                self._manager.close()
        except OSError as unwritten:
            if error is None:
                raise
            error.add_note(str(unwritten))
        finally:
            self._opened.close()

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: Tree, history: Tree, position: Position) -> None:
        """Begins to write a checkpoint, when the one before is written; the arrays are copied."""
        args = self._orbax
        with self._told():
            self._manager.wait_until_finished()
        self._writing = position.step
        about = {
            "identity": dataclasses.asdict(self._identity),
            "position": dataclasses.asdict(position),
        }
        with self._told():
            self._manager.save(
                position.step,
                args=args.Composite(
                    state=args.StandardSave(_stored(state)),
                    history=args.StandardSave(_stored(history)),
                    about=args.JsonSave(about),
                ),
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says in a sentence, once, which checkpoint could not be written."""
        try:
            yield
        except Exception as error:
            if self._failed:
                return
            self._failed = True
            complete = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
            latest = f"step {max(complete)}" if complete else "none"
            reason = _reason(error)
            raise OSError(
                f"checkpoints: step {self._writing} could not be written to {self.folder}: "
                f"{reason or f'{type(error).__name__}: {_first_line(error)}'}; the latest complete "
                f"one is {latest}"
            ) from (None if reason else error)

    def restore(self, like: Tree) -> tuple[Tree, Arrays, Position]:
        """The latest checkpoint. What may differ from its run, and does, is said by a warning.

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
            saved = Identity(**about["identity"])
            refused = self._identity.refused(saved)
            if not refused:
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
                f"run in {len(wanted)} arrays: {type(error).__name__}: {_first_line(error)}\n"
                f"Nothing was changed. Other checkpoints in the folder: {others or 'none'}"
            ) from error
        where = f"checkpoints: {self.folder / str(step)}"
        if refused:
            raise ModelError(f"{where} is of another run:\n{refused}")
        if changed := self._identity.changed(saved):
            warnings.warn(
                f"{where} is gone on with, but not as the same run:\n{changed}",
                UserWarning,
                stacklevel=4,  # the caller of fit
            )
        return _restored(read.state, like), dict(read.history), position


def delete_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Deletes the checkpoints in a folder, if there are any, so that a run begins anew there.

    Raises:
      ValueError: if a run writes there now.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bp.delete_checkpoints(folder)
    """
    folder = path_of("delete_checkpoints: folder", folder).absolute()
    if not folder.is_dir():
        return
    with _locked(folder):
        for path in folder.iterdir():
            if path.name.partition(".")[0].isdigit():  # complete, or 4.orbax-checkpoint-tmp
                shutil.rmtree(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this run alone. When a process ends, however it
    does, the system lets go of its locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(f"checkpoints: {folder} cannot be written to: {error.strerror}") from None
    try:
        _lock(file, folder)
        yield
    finally:
        if fcntl is not None:  # a process that was forked meanwhile has the file open as well
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """orbax logs every failure, with a traceback, in each of its threads that meets it. It raises
    it as well, which is enough."""

    def is_told(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_told)
    try:
        yield
    finally:
        logger.removeFilter(is_told)


def _lock(file: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 20).decode()
        raise ValueError(
            f"checkpoints: {folder} is being written by another run (process {holder})"
        ) from None
    except OSError:  # a file system without locks
        return
    with contextlib.suppress(OSError):  # the disk may be full: the lock holds all the same
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())


def _reason(error: BaseException | None) -> str:
    """What the system said against writing, such as ``No space left on device``; "" if it is not
    known to be the system."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # as tensorstore puts it
            number = int(found[1])
        if number is not None:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


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
