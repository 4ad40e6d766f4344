"""One step of training: the gradient of a batch, and what the optimiser makes of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ..checks import abstract
from ..freezing import frozen_leaves, merged, trainable, warn_if_none
from ..layer import Layer, renews
from ..losses.definition import Loss
from ..meshes import on_one_device
from ..quantities.gradients import Method, value_and_grad
from ..recursion import with_loss
from .optimizers import check_served, served
from .precision import in_dtype
from .program import contents_of, program_of
from .run_identity import Identity, described_run, described_settings, hyperparameters

Tree = Any


class State(NamedTuple):
    """What a step changes. Its buffers are given away at each step.

    Attributes:
      trained: the parameters that are trained, None elsewhere.
      running: the layers' state, such as running averages, None elsewhere.
      opt_state: the optimiser's state.
      step: steps done.
      average: the moving average of ``trained``, as optax keeps it; None without.
    """

    trained: Tree
    running: Tree
    opt_state: Tree
    step: Array
    average: optax.EmaState | None

    def params(self, rest: Tree) -> Tree:
        """All parameters, given those that are frozen."""
        return merged(self.trained, merged(self.running, rest))


class Setting(NamedTuple):
    """What a step computes, as values that can be looked up.

    Attributes:
      frozen: a tree of bools as its structure and leaves.
      ema: the decay of the parameters' moving average; None for none.
      compute_dtype: the name of the dtype of both passes; None for the parameters' own.
    """

    model: Layer
    loss: Loss
    optimizer: optax.GradientTransformation
    method: Method
    frozen: tuple[Any, tuple[bool, ...]]
    microbatch: int | None
    ema: float | None
    compute_dtype: str | None

    @classmethod
    def of(
        cls,
        model: Layer,
        loss: Loss,
        params: Tree,
        optimizer: optax.GradientTransformation,
        *,
        method: Method,
        frozen: Any,
        microbatch: int | None,
        ema: float | None,
        compute_dtype: Any,
    ) -> Setting:
        warn_if_none(params, frozen, 3)
        frozen = frozen_leaves(params, frozen)
        flags = (jax.tree.structure(frozen), tuple(jax.tree.leaves(frozen)))
        dtype = None if compute_dtype is None else jnp.dtype(compute_dtype).name
        decay = None if ema is None else float(ema)
        return cls(model, loss, optimizer, method, flags, microbatch, decay, dtype)

    def untrained(self, params: Tree) -> Tree:
        """True at parameters that are frozen or state."""
        return jax.tree.map(operator.or_, self.is_frozen, self.is_state(params))

    @property
    def is_frozen(self) -> Tree:
        return jax.tree.unflatten(*self.frozen)

    def is_state(self, params: Tree) -> Tree:
        return with_loss(self.model, self.loss).is_state(params)

    def begin(self, params: Tree) -> tuple[State, Tree]:
        """The state before the first step, in buffers of its own, and the frozen parameters."""
        params = _copied(params)
        trained = trainable(params, self.untrained(params))
        opt_state = _copied(served(self.optimizer).init(trained))
        check_served(self.optimizer, opt_state)
        average = None if self.ema is None else self.averaging(trained).init(trained)
        return self.split(params, opt_state, 0, average)

    def split(self, params: Tree, opt_state: Tree, step: int, average: Any) -> tuple[State, Tree]:
        """The state of a run, and the parameters that are not in it."""
        untrained, is_state = self.untrained(params), self.is_state(params)
        running = trainable(params, jax.tree.map(operator.not_, is_state))
        in_state = jax.tree.map(lambda u, s: s or not u, untrained, is_state)
        rest = trainable(params, in_state)
        trained = trainable(params, untrained)
        return State(trained, running, opt_state, jnp.asarray(step), average), rest

    def averaging(self, trained: Tree) -> optax.GradientTransformation:
        """optax's moving average, in float32 at least: of bfloat16 it would stand still."""
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(trained))
        return optax.ema(self.ema, debias=False, accumulator_dtype=dtype)

    def averages(self, state: State, rest: Tree) -> Tree:
        """The parameters, with the debiased average of those that are trained."""
        average: Any = state.average
        debiased = optax.tree.bias_correction(average.ema, self.ema, average.count)
        begun = average.count > 0
        averages = jax.tree.map(
            lambda p, mean: jnp.where(begun, mean, p).astype(p.dtype), state.trained, debiased
        )
        return state._replace(trained=averages).params(rest)


