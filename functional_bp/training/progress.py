"""The line that says how far a run has come."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .loop import Training

_PAUSE = 0.1  # seconds between two times that it is shown
_SILENCE = 10.0  # seconds after which a line is printed in the midst of an epoch


def is_watched() -> bool:
    """Whether somebody looks at what is written to stderr: at a terminal or in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = hasattr(shell, "kernel")
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())


class Progress:
    """Shows a run on stderr; a context, in which the run is trained.

    It is a bar of tqdm where that is installed, else a line for each epoch, and every ten seconds.
    It is written ten times a second at most, and no step waits for it in between.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.bar: Any = None
        self.shown = self.said = time.monotonic()  # the last time, and that of a line
        self.told = training.step

    def __enter__(self) -> Progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return self
        self.bar = tqdm(total=self.training.total, initial=self.told, unit="step")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            if error is None:
                self._draw()
            self.bar.close()
        elif error is None and self.told != self.training.step:
            self._say()

    def stepped(self) -> None:
        """After a call."""
        now = time.monotonic()
        if now - self.shown < _PAUSE:
            return
        self.shown = now
        if self.bar is not None:
            self._draw()
        elif now - self.said > _SILENCE:
            self._say()

    def looked(self) -> None:
        """After an epoch or a look."""
        if self.bar is None and time.monotonic() - self.said >= _PAUSE:
            self._say()

    def _draw(self) -> None:
        run = self.training
        self.bar.total, self.bar.n = run.total, run.step
        self.bar.set_description_str(self._epoch(), refresh=False)
        self.bar.set_postfix_str(", ".join(self._numbers()))

    def _say(self) -> None:
        run = self.training
        now = time.monotonic()
        rate = (run.step - self.told) / max(now - self.said, 1e-9)
        self.said, self.told = now, run.step
        parts = [self._epoch(), f"step {run.step:,}", f"{rate:,.0f} steps/s"]
        if run.total is not None:
            parts[1] += f"/{run.total:,}"
            if rate:
                parts.append(f"{_clock((run.total - run.step) / rate)} left")
        print(", ".join(parts + self._numbers()), file=sys.stderr, flush=True)

    def _epoch(self) -> str:
        run = self.training
        now = run.epoch + (run.batch > 0)
        return f"epoch {now}" + (f"/{run.epochs}" if run.epochs is not None else "")

    def _numbers(self) -> list[str]:
        """The latest cost, and what the latest evaluation gave."""
        run = self.training
        cost = run.history.loss[-1] if len(run.history.loss) else math.nan
        if run.unread:
            losses, steps = run.unread[-1]
            cost = np.asarray(losses).reshape(-1, 2)[steps - 1, 0]
        evaluated = [f"{name} {v[-1]:.4g}" for name, v in run.history.evaluation.items() if len(v)]
        at = [f"evaluated: {', '.join(evaluated)}"] if evaluated else []
        return [f"cost {cost:.4g}", *at]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
