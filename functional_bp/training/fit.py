"""The training loop: an optax optimiser run over batches."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import optax
from jax import Array

from ..checks import (
    ModelError,
    arrays_of,
    flag,
    floating,
    function,
    number,
    path_of,
    random_key,
    sequence,
    told,
    whole,
)
from ..freezing import Frozen
from ..layer import Layer
from ..losses.definition import Loss
from ..meshes import on_one_device
from ..quantities.gradients import Method
from ..recursion import Model, paired
from .batches import Batches, Padded, each_epoch, with_first
from .calls import Calls
from .checkpoints import Checkpoints
from .evaluation import Metric, Targets, check_metrics, evaluate
from .history import Run
from .interrupts import Interrupts
from .loop import MOST_UNREAD, Training
from .progress import Progress, is_watched
from .run_identity import kinds_of
from .steps import Setting, identity, programs

Tree = Any


def fit(
    model: Model,
    loss: Loss | None,
    params: Tree,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    key: Array | None = None,
    method: Method = "manual",
    frozen: Frozen = None,
    microbatch: int | None = None,
    steps_per_call: int | None = None,
    compute_dtype: Any = None,
    ema: float | None = None,
    evaluation: Batches | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Callable[[Run], Any]] = (),
    every: int | None = None,
    stop_on_nan: bool = True,
    progress: bool | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Run:
    """Trains a model: one step of the optimiser for each batch.

        g = ∂/∂θ Σₙ wₙ Cₙ / Σₙ wₙ,    θ ← θ + optimiser(g)

    Args:
      model, loss: a layer and a loss; or ``cost(params, x, y)`` of one example, and None.
      params: the parameters to start from. They are copied; the caller's stay usable.
      batches: an iterable of batches (x, y) or (x, y, weights), run through once per epoch, or a
        function ``epoch -> iterable``, such as ``bp.minibatches`` makes. A smaller batch is filled
        up with examples of weight 0 rather than compiled for, unless a layer mixes examples.
        What layers keep as state, such as running averages, is renewed with each batch.
        (Batch norm takes no batch of a single number for each feature: see to the last one.)
      optimizer: any ``optax.GradientTransformation``. Schedules and clipping are optax's:
        ``optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))``. It is given what
        some ask for besides: the cost, the function, gradients elsewhere. ``optax.lookahead``
        begins with equal parameters; the slow ones are ``run.opt_state.slow``. What
        ``optax.contrib.schedule_free`` has learnt is
        ``optax.contrib.schedule_free_eval_params(run.opt_state, run.params)``.
      epochs, steps: how long to train; one of the two.
      key: for the noise of layers such as dropout: step i draws from ``fold_in(key, i)``. Without
        a key there is no noise, and a ``UserWarning`` if a layer of the model is random.
      method, frozen, microbatch: as in ``bp.value_and_grad``. The optimiser never meets a frozen
        parameter, so its weight decay does not either. A layer's state is renewed all the same: to
        keep running averages too, put ``layer.inference()`` in its place. With such layers there
        are no microbatches.
      steps_per_call: how many steps go into one call of the compiled program at most; None for as
        many as 1 MiB of batches holds, up to 32, and 0.05 s are enough for. A call costs the host
        some tens of microseconds, which is more than a small network's step. The run is the same,
        bit for bit, whatever the number. No call goes past a look, and no batch is asked for that
        is not trained with. One at a time go steps with arrays that lie on a device already or are
        split among devices, and if None, all steps that are not on a CPU; their program has no loop
        in it, and its last bit may be another.
      compute_dtype: the dtype, such as ``"bfloat16"``, in which the model goes forward and back.
        Parameters and floating-point inputs are cast to it. Parameters, their gradients, the
        optimiser, running averages, targets, the loss and evaluations stay as they are. (A loss
        with parameters, and a cost, are cast like the model.) None for no cast.
      ema: decay d, from 0 and below 1, of moving averages of the parameters after each step:
        m ← d m + (1 − d) θ, and ``run.ema`` is m / (1 − dⁱ) after step i, as in ``optax.ema``.
        Evaluations are then of these averages. State, such as running averages, is in them as it
        is now, and frozen parameters in their places. None for no averages.
      evaluation: batches to evaluate at every look at the run.
      metrics: what to evaluate besides the loss, as in ``bp.evaluate``; with ``evaluation`` only.
      callbacks: functions of the ``bp.Run`` so far, called at every look. Its arrays are good
        during the call alone: training uses their buffers again. One that returns True ends the
        run.
      every: steps between looks; None to look at the end of each epoch. A look reads the losses,
        evaluates, calls the callbacks and writes a checkpoint. After the last step there is one.
      stop_on_nan: whether a loss that is not finite ends the run. It is found at the next look,
        or within 256 steps: no step waits for its loss.
      progress: whether to show epoch, steps, rate, time left, latest cost and latest evaluation on
        stderr; None to do so where that is a terminal or a notebook. It is a bar of tqdm where
        tqdm is installed, else a line for each epoch and every ten seconds.
      checkpoints: a folder for checkpoints (the extra ``checkpoint``). The two latest are kept. A
        process killed at any moment leaves the last complete one. After Ctrl-C the run writes a
        checkpoint of its last step, then raises ``KeyboardInterrupt``; a second Ctrl-C ends it at
        once. Only one run may write to a folder at a time.
      resume: whether to go on from the latest checkpoint in the folder, if it has one. Parameters,
        optimiser, noise and history become those of a run that never stopped, bit for bit, if
        ``batches`` gives each epoch the same batches again. Another model, loss, kind of optimiser,
        key or choice of frozen parameters is refused, and averages if the run had none, or none if
        it had. This includes functions that have the same name but different code. Another learning
        rate or option of the optimiser, batch size, order of the batches, method, microbatch, decay
        of the averages, ``compute_dtype`` or version of JAX is accepted with a ``UserWarning``.
        To compare, the first batch of the first epoch is asked for once more.

    Returns:
      The ``bp.Run``.

    Raises:
      FloatingPointError: where a loss is not finite, with its step.
      KeyboardInterrupt: after Ctrl-C.
      ModelError: where a batch does not fit the model; for an optimiser that takes gradients of
        single examples, and ``lookahead`` or ``sam`` inside of another; for metrics without an
        evaluation; where a checkpoint is of another run, with the file and every difference.
      OSError: where a checkpoint cannot be written, with its step and the latest complete one.
      ValueError: for an argument out of range; for an iterator that can be run through only once
        and more than one epoch; for a checkpoint that cannot be read; for a folder that has
        checkpoints if ``resume`` is False, or in which another run writes.

    Example:
      >>> model, loss = bp.dense(1), bp.losses.squared_error
      >>> params = model.init(jax.random.key(0), jnp.ones(1))
      >>> x = jnp.linspace(-1, 1, 64)[:, None]
      >>> batches = bp.minibatches(x, 3 * x + 1, 16, seed=0)
      >>> run = bp.fit(model, loss, params, batches, optax.sgd(0.5), epochs=20)
      >>> print(run.params["weight"].round(2), run.params["bias"].round(2))
      [[3.]] [1.]
    """
    model, loss = paired(model, loss)
    counts = {"epochs": epochs, "steps": steps, "every": every, "microbatch": microbatch}
    _check_run(optimizer, counts | {"steps_per_call": steps_per_call}, key, ema, compute_dtype)
    flags = {"stop_on_nan": stop_on_nan, "progress": progress is None or progress, "resume": resume}
    _check_looks(loss, evaluation, metrics, callbacks, checkpoints, flags)
    arrays_of("params", params)
    if key is None:
        _warn_of_noise(model)
    options: Any = {"method": method, "frozen": frozen, "microbatch": microbatch}
    options |= {"ema": ema, "compute_dtype": compute_dtype}
    setting = Setting.of(model, loss, params, optimizer, **options)
    state, rest = setting.begin(params)
    if evaluation is not None:
        _warn_of_schedule_free(state.opt_state)
    training = Training(
        calls=Calls(
            programs=programs(setting),
            rest=rest,
            key=key,
            given=steps_per_call,
            bound=min(every or MOST_UNREAD, MOST_UNREAD),
            in_loops=on_one_device((state, rest), None if steps_per_call else "cpu"),
        ),
        split=setting.split,
        averages=programs(setting).averages,
        source=each_epoch(batches, epochs),
        state=state,
        rest=rest,
        key=key,
        steps_per_epoch=len(batches) if isinstance(batches, Sized) else None,
        padded=Padded(fill=not model.mixes_examples),
        targets=Targets(model, loss, params),
        epochs=epochs,
        steps=steps,
        every=every,
        stop_on_nan=stop_on_nan,
        callbacks=tuple(callbacks),
        interrupts=Interrupts(hold=checkpoints is not None),
        evaluate=_over(evaluation, model, loss, metrics),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(training.interrupts)
        if checkpoints is not None:
            _keep(stack, training, setting, batches, checkpoints)
            training.begin(resume)
        if is_watched() if progress is None else progress:
            training.progress = stack.enter_context(Progress(training))
        training.train()
    return training.run


def _keep(
    stack: contextlib.ExitStack,
    training: Training,
    setting: Setting,
    batches: Batches,
    folder: str | os.PathLike[str],
) -> None:
    """Has a run keep checkpoints in a folder."""
    first, training.source = with_first(batches, training.source)
    padded = None if first is None else Padded(fill=False)(first)
    is_now = identity(setting, training.state, training.rest, training.key, padded)
    training.store = stack.enter_context(Checkpoints(folder, is_now))


def _warn_of_schedule_free(opt_state: Tree) -> None:
    if "ScheduleFreeState" in kinds_of(opt_state):
        warnings.warn(
            "evaluation: is of run.params; what optax.contrib.schedule_free has learnt is "
            "optax.contrib.schedule_free_eval_params(run.opt_state, run.params), which a callback "
            "can evaluate by bp.evaluate",
            UserWarning,
            stacklevel=3,
        )


def _check_run(
    optimizer: Any, counts: dict[str, Any], key: Any, ema: Any, compute_dtype: Any
) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ModelError(f"optimizer: takes an optax.GradientTransformation, got {told(optimizer)}")
    epochs, steps = counts["epochs"], counts["steps"]
    if (epochs is None) == (steps is None):
        raise ValueError(f"takes epochs or steps, one of the two; got {epochs=}, {steps=}")
    for name, value in counts.items():
        if value is not None:
            whole(name, value, 0 if name in ("epochs", "steps") else 1)
    random_key("key", key)
    if ema is not None:
        number("ema", ema, least=0, below=1)
    if compute_dtype is not None:
        floating("compute_dtype", compute_dtype)


def _check_looks(
    loss: Loss,
    evaluation: Any,
    metrics: Any,
    callbacks: Any,
    checkpoints: Any,
    flags: dict[str, Any],
) -> None:
    check_metrics(metrics, loss)
    if metrics and evaluation is None:
        raise ModelError(
            "metrics: takes them with evaluation=, the batches that they are of, got "
            f"{', '.join(metrics)} and no evaluation"
        )
    for name, given in flags.items():
        flag(name, given)
    for callback in sequence("callbacks", callbacks):
        function("callbacks", callback)
    if checkpoints is not None:
        path_of("checkpoints", checkpoints)


def _warn_of_noise(model: Layer) -> None:
    """Says which layers would draw from a key."""
    random: list[str] = []

    def noted(layer: Layer, place: str) -> Layer:
        if layer.random:
            where = f"{model.name.partition('(')[0]}{place} " if place else ""
            random.append(f"{where}{layer.name}")
        return layer

    model.on_layers(noted)
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        warnings.warn(
            f"key: without one, nothing is random in {', '.join(random[:3])}{more}; give "
            "key=jax.random.key(0), or put layer.inference() in place of the layer",
            UserWarning,
            stacklevel=3,  # the caller of fit
        )


def _over(
    evaluation: Batches | None, model: Layer, loss: Loss, metrics: Mapping[str, Metric] | None
) -> Callable[[Tree], dict[str, float]] | None:
    """``params -> `` loss and metrics over the batches of the evaluation, if there is one."""
    if evaluation is None:
        return None
    each_epoch(evaluation, epochs=2)  # it is needed at every look
    measure = evaluate(model, loss, metrics=metrics)
    return lambda params: measure(params, evaluation)
