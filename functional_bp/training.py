"""The training loop: an optax optimiser run over batches, and a model's evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .batches import Batch, Batches, Padded, each_epoch, with_first
from .checkpoint import Checkpoints, Position
from .checks import (
    ModelError,
    abstract,
    arrays_of,
    flag,
    function,
    path_of,
    random_key,
    sequence,
    told,
    whole,
)
from .freezing import Frozen, frozen_leaves, merged, trainable
from .gradients import value_and_grad
from .interrupts import Interrupts
from .layer import Layer, place
from .losses import Loss
from .program import contents_of, program_of
from .recursion import check_model
from .run_identity import Identity, described_run, described_settings, hyperparameters

Tree = Any
Metric = Callable[[Tree, Tree], Array]

State = tuple[Tree, Tree, Array]  # the trained parameters, the optimiser's state, the step

_NO_BATCH: Any = object()
_MOST_UNREAD = 256  # steps that may pass before the host reads their losses


@dataclass(frozen=True)
class History:
    """What a run recorded, as NumPy arrays.

    Attributes:
      loss: ``(steps,)``, the mean cost of each step's batch, before the step.
      weight: ``(steps,)``, Σₙ wₙ of that batch: its number of examples, if they have no weights.
      epoch: ``(steps,)``, the epoch that the step belongs to, from 0.
      evaluated: ``(evaluations,)``, the number of steps done at each evaluation.
      evaluation: ``"loss"`` and each metric over the evaluation data, ``(evaluations,)`` each.
    """

    loss: np.ndarray
    weight: np.ndarray
    epoch: np.ndarray
    evaluated: np.ndarray
    evaluation: dict[str, np.ndarray]

    @property
    def epoch_loss(self) -> np.ndarray:
        """``(epochs,)``, the mean cost over each epoch's examples, Σ w C / Σ w."""
        cost = np.bincount(self.epoch, self.loss * self.weight)
        weight = np.bincount(self.epoch, self.weight)
        return cost / np.where(weight == 0, 1, weight)

    def _with_steps(self, epoch: int, losses: Sequence[Array]) -> History:
        """With further steps of an epoch; each has its loss and weight in one array."""
        loss, weight = np.array([np.asarray(loss) for loss in losses], float).reshape(-1, 2).T
        return dataclasses.replace(
            self,
            loss=np.append(self.loss, loss),
            weight=np.append(self.weight, weight),
            epoch=np.append(self.epoch, np.full(len(losses), epoch)),
        )

    def _with_evaluation(self, step: int, values: Mapping[str, float]) -> History:
        before = self.evaluation
        return dataclasses.replace(
            self,
            evaluated=np.append(self.evaluated, step),
            evaluation={k: np.append(before.get(k, np.zeros(0)), v) for k, v in values.items()},
        )


_UNTRAINED = History(np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros(0, int), {})


@dataclass(frozen=True)
class Run:
    """A training run as far as it has come: what ``bp.fit`` returns and gives to callbacks.

    Attributes:
      params: the parameters, frozen ones in their places.
      opt_state: the optimiser's state.
      step: steps done.
      epoch: epochs completed.
      history: losses and evaluations so far.
    """

    params: Tree
    opt_state: Tree
    step: int
    epoch: int
    history: History


def evaluate(
    model: Layer, loss: Loss, *, metrics: Mapping[str, Metric] | None = None
) -> Callable[[Tree, Batches], dict[str, float]]:
    """The mean cost, and the means of metrics, over batches; without noise.

    Args:
      metrics: by name, functions of a batch's outputs and targets that give one value per
        example: ``{"accuracy": lambda a, y: a.argmax(-1) == y}``.

    Returns:
      ``fn(params, batches) -> {"loss": Σₙ wₙ Cₙ / Σₙ wₙ, name: Σₙ wₙ mₙ / Σₙ wₙ, …}``; batches as
      ``bp.fit`` takes them. It compiles by itself.

    Raises:
      ModelError: for what is no function, when called with what does not fit the model, and for a
        metric that does not give one value per example.
      ValueError: when called with no batches.
    """
    check_model(model, loss)
    _check_metrics(metrics)
    added = _added(model, loss, tuple((metrics or {}).items()))

    def fn(params: Tree, batches: Batches) -> dict[str, float]:
        zero = jnp.zeros(())
        sums: Tree = (dict.fromkeys(["loss", *(metrics or {})], zero), zero)
        targets = _Targets(model, loss, params)
        padded = Padded(fill=not model.mixes_examples)
        for batch in each_epoch(batches)(0):
            x, y, weights = padded(batch)
            targets.add(x, y, padded.usual)
            sums = added(sums, params, x, y, weights)
        targets.check()
        totals, weight = jax.device_get(sums)
        if weight == 0:
            raise ValueError("batches: takes examples to evaluate, got none with a weight above 0")
        return {name: float(total / weight) for name, total in totals.items()}

    return fn


