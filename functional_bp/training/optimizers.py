"""Optimisers of optax that take other arguments than most, and those that ``fit`` cannot serve."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import optax

from ..checks import ModelError
from .run_identity import kinds_of

Tree = Any

_REFUSED = {
    "DifferentiallyPrivateAggregateState": (
        "optax.contrib.dpsgd and differentially_private_aggregate take gradients of single "
        "examples, which fit makes none of; bp.clipped_grad gives their clipped sum, to which "
        "noise is added in a loop of one's own, as in examples/dp_sgd.py"
    ),
}
_WHOLE = {"LookaheadState": "lookahead", "SAMState": "sam"}


class Lookahead(NamedTuple):
    """The state of ``optax.lookahead`` in ``fit``.

    Attributes:
      inner: optax's own.
      slow: the slow parameters.
    """

    inner: Any
    slow: Tree


@functools.lru_cache(maxsize=64)
def served(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser as a step calls it, ``update(gradient, state, params, **extra)``."""
    if name_of(optimizer) == "lookahead":
        return _with_slow(optimizer)
    arguments = inspect.signature(optimizer.update).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return optax.with_extra_args_support(optimizer)
    names = [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]

    def update(gradient: Tree, state: Tree, params: Tree = None, **extra: Any) -> Any:
        known = {name: extra[name] for name in names if name in extra}
        return optimizer.update(gradient, state, params, **known)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def name_of(optimizer: Any) -> str:
    """The name of the function of optax that made an optimiser; "" of one's own."""
    update = optimizer.update
    optaxs = getattr(update, "__module__", "").partition(".")[0] == "optax"
    return getattr(update, "__qualname__", "").partition(".")[0] if optaxs else ""


def check_served(optimizer: Any, opt_state: Tree) -> None:
    """Raises, by its name, for an optimiser that ``fit`` cannot serve."""
    kinds = kinds_of(opt_state)
    for kind in kinds:
        if kind in _REFUSED:
            raise ModelError(
                f"optimizer: takes one of mean gradients, got {kind}: {_REFUSED[kind]}"
            )
        name = _WHOLE.get(kind)
        if name and name_of(optimizer) != name:
            raise ModelError(
                f"optimizer: takes {name} as the whole optimiser, got it inside of another; what "
                "it is combined with, give as the optimiser inside of it"
            )


def _with_slow(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.lookahead`` of plain parameters, which are the fast ones."""

    def init(params: Tree) -> Lookahead:
        both = optax.LookaheadParams.init_synced(params)
        return Lookahead(optimizer.init(both), params)

    def update(gradient: Tree, state: Lookahead, params: Tree = None, **extra: Any) -> Any:
        both = optax.LookaheadParams(params, state.slow)
        updates, inner = optimizer.update(gradient, state.inner, both)
        return updates.fast, Lookahead(inner, optax.apply_updates(state.slow, updates.slow))

    return optax.GradientTransformationExtraArgs(init, update)
