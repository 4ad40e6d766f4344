"""From where parameters meet examples back to the parameters: factors through static steps.

A step that only moves numbers moves the factors' instead. Through any other step goes each
example's gradient itself, by the step's own derivative, as in ``vmap(jax.grad)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..factors.arranged import Part, block, reshaped, transposed
from ..factors.combined import Sum
from ..factors.factored import Factored, Itself, Outer, accumulator
from .plan import Meeting, Plan, Step
from .run import static_values

Value = Any


def factors_of(
    plan: Plan, leaves: Sequence[Array], read: Sequence[Value], deltas: Sequence[Array], n: int
) -> list[Factored]:
    """The factored gradient of each parameter.

    Args:
      leaves: the parameters.
      read, deltas: at each meeting the activation that its route reads, and δ.
      n: the number of examples.
    """
    values = static_values(plan, leaves)
    factors: dict[int, list[Factored]] = {}
    for meeting, *there in zip(plan.body.meetings, read, deltas, strict=True):
        factors.setdefault(meeting.static.place, []).append(_met(meeting, *there))
    for step in reversed(plan.steps):
        given = [_sum(factors.pop(place, [])) for place in step.outputs]
        if all(factor is None for factor in given):
            continue
        for place, factor in _through(plan, step, values, given):
            factors.setdefault(place, []).append(factor)
    found = [_sum(factors.get(place, [])) for place in range(plan.leaves)]
    return [
        _nothing(leaf, n) if factor is None else factor
        for factor, leaf in zip(found, leaves, strict=True)
    ]


def _met(meeting: Meeting, read: Value, delta: Array) -> Factored:
    """The factors at one meeting, of its static value."""
    mapped = meeting.static.mapped
    if meeting.route is not None:
        return meeting.route.factor(read, delta, mapped)
    turns = [1 + i for i, over in enumerate(mapped) if not over]
    return Itself(delta.sum(turns, dtype=accumulator(delta)) if turns else delta)


def _nothing(leaf: Array, n: int) -> Factored:
    """Gradients that are 0, of a parameter that no example meets."""
    if leaf.ndim < 2:
        return Itself(jnp.zeros((n, *leaf.shape), leaf.dtype))
    rows, columns = leaf.shape[0], math.prod(leaf.shape[1:])
    flat = Outer(jnp.zeros((n, rows), leaf.dtype), jnp.zeros((n, columns), leaf.dtype))
    return reshaped(flat, leaf.shape)


def _sum(factors: list[Factored]) -> Factored | None:
    if not factors:
        return None
    parts = [p for f in factors for p in (f.parts if isinstance(f, Sum) else (f,))]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _through(
    plan: Plan, step: Step, values: Sequence[Value], given: Sequence[Factored | None]
) -> list[tuple[int, Factored]]:
    """The factors of a step's inputs, from those of its outputs."""
    if step.equation.primitive.name == "split" and len(step.maps) == 0:
        return _joined(plan, step, given)
    move = MOVES.get(step.equation.primitive.name)
    (factor,) = given if len(given) == 1 else (None,)
    if move is not None and factor is not None and len(step.maps) <= 1:
        parts = factor.parts if isinstance(factor, Sum) else (factor,)
        moved = [move(plan, step, part) for part in parts]
        if None not in moved:
            return [pair for pairs in moved if pairs is not None for pair in pairs]
    return _by_derivative(plan, step, values, given)


def is_moved(step: Step) -> bool:
    """Whether a step's factors follow from moving numbers."""
    return step.equation.primitive.name in (*MOVES, "split")


def _by_derivative(
    plan: Plan, step: Step, values: Sequence[Value], given: Sequence[Factored | None]
) -> list[tuple[int, Factored]]:
    learned = [i for i, place in enumerate(step.inputs) if plan.learned[place]]
    inputs = [values[place] for place in step.inputs]

    def outputs(*trained: Value) -> list[Value]:
        every = list(inputs)
        for i, value in zip(learned, trained, strict=True):
            every[i] = value
        found = step(*every)
        return [y for y, factor in zip(found, given, strict=True) if factor is not None]

    primals, pull = jax.vjp(outputs, *(inputs[i] for i in learned))
    factors = [factor for factor in given if factor is not None]
    each = [f.each().astype(y.dtype) for f, y in zip(factors, primals, strict=True)]
    gradients = jax.vmap(pull)(each)
    return [(step.inputs[i], Itself(g)) for i, g in zip(learned, gradients, strict=True)]