def fit(
    model: Layer,
    loss: Loss,
    params: Tree,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    key: Array | None = None,
    method: str = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
    evaluation: Batches | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Callable[[Run], Any]] = (),
    every: int | None = None,
    stop_on_nan: bool = True,
    progress: bool = False,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Run:
    """Trains a model: one step of the optimiser for each batch.

        g = ∂/∂θ Σₙ wₙ Cₙ / Σₙ wₙ,    θ ← θ + optimiser(g)

    Args:
      params: the parameters to start from. They are copied; the caller's stay usable.
      batches: an iterable of batches (x, y) or (x, y, weights), run through once per epoch, or a
        function ``epoch -> iterable``, such as ``bp.minibatches`` makes. A smaller batch is filled
        up with examples of weight 0 rather than compiled for, unless a layer mixes examples.
      optimizer: any ``optax.GradientTransformation``. Schedules and clipping are optax's:
        ``optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))``.
      epochs, steps: how long to train; one of the two.
      key: for the noise of layers such as dropout: step i draws from ``fold_in(key, i)``. Without
        a key there is no noise.
      method, frozen, microbatch: as in ``bp.value_and_grad``. The optimiser never meets a frozen
        parameter, so its weight decay does not either.
      evaluation: batches to evaluate at every look at the run.
      metrics: what to evaluate besides the loss, as in ``bp.evaluate``.
      callbacks: functions of the ``bp.Run`` so far, called at every look. Its arrays are good
        during the call alone: training uses their buffers again. One that returns True ends the
        run.
      every: steps between looks; None to look at the end of each epoch. A look reads the losses,
        evaluates, calls the callbacks and writes a checkpoint. After the last step there is one.
      stop_on_nan: whether a loss that is not finite ends the run. It is found at the next look,
        or within 256 steps: no step waits for its loss.
      progress: whether to show a progress bar, where tqdm is installed.
      checkpoints: a folder for checkpoints (the extra ``checkpoint``). The two latest are kept. A
        process killed at any moment leaves the last complete one. One that Ctrl-C ends leaves one
        of its last step before ``KeyboardInterrupt`` goes on; a second Ctrl-C ends it at once. One
        run at a time writes in a folder.
      resume: whether to go on from the latest checkpoint in the folder, if it has one. Parameters,
        optimiser, noise and history become those of a run that never stopped, bit for bit, if
        ``batches`` gives each epoch the same batches again. Another model, loss, kind of optimiser,
        key or choice of frozen parameters is refused, functions of the same name but another
        content included. Another learning rate or option of the optimiser, batch size, order of
        the batches, method, microbatch or version of JAX is taken, and said by a ``UserWarning``.
        To compare, the first batch of the first epoch is asked for once more.

    Returns:
      The ``bp.Run``.

    Raises:
      FloatingPointError: where a loss is not finite, with its step.
      KeyboardInterrupt: after Ctrl-C.
      ModelError: where a batch does not fit the model, and where a checkpoint is of another run,
        with the file and every difference.
      OSError: where a checkpoint cannot be written, with its step and the latest complete one.
      ValueError: for an argument out of range; for an iterator that can be run through only once
        and more than one epoch; for a checkpoint that cannot be read; for a folder that has
        checkpoints if ``resume`` is False, or in which another run writes.
    """
    check_model(model, loss)
    _check_arguments(optimizer, epochs, steps, every, microbatch, key)
    _check_metrics(metrics)
    for callback in sequence("callbacks", callbacks):
        function("callbacks", callback)
    flags_given = {"stop_on_nan": stop_on_nan, "progress": progress, "resume": resume}
    for name, given in flags_given.items():
        flag(name, given)
    if checkpoints is not None:
        path_of("checkpoints", checkpoints)
    arrays_of("params", params)
    frozen = frozen_leaves(params, frozen)
    flags = (jax.tree.structure(frozen), tuple(jax.tree.leaves(frozen)))
    params = _copied(params)
    opt_state = _copied(optimizer.init(trainable(params, frozen)))
    state, rest = _split(params, frozen, opt_state, 0)
    training = _Training(
        model=model,
        loss=loss,
        advance=_advance(model, loss, optimizer, method, flags, microbatch),
        source=each_epoch(batches, epochs),
        state=state,
        rest=rest,
        frozen=frozen,
        key=key,
        padded=Padded(fill=not model.mixes_examples),
        targets=_Targets(model, loss, params),
        epochs=epochs,
        steps=steps,
        every=every,
        stop_on_nan=stop_on_nan,
        callbacks=tuple(callbacks),
        interrupts=Interrupts(hold=checkpoints is not None),
    )
    if evaluation is not None:
        each_epoch(evaluation, epochs=2)  # it is needed at every look
        measure = evaluate(model, loss, metrics=metrics)
        training.evaluate = lambda params: measure(params, evaluation)
    with contextlib.ExitStack() as stack:
        stack.enter_context(training.interrupts)
        if checkpoints is not None:
            halves = _halves(model, loss, optimizer, method, flags, None)
            settings = {"method": method, "microbatch": str(microbatch or "none")}
            identity = training.identity(batches, halves, settings)
            training.store = stack.enter_context(Checkpoints(checkpoints, identity))
            training.begin(resume)
        if progress:
            training.bar = _progress_bar(stack, training, batches)
        training.train()
    return training.run