class Halves(NamedTuple):
    """A step's two halves.

    Attributes:
      gradient: ``(params, batch) -> (cost, running, gradient)``.
      update: ``(params, trained, opt_state, batch, cost, gradient) -> (trained, opt_state)``.
    """

    gradient: Callable[..., tuple[Array, Tree, Tree]]
    update: Callable[..., tuple[Tree, Tree]]


def halves(setting: Setting) -> Halves:
    """The halves of a step; ``batch`` is a dict of x, y, weights and key."""
    model, loss, optimizer = setting.model, setting.loss, setting.optimizer
    if setting.compute_dtype is not None:
        model, loss = in_dtype(model, loss, setting.compute_dtype)
    frozen, renew = setting.is_frozen, renews(model)
    options: Any = {"method": setting.method, "microbatch": setting.microbatch, "renew": renew}
    of_batch = value_and_grad(model, loss, frozen=frozen, **options)
    differentiable = value_and_grad(model, loss, method="autodiff", frozen=frozen)
    optimizer = served(optimizer)

    def gradient_of(params: Tree, batch: Tree) -> tuple[Array, Tree, Tree]:
        value, gradient = of_batch(params, **batch)
        cost, params = value if renew else (value, params)
        not_state = jax.tree.map(operator.not_, setting.is_state(params))
        return cost, trainable(params, not_state), gradient

    def update(
        params: Tree, trained: Tree, opt_state: Tree, batch: Tree, cost: Array, gradient: Tree
    ) -> tuple[Tree, Tree]:
        def value_fn(
            trained: Tree,
            x: Tree = batch["x"],
            y: Tree = batch["y"],
            weights: Array = batch["weights"],
            key: Any = batch["key"],
            untrained: Tree = params,
            obj_fn: Any = None,  # line searches pass on whatever there is
            grad_fn: Any = None,
        ) -> Array:
            params = merged(trained, untrained)
            return differentiable(params, x, y, weights=weights, key=key)[0]

        def grad_fn(trained: Tree, step: Any = None) -> Tree:
            return gradient_of(merged(trained, params), batch)[2]

        # What some optimisers ask for besides: plateaus the cost, line searches and estimates of
        # the Hessian the function, sharpness its gradient, curvature the batch and all parameters.
        extra = {**batch, "value": cost, "grad": gradient, "value_fn": value_fn}
        extra |= {"obj_fn": value_fn, "grad_fn": grad_fn, "untrained": params}
        updates, opt_state = optimizer.update(gradient, opt_state, trained, **extra)
        return optax.apply_updates(trained, updates), opt_state

    return Halves(gradient_of, update)


class Programs:
    """The compiled steps of a setting.

    Attributes:
      one: ``(state, rest, x, y, weights, key) -> (state, [loss, Σ w])``.
      several: as ``several_steps`` gives it.
      averages: ``(state, rest) -> `` the averaged parameters.
      keeps_types: whether a step leaves the shapes and dtypes of the state as they are.
      quick: how many steps are done in the time of a call, by the form of their batches.
    """

    def __init__(self, setting: Setting) -> None:
        step: Any = jax.jit(_step(setting))  # what both programs are made of; it is traced once
        self.one = jax.jit(step, donate_argnums=0)
        self.several = several_steps(step)
        self.averages = jax.jit(setting.averages)
        self.quick: dict[Any, int] = {}
        self._step = step
        self._kept: dict[Any, bool] = {}

    def keeps_types(self, state: State, *args: Tree) -> bool:
        given = _types((state, *args))
        if given not in self._kept:
            after, _ = self._step.eval_shape(state, *args)
            self._kept[given] = _types(state) == _types(after)
        return self._kept[given]


def _types(tree: Tree) -> tuple[Any, tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=32)
def programs(setting: Setting) -> Programs:
    """They are kept, so that a second run of the same model does not compile."""
    return Programs(setting)