# ---- steps that only move numbers

Moved = Callable[[Plan, Step, Factored], "list[tuple[int, Factored]] | None"]


def _shape(plan: Plan, place: int) -> tuple[int, ...]:
    return tuple(plan.shapes[place].shape)


def _same(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    return [(step.inputs[0], factor)]


def _reshaped(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    return [(step.inputs[0], reshaped(factor, _shape(plan, step.inputs[0])))]


def _transposed(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    permutation = step.equation.params["permutation"]
    back = sorted(range(len(permutation)), key=permutation.__getitem__)
    kept = len(step.maps)
    return [(step.inputs[0], transposed(factor, (*range(kept), *(kept + i for i in back))))]


def _added(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    shape = _shape(plan, step.outputs[0])
    places = [place for place in step.inputs if plan.learned[place]]
    if any(_shape(plan, place) != shape for place in places):
        return None
    sign = -1.0 if step.equation.primitive.name == "sub" else 1.0
    signs = (1.0, sign)
    return [
        (place, factor if signs[i] == 1 else _times(factor, -1.0))
        for i, place in enumerate(step.inputs)
        if plan.learned[place]
    ]


def _negated(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    return [(step.inputs[0], _times(factor, -1.0))]


def _times(factor: Factored, number: Any) -> Factored:
    n = jax.tree.leaves(factor)[0].shape[0]
    return factor.scaled(jnp.full(n, number))


def _part(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    params = step.equation.params
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        return None
    starts = (*(0 for _ in step.maps), *params["start_indices"])
    return [(step.inputs[0], part_of(factor, starts, _shape(plan, step.inputs[0])))]


def part_of(factor: Factored, starts: tuple[int, ...], shape: tuple[int, ...]) -> Factored:
    """The factors of a parameter of which a block, from ``starts`` on, has these."""
    if jax.eval_shape(factor.each).shape[1:] == shape:
        return factor
    return Part(factor, tuple(map(int, starts)), shape)


def _joined(plan: Plan, step: Step, given: Sequence[Factored | None]) -> list[tuple[int, Factored]]:
    """Of what was split, each part is a block."""
    params, shape = step.equation.params, _shape(plan, step.inputs[0])
    starts = [sum(params["sizes"][:k]) for k in range(len(given))]
    zeros = (0,) * len(shape)
    axis = params["axis"]
    return [
        (step.inputs[0], part_of(factor, (*zeros[:axis], start, *zeros[axis + 1 :]), shape))
        for factor, start in zip(given, starts, strict=True)
        if factor is not None
    ]


def _cut(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    """Of what was concatenated, each has its block of the factors."""
    axis, start, found = step.equation.params["dimension"], 0, []
    for i, place in enumerate(step.inputs):
        size = step.equation.invars[i].aval.shape[axis]
        if plan.learned[place]:
            cut = block(factor, len(step.maps) + axis, start, size)
            if cut is None:
                return None
            found.append((place, cut))
        start += size
    return found


def _broadcast(plan: Plan, step: Step, factor: Factored) -> list[tuple[int, Factored]] | None:
    """A sum over the new axes; nothing is summed where they are of one entry."""
    inside, outside = _shape(plan, step.inputs[0]), _shape(plan, step.outputs[0])
    if math.prod(inside) == math.prod(outside):
        kept = tuple(step.equation.params["broadcast_dimensions"])
        return [(step.inputs[0], reshaped(factor, inside))] if kept == tuple(sorted(kept)) else None
    return None


MOVES: dict[str, Moved] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "transpose": _transposed,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "reduce_precision": _same,
    "add": _added,
    "add_any": _added,
    "sub": _added,
    "neg": _negated,
    "slice": _part,
    "concatenate": _cut,
    "broadcast_in_dim": _broadcast,
}