@dataclass(kw_only=True)
class _Training:
    """A run under way: its arrays, its place in the data, and what the host knows of it."""

    model: Layer
    loss: Loss
    advance: Callable[..., tuple[Tree, Array]]
    source: Callable[[int], Iterable[Batch]]
    state: State
    rest: Tree
    frozen: Tree
    key: Array | None
    padded: Padded
    targets: _Targets
    epochs: int | None
    steps: int | None
    every: int | None
    stop_on_nan: bool
    callbacks: tuple[Callable[[Run], Any], ...]
    interrupts: Interrupts
    evaluate: Callable[[Tree], dict[str, float]] | None = None
    store: Checkpoints | None = None
    bar: Any = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    looked: int = 0
    saved: int = 0
    stopped: bool = False
    unread: list[Array] = field(default_factory=list)
    history: History = _UNTRAINED

    @property
    def run(self) -> Run:
        trained, opt_state, _ = self.state
        params = merged(trained, self.rest)
        return Run(params, opt_state, self.step, self.epoch, self.history)

    @property
    def at_look(self) -> bool:
        """Whether the run stands where it is looked at."""
        return self.batch == 0 if self.every is None else self.step % self.every == 0

    @property
    def finished(self) -> bool:
        over = self.epochs is not None and self.epoch >= self.epochs
        return self.stopped or over or (self.steps is not None and self.step >= self.steps)

    def train(self) -> None:
        try:
            if self.at_look:  # a run that was interrupted at a look has it before it
                self.look()
            while not self.finished:
                for batch in self.batches_left():
                    self.take_step(batch)
                    if self.finished:
                        break
                else:
                    self.end_epoch()
            self.look()
        except KeyboardInterrupt:
            if self.store is not None and self.interrupts.whole:
                self.read()
                self.save()
            raise

    def batches_left(self) -> Iterator[Batch]:
        """Those of the epoch, each fetched while nothing is in the making."""
        with self.interrupts.allowed():
            left = itertools.islice(self.source(self.epoch), self.batch, None)
        while True:
            with self.interrupts.allowed():
                batch = next(left, _NO_BATCH)
            if batch is _NO_BATCH:
                return
            yield batch

    def take_step(self, batch: Batch) -> None:
        x, y, weights = self.padded(batch)
        self.targets.add(x, y, self.padded.usual)
        self.state, loss = self.advance(self.state, self.rest, x, y, weights, self.key)
        self.unread.append(loss)
        self.step += 1
        self.batch += 1
        if self.bar is not None:
            self.bar.update()
        if self.at_look:
            self.look()
        elif len(self.unread) == _MOST_UNREAD:
            self.read()

    def end_epoch(self) -> None:
        if self.batch == 0:
            raise ValueError(f"batches: takes at least one per epoch, got none in {self.epoch + 1}")
        self.read()
        self.epoch += 1
        self.batch = 0
        if self.at_look:
            self.look()

    def read(self) -> None:
        """Brings the losses of the latest steps, all of one epoch, to the host."""
        self.targets.check()
        known = len(self.history.loss)
        self.history = self.history._with_steps(self.epoch, self.unread)
        self.unread = []
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
                history = run.history._with_evaluation(self.step, self.evaluate(run.params))
                run = dataclasses.replace(run, history=history)
            if self.bar is not None:
                self.bar.set_postfix(loss=f"{run.history.epoch_loss[-1]:.4g}")
            stopped = any([callback(run) is True for callback in self.callbacks])
        # Noted when it is over: who goes on with a run that was interrupted here looks again.
        self.history, self.stopped, self.looked = run.history, stopped, self.step
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
        return {"params": self.run.params, "opt_state": self.state[1], "key": self.key}

    def identity(self, batches: Batches, halves: _Halves, settings: dict[str, str]) -> Identity:
        """What the run is, as far as it can be known: all of it, if there is a batch.

        What a step computes is traced for two examples, so that batches may be of another size.
        """
        run = described_run(self.model, self.loss, self.kept, self.rest)
        fingerprints = {"hyperparameters": hyperparameters(self.state[1])}
        batch, self.source = with_first(batches, self.source)
        if batch is None:
            return Identity(run, settings, fingerprints)
        first = Padded(fill=False)(batch)
        x, y, weights = first if self.model.mixes_examples else jax.tree.map(_two_of, first)
        of_step = {"x": x, "y": y, "weights": weights, "key": self.key}
        trained, opt_state, _ = self.state
        gradient, results = program_of(halves.gradient, trained, self.rest, of_step)
        update, _ = program_of(halves.update, trained, self.rest, opt_state, of_step, *results)
        return Identity(
            run,
            settings | described_settings(self.model, first),
            fingerprints
            | {"gradient": gradient, "update": update, "first batch": contents_of(first)},
        )

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
        self.state, self.rest = _split(
            kept["params"], self.frozen, kept["opt_state"], position.step
        )
        self.step = self.saved = position.step
        self.looked = position.looked
        self.epoch, self.batch, self.stopped = position.epoch, position.batch, position.stopped
        self.padded.rows = position.rows
        self.history = _history(arrays)