def several_steps(step: Any) -> Callable[..., tuple[State, Array]]:
    """``(state, rest, count, x, y, weights, key, size) -> (state, [loss, Σ w] of each)``.

    The arrays hold k batches of ``size`` examples, one after the other; the first ``count`` are
    trained with. One program serves every count up to k. XLA does not know the count, so that it
    cannot unroll the loop, and compiles its body for itself. The body is the same for every k, and
    so are the bits of what it computes. Without the loop, other operations may be fused and the
    last bit be another.
    """

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="size")
    def several(
        state: State,
        rest: Tree,
        count: int,
        x: Tree,
        y: Tree,
        weights: Array,
        key: Array | None,
        *,
        size: int,
    ) -> tuple[State, Array]:
        batches = x, y, weights
        if weights.shape[0] == size:  # of a slice that is the whole, XLA would make another body
            batches = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), batches)

        def batch(i: Array) -> Tree:
            return jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, i * size, size), batches
            )

        def body(i: Array, carried: tuple[State, Array]) -> tuple[State, Array]:
            state, losses = carried
            state, loss = step(state, rest, *batch(i), key)
            return state, lax.dynamic_update_index_in_dim(losses, loss, i, 0)

        _, loss = step.eval_shape(state, rest, *batch(jnp.zeros((), int)), key)
        losses = jnp.zeros((weights.shape[0] // size + 1, 2), loss.dtype)
        return lax.fori_loop(0, count, body, (state, losses))

    return several


def _step(setting: Setting) -> Callable[..., tuple[State, Array]]:
    gradient_of, update = halves(setting)

    def step(
        state: State, rest: Tree, x: Tree, y: Tree, weights: Array, key: Array | None
    ) -> tuple[State, Array]:
        params = state.params(rest)
        key = None if key is None else jax.random.fold_in(key, state.step)
        batch = {"x": x, "y": y, "weights": weights, "key": key}
        cost, running, gradient = gradient_of(params, batch)
        trained, opt_state = update(params, state.trained, state.opt_state, batch, cost, gradient)
        average = state.average
        if average is not None:
            averaging = setting.averaging(trained)
            _, average = averaging.update(optax.tree.cast_like(trained, average.ema), average)
        state = State(trained, running, opt_state, state.step + 1, average)
        return state, jnp.stack([cost, weights.sum().astype(cost.dtype)])

    return step


def identity(
    setting: Setting,
    state: State,
    rest: Tree,
    key: Array | None,
    first: tuple[Tree, Tree, Any] | None,
) -> Identity:
    """What a run is, as far as it can be known: all of it, if there is a first batch.

    What a step computes is traced for two examples, so that batches may be of another size.
    """
    model, params = setting.model, state.params(rest)
    kept = {"params": params, "opt_state": state.opt_state, "key": key}
    run = described_run(model, setting.loss, kept, rest)
    run["ema"] = "none" if setting.ema is None else "averages of the parameters"
    settings = {
        "method": setting.method,
        "microbatch": str(setting.microbatch or "none"),
        "ema decay": "none" if setting.ema is None else str(setting.ema),
        "compute_dtype": setting.compute_dtype or "none",
    }
    fingerprints = {"hyperparameters": hyperparameters(state.opt_state)}
    if first is None:
        return Identity(run, settings, fingerprints)
    x, y, weights = first if model.mixes_examples else jax.tree.map(_two_of, first)
    batch = {"x": x, "y": y, "weights": weights, "key": key}
    gradient_of, update_of = halves(setting._replace(microbatch=None))
    gradient, (cost, _, of_trained) = program_of(gradient_of, params, batch)
    given = (params, state.trained, state.opt_state, batch, cost, of_trained)
    update, _ = program_of(update_of, *given)
    fingerprints |= {"gradient": gradient, "update": update, "first batch": contents_of(first)}
    return Identity(run, settings | described_settings(model, first), fingerprints)


def _two_of(leaf: Array) -> jax.ShapeDtypeStruct:
    """The shape of a batch's array, were it of two examples."""
    return abstract((2, *leaf.shape[1:]), leaf.dtype)


def _copied(tree: Tree) -> Tree:
    """Every leaf in a buffer of its own, which may be given away."""
    if on_one_device(tree):
        return _copies(tree)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


@jax.jit  # one call for all of them
def _copies(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)
