"""Ctrl-C while a run trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Holds Ctrl-C back while a run's state is in the making; a context.

    A step gives its arrays away before the new ones are there, so that an interrupt in its midst
    would leave neither. Inside the context an interrupt therefore waits for the next ``allowed``.
    Only the first one waits.

    Attributes:
      whole: whether the state is whole, so that it can be kept. After an interrupt it says whether
        the state was.

    Args:
      hold: False lets every interrupt through at once.
    """

    def __init__(self, *, hold: bool) -> None:
        self.hold = hold
        self.whole = False
        self._before: Callable[[int, FrameType | None], Any] | None = None
        self._waiting: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Interrupts:
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        # Where Ctrl-C is ignored, or ends the process without Python, it stays so.
        if self.hold and in_main and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._arrived)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        if error is None:
            self._let_through()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        assert self._before is not None
        if self.whole or self._waiting is not None:
            self._before(number, frame)
        else:
            self._waiting = (number, frame)

    def while_whole(self, function: Callable[..., Any], *args: Any) -> Any:
        """A call that may be interrupted, as in ``allowed``, at a tenth of the cost."""
        self.whole = True
        if self._waiting is not None:
            self._let_through()
        result = function(*args)
        self.whole = False
        return result

    def _let_through(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self._before is not None:
            self._before(*waiting)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """A part that may be interrupted, because the state is whole all through it."""
        self.whole = True
        self._let_through()
        yield
        self.whole = False