def _split(params: Tree, frozen: Tree, opt_state: Tree, step: int) -> tuple[State, Tree]:
    """A training state, and the parameters that are not in it."""
    rest = trainable(params, jax.tree.map(operator.not_, frozen))
    return (trainable(params, frozen), opt_state, jnp.asarray(step)), rest


def _history(arrays: dict[str, np.ndarray]) -> History:
    of_run = {name: array for name, array in arrays.items() if "." not in name}
    evaluation = {
        name.removeprefix("evaluation."): array
        for name, array in arrays.items()
        if name not in of_run
    }
    return dataclasses.replace(_UNTRAINED, **of_run, evaluation=evaluation)


def _two_of(leaf: Array) -> jax.ShapeDtypeStruct:
    """The shape of a batch's array, were it of two examples."""
    return abstract((2, *leaf.shape[1:]), leaf.dtype)


def _copied(tree: Tree) -> Tree:
    """Every leaf in a buffer of its own, which may be given away."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


# These functions are kept, so that a second run of the same model does not compile or trace.


@functools.lru_cache(maxsize=32)
def _applied(model: Layer) -> Any:
    """``model.apply``, to be traced and never run."""
    return jax.jit(model.apply)


@functools.lru_cache(maxsize=32)
def _added(
    model: Layer, loss: Loss, metrics: tuple[tuple[str, Metric], ...]
) -> Callable[..., Tree]:
    """``(sums, params, x, y, weights) -> sums``: ({name: Σ w m}, Σ w) with a batch added."""

    @jax.jit
    def added(sums: Tree, params: Tree, x: Tree, y: Tree, weights: Array) -> Tree:
        a = model.apply(params, x)
        with place(f"{loss.name}:"):
            loss.check(a, y)
        values = {"loss": loss.costs(a, y)} | {name: metric(a, y) for name, metric in metrics}
        for name, value in values.items():
            if jnp.shape(value) != weights.shape:
                raise ModelError(
                    f"metrics: {name} takes (outputs, y) to one value per example, "
                    f"{weights.shape}; got {jnp.shape(value)}"
                )
        here = {name: weights @ value.astype(weights.dtype) for name, value in values.items()}
        return jax.tree.map(jnp.add, sums, (here, weights.sum()))

    return added


@functools.lru_cache(maxsize=32)
def _advance(
    model: Layer,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    method: str,
    frozen: tuple[Any, tuple[bool, ...]],
    microbatch: int | None,
) -> Callable[..., tuple[State, Array]]:
    """The compiled step: ``(state, rest, x, y, weights, key) -> (state, [loss, Σ w])``.

    Args:
      frozen: a tree of bools as its structure and leaves, which can be looked up.
    """
    halves = _halves(model, loss, optimizer, method, frozen, microbatch)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        state: State, rest: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
    ) -> tuple[State, Array]:
        trained, opt_state, step = state
        key = None if key is None else jax.random.fold_in(key, step)
        batch = {"x": x, "y": y, "weights": weights, "key": key}
        cost, gradient = halves.gradient(trained, rest, batch)
        trained, opt_state = halves.update(trained, rest, opt_state, batch, cost, gradient)
        return (trained, opt_state, step + 1), jnp.stack([cost, weights.sum().astype(cost.dtype)])

    return advance


class _Halves(NamedTuple):
    """A step's two halves.

    Attributes:
      gradient: ``(trained, rest, batch) -> (cost, gradient)``.
      update: ``(trained, rest, opt_state, batch, cost, gradient) -> (trained, opt_state)``.
    """

    gradient: Callable[..., tuple[Array, Tree]]
    update: Callable[..., tuple[Tree, Tree]]


def _halves(
    model: Layer,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    method: str,
    frozen: tuple[Any, tuple[bool, ...]],
    microbatch: int | None,
) -> _Halves:
    frozen = jax.tree.unflatten(*frozen)
    value = value_and_grad(model, loss, method=method, frozen=frozen, microbatch=microbatch)
    differentiable = value_and_grad(model, loss, method="autodiff", frozen=frozen)
    optimizer = optax.with_extra_args_support(optimizer)

    def gradient(trained: Tree, rest: Tree, batch: Tree) -> tuple[Array, Tree]:
        return value(merged(trained, rest), **batch)

    def update(
        trained: Tree, rest: Tree, opt_state: Tree, batch: Tree, cost: Array, gradient: Tree
    ) -> tuple[Tree, Tree]:
        def value_fn(
            trained: Tree,
            x: Tree = batch["x"],
            y: Tree = batch["y"],
            weights: Array = batch["weights"],
            key: Any = batch["key"],
        ) -> Array:
            return differentiable(merged(trained, rest), x, y, weights=weights, key=key)[0]

        # What some optimisers ask for besides: plateaus the cost, line searches the function,
        # curvature the batch.
        extra = {**batch, "value": cost, "grad": gradient, "value_fn": value_fn}
        updates, opt_state = optimizer.update(gradient, opt_state, trained, **extra)
        return optax.apply_updates(trained, updates), opt_state

    return _Halves(gradient, update)


class _Targets:
    """Looks into the values of targets, such as class ids, which a compiled step cannot.

    It does so at once where a batch is not as those before it. The rest it looks at together when
    the losses are read, because one by one they take a fifth of a small network's step. Targets
    that are on a device already stay there.
    """

    def __init__(self, model: Layer, loss: Loss, params: Tree) -> None:
        self.model, self.loss = model, loss
        self.params = jax.eval_shape(lambda: params)
        self.outputs: Tree = None
        self.unseen: list[Tree] = []

    def add(self, x: Tree, y: Tree, usual: bool) -> None:
        if not usual:
            self.check()
            self.outputs = _applied(self.model).eval_shape(self.params, x)
            self.unseen = [y]
            self.check()
        elif _has_ids(y):
            self.unseen.append(y)

    def check(self) -> None:
        count, targets, self.unseen = len(self.unseen), self.unseen, []
        if not count:
            return
        y = jax.tree.map(lambda *leaves: np.concatenate(leaves), *targets)
        outputs = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((count * a.shape[0], *a.shape[1:]), a.dtype),  # type: ignore[no-untyped-call]
            self.outputs,
        )
        with place(f"{self.loss.name}:"):
            self.loss.check(outputs, y)


def _has_ids(y: Tree) -> bool:
    """Whether y is on the host and has whole numbers in it."""
    leaves = [y] if isinstance(y, np.ndarray) else jax.tree.leaves(y)
    return any(isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu" for leaf in leaves)


def _check_arguments(
    optimizer: Any,
    epochs: int | None,
    steps: int | None,
    every: int | None,
    microbatch: int | None,
    key: Array | None,
) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ModelError(f"optimizer: takes an optax.GradientTransformation, got {told(optimizer)}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"takes epochs or steps, one of the two; got {epochs=}, {steps=}")
    counts = {"epochs": epochs, "steps": steps, "every": every, "microbatch": microbatch}
    for name, value in counts.items():
        if value is not None:
            whole(name, value, 0 if name in ("epochs", "steps") else 1)
    random_key("key", key)


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping | None):
        raise ModelError(f"metrics: takes a dict of functions by name, got {told(metrics)}")
    for name, metric in (metrics or {}).items():
        function(f"metrics: {name}", metric)


def _progress_bar(stack: contextlib.ExitStack, training: _Training, batches: Batches) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    total = training.steps
    if training.epochs is not None and isinstance(batches, Sized):
        total = training.epochs * len(batches)
    return stack.enter_context(tqdm(total=total, initial=training.step, unit="step"))
