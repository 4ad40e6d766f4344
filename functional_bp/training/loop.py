"""A run under way: steps, looks between them, and checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from .batches import Batch, Epoch, Form, Padded
from .calls import Calls, Gathered, Losses
from .checkpoints import Checkpoints, Position
from .evaluation import Targets
from .history import UNTRAINED, History, Run
from .interrupts import Interrupts
from .progress import Progress

Tree = Any

_NO_BATCH: Any = object()
MOST_UNREAD = 256  # steps that may pass before the host reads their losses


@dataclass(kw_only=True)
class Training:
    """A run under way: its arrays, its place in the data, and what the host knows of it.

    Attributes:
      calls: they make steps with the batches that are gathered.
      split: ``(params, opt_state, step, average) -> (state, rest)``.
      averages: ``(state, rest) -> `` the averaged parameters.
      state: what steps change; has ``params(rest)``, ``opt_state``, ``step`` and ``average``.
      steps_per_epoch: None if that is not known.
    """

    calls: Calls
    split: Callable[..., tuple[Any, Tree]]
    averages: Callable[[Any, Tree], Tree]
    source: Callable[[int], Iterable[Batch]]
    state: Any
    rest: Tree
    key: Array | None
    steps_per_epoch: int | None
    padded: Padded
    targets: Targets
    epochs: int | None
    steps: int | None
    every: int | None
    stop_on_nan: bool
    callbacks: tuple[Callable[[Run], Any], ...]
    interrupts: Interrupts
    evaluate: Callable[[Tree], dict[str, float]] | None = None
    store: Checkpoints | None = None
    progress: Progress | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    looked: int = 0
    saved: int = 0
    stopped: bool = False
    gathered: list[Gathered] = field(default_factory=list)
    steps_gathered: int = 0
    form: Form | None = None
    unread: list[Losses] = field(default_factory=list)
    steps_unread: int = 0
    history: History = UNTRAINED

    @property
    def run(self) -> Run:
        params, state = self.state.params(self.rest), self.state
        ema = None if state.average is None else self.averages(state, self.rest)
        return Run(params, state.opt_state, self.step, self.epoch, self.history, ema)

    @property
    def at_look(self) -> bool:
        """Whether the run stands where it is looked at."""
        return self.batch == 0 if self.every is None else self.step % self.every == 0

    @property
    def finished(self) -> bool:
        over = self.epochs is not None and self.epoch >= self.epochs
        return self.stopped or over or (self.steps is not None and self.step >= self.steps)

    @property
    def total(self) -> int | None:
        """How many steps the run has, if that is known."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None or self.steps_per_epoch is None:
            return None
        return self.epochs * self.steps_per_epoch

    @property
    def room(self) -> int:
        """How many steps the next call may have: none passes a look, and no batch is asked for
        that is not trained with. The first calls are short, so that the device begins early."""
        room = min(self.calls.most(self.form), MOST_UNREAD - self.steps_unread, 4 + 2 * self.step)
        if self.steps is not None:
            room = min(room, self.steps - self.step)
        if self.every is not None:
            room = min(room, self.every - self.step % self.every)
        return room - self.steps_gathered

    def train(self) -> None:
        try:
            if self.at_look:  # a run that was interrupted at a look has it before it
                self.look()
            while not self.finished:
                self.train_epoch()
            self.look()
        except KeyboardInterrupt:
            if self.store is not None and self.interrupts.whole:
                self.take_steps()
                self.read()
                self.save()
            raise

    def train_epoch(self) -> None:
        """With the batches that are left of it, each fetched while nothing is in the making."""
        with self.interrupts.allowed():
            left = iter(self.source(self.epoch))
            next(itertools.islice(left, self.batch, self.batch), None)
        while not self.finished:
            if isinstance(left, Epoch) and self.gather_several(left):
                continue
            batch = self.interrupts.while_whole(next, left, _NO_BATCH)
            if batch is _NO_BATCH:
                self.take_steps()
                self.end_epoch()
                return
            x, y, weights = self.padded(batch)
            self.targets.add(x, y, self.padded.usual)
            self.gather(Gathered(x, y, weights if self.padded.weighted else None), self.padded.form)

    def gather_several(self, left: Epoch) -> bool:
        """Several batches at once, where there are such, like the latest one and like no other."""
        alike = self.form in self.calls.steady and left.size == self.padded.examples
        if self.gathered or not alike:
            return False
        several = self.interrupts.while_whole(left.several, self.room)
        if several is None:
            return False
        (x, y), steps = several
        self.targets.add(x, y, usual=True)
        self.gather(Gathered(x, y, None, steps), self.form)
        return True

    def gather(self, batches: Gathered, form: Form | None) -> None:
        """Keeps them until a call is full, or batches of another form come."""
        if form is not self.form:
            self.take_steps()
        self.form = form
        self.gathered.append(batches)
        self.steps_gathered += batches.steps
        if self.room <= 0:
            self.take_steps()

    def take_steps(self) -> None:
        """With all batches that were gathered."""
        if not self.gathered:
            return
        self.state, losses = self.calls.run(self.state, self.gathered, self.form)
        done, self.gathered, self.steps_gathered = self.steps_gathered, [], 0
        self.unread += losses
        self.steps_unread += done
        self.step += done
        self.batch += done
        if self.progress is not None:
            self.progress.stepped()
        if self.at_look:
            self.look()
        elif self.steps_unread == MOST_UNREAD:
            self.read()

    def end_epoch(self) -> None:
        if self.batch == 0:
            raise ValueError(f"batches: takes at least one per epoch, got none in {self.epoch + 1}")
        self.read()
        if self.steps_per_epoch is None:
            self.steps_per_epoch = self.batch
        self.epoch += 1
        self.batch = 0
        if self.at_look:
            self.look()
        elif self.progress is not None:
            self.progress.looked()

    def read(self) -> None:
        """Brings the losses of the latest steps, all of one epoch, to the host."""
        self.targets.check()
        known = len(self.history.loss)
        losses = [np.asarray(loss).reshape(-1, 2)[:steps] for loss, steps in self.unread]
        self.history = self.history.with_steps(self.epoch, losses)
        self.unread, self.steps_unread = [], 0
        bad = np.flatnonzero(~np.isfinite(self.history.loss[known:]))
        if self.stop_on_nan and bad.size:
            step = known + int(bad[0])
            batch = step - int(np.argmax(self.history.epoch == self.epoch))
            raise FloatingPointError(
                f"the loss is {self.history.loss[step]} at step {step + 1}, batch {batch + 1} of "
                f"epoch {self.epoch + 1}"
            )

    def look(self) -> None:
        """What the host does between steps; nothing, if it has done so since the last one."""
        if self.looked == self.step:
            return
        self.read()
        with self.interrupts.allowed():
            run = self.run
            if self.evaluate is not None:
                values = self.evaluate(run.params if run.ema is None else run.ema)
                history = run.history.with_evaluation(self.step, values)
                run = dataclasses.replace(run, history=history)
            stopped = any([callback(run) is True for callback in self.callbacks])
        # Noted when it is over: who goes on with a run that was interrupted here looks again.
        self.history, self.stopped, self.looked = run.history, stopped, self.step
        if self.progress is not None:
            self.progress.looked()
        self.save()

    def save(self) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        if self.store is None or self.saved == self.step:
            return
        self.saved = self.step
        position = Position(
            self.step, self.epoch, self.batch, self.padded.rows, self.stopped, self.looked
        )
        self.store.save(self.kept, dataclasses.asdict(self.history), position)

    @property
    def kept(self) -> dict[str, Tree]:
        """The arrays that a checkpoint holds."""
        params, state = self.state.params(self.rest), self.state
        kept = {"params": params, "opt_state": state.opt_state, "key": self.key}
        return kept if state.average is None else kept | {"ema": state.average}

    def begin(self, resume: bool) -> None:
        """Goes to where the latest checkpoint was written, if there is one."""
        assert self.store is not None
        if self.store.latest is None:
            return
        if not resume:
            raise ValueError(
                f"checkpoints: {self.store.folder} has a checkpoint of step {self.store.latest}; "
                "resume=True goes on from it, another folder begins anew"
            )
        kept, arrays, position = self.store.restore(self.kept)
        self.state, self.rest = self.split(
            kept["params"], kept["opt_state"], position.step, kept.get("ema")
        )
        self.step = self.saved = position.step
        self.looked = position.looked
        self.epoch, self.batch, self.stopped = position.epoch, position.batch, position.stopped
        self.padded.rows = position.rows
        self.history = History.of(arrays)
