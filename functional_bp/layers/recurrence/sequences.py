"""Sequences: their lengths and states, which steps are valid, and what comes out again.

The input of a recurrent layer is an array or a tree, ``as_tree``; everything here takes the tree.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...checks import ModelError, described
from ...layer import one_of
from .cell import Cell, State

Tree = Any


def as_tree(x: Tree) -> Tree:
    """The input of a recurrent layer as a tree: ``x`` and, if given, ``length`` and ``state``."""
    tree = x if isinstance(x, dict) else {"x": x}
    if "x" not in tree or set(tree) - {"x", "length", "state"} or not hasattr(tree["x"], "ndim"):
        raise ModelError(
            f"takes an array (time, features), or a dict of x, length and state, got {described(x)}"
        )
    return tree


def where(mask: Array | None, yes: Tree, no: Tree) -> Tree:
    """``yes`` where the mask is True, else ``no``, a tree of the same shape or a number; without
    a mask, ``yes``."""
    if mask is None:
        return yes
    if not isinstance(no, dict):
        no = jax.tree.map(lambda _: no, yes)
    return jax.tree.map(lambda y, n: jnp.where(mask, y, n), yes, no)


def turned(steps: Tree) -> Tree:
    """Every step's rows to columns, and back."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 2), steps)


def masks(
    inputs: Tree, start: Array | int, size: int, *, reverse: bool, truncate: int | None
) -> tuple[Array | None, Array | None]:
    """Where a block's steps are valid, and where δ passes to the step before them; both
    ``(t, 1, n or 1)``, or None for everywhere."""
    length, steps = inputs.get("length"), inputs["x"].shape[1]
    length = None if length is None else length[None, None, :]
    padding = 0 if length is None or not reverse else steps - length
    step = start + jnp.arange(size)[:, None, None] - padding  # as each example counts them
    valid = None if length is None else (step >= 0) & (step < length)
    through = None if truncate is None else (step <= 0) | (step % truncate != 0)
    return valid, through


def valid_steps(inputs: Tree) -> Array | None:
    """Where the steps are valid, ``(n, t, 1)``, or None for everywhere."""
    if "length" not in inputs:
        return None
    return (jnp.arange(inputs["x"].shape[1])[None] < inputs["length"][:, None])[..., None]


def initial_state(cell: Cell, params: Tree, inputs: Tree) -> State:
    """The state given, or the trained one, or zeros: every part ``(h, n)``, as the final state
    and ∂C/∂(final state) are."""
    if "state" in inputs:
        return jax.tree.map(jnp.transpose, inputs["state"][0])
    x = inputs["x"]
    shape, dtype = (cell.hidden, x.shape[0]), jnp.result_type(x, params["weight_x"])
    if "state" in params:
        state = params["state"].items()
        return {part: jnp.broadcast_to(s[:, None], shape).astype(dtype) for part, s in state}
    return {part: jnp.zeros(shape, dtype) for part in cell.state}


def output_of(x: Tree, y: Array, final: State) -> Tree:
    """The output as the input was given, an array or a tree; the final state goes to the end."""
    if not isinstance(x, dict):
        return y
    tree = {**x, "x": y}
    if "state" in x:
        tree["state"] = (*x["state"][1:], final)
    return tree


def output_deltas(cell: Cell, inputs: Tree, dy: Tree, *, last: bool) -> tuple[Array | None, State]:
    """∂C/∂y_t from outside, and ∂C/∂(final state); a δ of None is 0.

    Args:
      last: the output is the one after the last valid step.
    """
    dy = as_tree(dy)
    given = dy.get("state")
    if given is not None:
        dstate = jax.tree.map(jnp.transpose, given[-1])
    else:
        zeros = jnp.zeros((cell.hidden, inputs["x"].shape[0]), dy["x"].dtype)
        dstate = dict.fromkeys(cell.state, zeros)
    if last:
        return None, {**dstate, "h": dstate["h"] + dy["x"].T}
    return dy["x"], dstate


def input_deltas(inputs: Tree, dy: Tree, dx: Array, dstate: State) -> Tree:
    """∂C/∂(input), as the input was given: an array, or a tree with None for the length."""
    if not isinstance(dy, dict):
        return dx
    deltas: Tree = {"x": dx} | ({"length": None} if "length" in inputs else {})
    if "state" in inputs:
        deltas["state"] = (dstate, *dy["state"][:-1])
    return deltas


def check_inputs(cell: Cell, params: Tree, inputs: Tree, *, trained_state: bool) -> None:
    """Raises unless sequence and parameters fit the cell."""
    one = one_of(inputs)
    check_sequence(one["x"])
    _check_params(cell, params, one["x"], trained_state)
    if "length" in inputs:
        _check_length(inputs["length"], one["x"].shape[0])
    if "state" in inputs:
        _check_state(cell, one["state"])


def check_sequence(x: Array) -> None:
    """Raises unless x is one example, ``(time, features)``."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[0] == 0:
        raise ModelError(
            "takes examples of shape (time, features), with at least one step, as floating-point "
            f"numbers, got {described(x)}"
        )


def _check_params(cell: Cell, params: Tree, x: Array, trained_state: bool) -> None:
    wanted = jax.eval_shape(lambda: cell.init(jax.random.key(0), x.shape[-1], x.dtype))
    if trained_state:
        state = jax.ShapeDtypeStruct((cell.hidden,), x.dtype)  # type: ignore[no-untyped-call]
        wanted["state"] = dict.fromkeys(cell.state, state)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
        raise ModelError(
            f"takes, for examples {described(x)}, parameters {described(wanted)}, got "
            f"{described(params)}; are they another model's?"
        )


def _check_length(length: Array, steps: int) -> None:
    """``length`` is a batch's, ``(n,)``; its values are looked at if they are not traced."""
    if not jnp.issubdtype(length.dtype, jnp.integer) or length.ndim != 1:
        raise ModelError(f"length: takes one integer for each example, got {described(length)}")
    if not isinstance(length, jax.core.Tracer):
        given = np.asarray(length)
        if given.size and (given.min() < 0 or given.max() > steps):
            raise ModelError(
                f"length: takes 0 to the {steps} steps of x, got {given.min()} to {given.max()}"
            )


def _check_state(cell: Cell, states: Tree) -> None:
    wanted = {part: (cell.hidden,) for part in cell.state}
    first = states[0] if isinstance(states, (tuple, list)) and states else states
    if first is states or jax.tree.map(jnp.shape, first) != wanted:
        raise ModelError(
            "state: takes a tuple with one initial state for each recurrent layer, the first of "
            f"them {wanted} here, got {described(states)}"
        )
