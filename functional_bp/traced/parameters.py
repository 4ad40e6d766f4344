"""From where parameters meet examples back to the parameters: factors through static steps.

A step that moves numbers moves the factors' instead; a product of parameters, or a parameter times
a number, goes into the factors as well. Through any other step goes each example's gradient
itself, by the step's own derivative, as in ``vmap(jax.grad)``; but where all of it comes through
one number, as in a weight decay, one gradient for all examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..factors.along import Along
from ..factors.arranged import Part, block, inverse, reshaped, transposed
from ..factors.combined import Sum
from ..factors.factored import Factored, Itself, Outer, accumulator, einsum
from .jaxprs import move
from .plan import Meeting, Plan, Step
from .routes import InNamed
from .run import static_values

Value = Any
Passed = list[tuple[int, Factored]]
"""Factors of static values, each with the value's place."""


def factors_of(
    plan: Plan,
    leaves: Sequence[Array],
    read: Sequence[Value],
    deltas: Sequence[Any],
    n: int,
    multiplied_out: list[Step] | None = None,
) -> list[Factored]:
    """The factored gradient of each parameter.

    Args:
      leaves: the parameters.
      read, deltas: at each meeting the activation that its route reads, and δ.
      n: the number of examples.
      multiplied_out: gets the steps through which the factors grew.
    """
    values = static_values(plan, leaves)
    factors: dict[int, list[Factored]] = {}
    for meeting, a, delta in zip(plan.body.meetings, read, deltas, strict=True):
        place = meeting.static.place
        factors.setdefault(place, []).append(_met(meeting, a, delta, values[place]))
    for step in reversed(plan.steps):
        given = [_sum(factors.pop(place, [])) for place in step.outputs]
        if all(factor is None for factor in given):
            continue
        passed = _back(plan, step, values, given)
        grew = any(isinstance(f, Itself) and _size(f) > _size(given) for _, f in passed)
        if multiplied_out is not None and grew:
            multiplied_out.append(step)
        for place, factor in passed:
            factors.setdefault(place, []).append(factor)
    found = [_sum(factors.get(place, [])) for place in range(plan.leaves)]
    return [
        _nothing(leaf, n) if factor is None else factor
        for factor, leaf in zip(found, leaves, strict=True)
    ]


def _met(meeting: Meeting, read: Value, delta: Any, value: Value) -> Factored:
    """The factors at one meeting, of its static value."""
    mapped = meeting.static.mapped
    if isinstance(meeting.route, InNamed):
        return meeting.route.factor(read, delta, mapped, value)
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


def _parts(factor: Factored | None) -> tuple[Factored, ...]:
    if factor is None:
        return ()
    return factor.parts if isinstance(factor, Sum) else (factor,)


def _sum(factors: Sequence[Factored]) -> Factored | None:
    """One factor; what is multiplied out already is added up."""
    parts = [part for factor in factors for part in _parts(factor)]
    out = [part.g for part in parts if _is_multiplied_out(part)]  # type: ignore[attr-defined]
    if len(out) > 1:
        parts = [part for part in parts if not _is_multiplied_out(part)]
        parts.append(Itself(functools.reduce(jnp.add, out)))
    return Sum(tuple(parts)) if len(parts) > 1 else next(iter(parts), None)


def _is_multiplied_out(factor: Factored) -> bool:
    return isinstance(factor, Itself) and factor.g.ndim > 2


def _size(factors: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(factors))


def _back(
    plan: Plan, step: Step, values: Sequence[Value], given: Sequence[Factored | None]
) -> Passed:
    """The factors of a step's inputs, from those of its outputs."""
    name, told = move(step.equation) or ("", {})
    at = _At(plan, step, values, told)
    if name == "split" and not step.maps:
        return _joined(at, given)
    if len(given) > 1 or len(step.maps) > 1:
        return at.by_derivative(given)
    passed: Passed = []
    others: list[Factored] = []
    for part in _parts(given[0]):
        moved = None if isinstance(part, Along) or name not in MOVES else MOVES[name](at, part)
        if moved is not None:
            passed += moved
        elif _along(part) is not None:
            passed += at.by_derivative([part])
        else:
            others.append(part)
    return passed + at.by_derivative([_sum(others)]) if others else passed


@dataclass(frozen=True)
class _At:
    """A static step, among the values of its plan.

    Attributes:
      told: what its operation is told.
    """

    plan: Plan
    step: Step
    values: Sequence[Value]
    told: dict[str, Any]

    def by_derivative(self, given: Sequence[Factored | None]) -> Passed:
        """By the vector–Jacobian product of the step, for each example's gradient; for one of all
        examples, if they differ by a number alone."""
        learned = self.learned
        inputs = [self.values[place] for place in self.step.inputs]

        def outputs(*trained: Value) -> list[Value]:
            every = list(inputs)
            for i, value in zip(learned, trained, strict=True):
                every[i] = value
            found = self.step(*every)
            return [y for y, factor in zip(found, given, strict=True) if factor is not None]

        primals, pull = jax.vjp(outputs, *(inputs[i] for i in learned))
        factors = [factor for factor in given if factor is not None]
        along = _along(factors[0]) if len(factors) == 1 else None
        found: list[Factored]
        if along is None:
            each = [f.each().astype(y.dtype) for f, y in zip(factors, primals, strict=True)]
            found = list(map(Itself, jax.vmap(pull)(each)))
        else:
            gradients = pull([along.direction.astype(primals[0].dtype)])
            found = [Along(along.c, gradient) for gradient in gradients]
        return [(self.step.inputs[i], f) for i, f in zip(learned, found, strict=True)]

    @property
    def learned(self) -> list[int]:
        """Which inputs are made of parameters."""
        return [i for i, place in enumerate(self.step.inputs) if self.plan.learned[place]]

    @property
    def loops(self) -> int:
        """Over how many loops there is an entry for each turn, on the first axes."""
        return len(self.step.maps)

    def shape(self, i: int) -> tuple[int, ...]:
        """Of an input."""
        return tuple(self.plan.shapes[self.step.inputs[i]].shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the only output."""
        return tuple(self.plan.shapes[self.step.outputs[0]].shape)

    def value(self, i: int) -> Value:
        """Of an input."""
        return self.values[self.step.inputs[i]]

    def number(self, i: int) -> int | None:
        """The place of the number that an input is, or was broadcast from; None if it is none."""
        place = self.step.inputs[i]
        for step in reversed(self.plan.steps):
            if place in step.outputs and step.equation.primitive.name == "broadcast_in_dim":
                place = step.inputs[0]
        return place if math.prod(self.plan.shapes[place].shape) == 1 else None


def _along(factor: Factored) -> Along | None:
    """A gradient that is a number for each example, times a direction."""
    if isinstance(factor, Itself) and factor.g.ndim == 1:
        return Along(factor.g, jnp.ones((), factor.g.dtype))
    return factor if isinstance(factor, Along) else None


# ---- steps that factors go through: each gives None where they do not


def _same(at: _At, factor: Factored) -> Passed | None:
    return [(at.step.inputs[0], factor)]


def _reshaped(at: _At, factor: Factored) -> Passed | None:
    return [(at.step.inputs[0], reshaped(factor, at.shape(0)))]


def _transposed(at: _At, factor: Factored) -> Passed | None:
    back = inverse(at.told["permutation"])
    order = (*range(at.loops), *(at.loops + axis for axis in back))
    return [(at.step.inputs[0], transposed(factor, order))]


def _broadcast(at: _At, factor: Factored) -> Passed | None:
    """A sum over the new axes; nothing is summed where they are of one entry."""
    inside, kept = at.shape(0), tuple(at.told["broadcast_dimensions"])
    fits = math.prod(inside) == math.prod(at.output_shape) and kept == tuple(sorted(kept))
    return _reshaped(at, factor) if fits else None


def _part(at: _At, factor: Factored) -> Passed | None:
    if at.told["strides"] is not None and any(stride != 1 for stride in at.told["strides"]):
        return None
    starts = (*(0 for _ in range(at.loops)), *at.told["start_indices"])
    return [(at.step.inputs[0], _part_of(factor, starts, at.shape(0)))]


def _part_of(factor: Factored, starts: Sequence[int], shape: tuple[int, ...]) -> Factored:
    """The factors of a parameter of which a block, from ``starts`` on, has these."""
    if jax.eval_shape(factor.each).shape[1:] == shape:
        return factor
    return Part(factor, tuple(map(int, starts)), shape)


def _joined(at: _At, given: Sequence[Factored | None]) -> Passed:
    """Of what was split, each part is a block."""
    shape, start, passed = at.shape(0), 0, []
    for size, factor in zip(at.told["sizes"], given, strict=True):
        if factor is not None:
            starts = [start if i == at.told["axis"] else 0 for i in range(len(shape))]
            passed.append((at.step.inputs[0], _part_of(factor, starts, shape)))
        start += size
    return passed


def _cut(at: _At, factor: Factored) -> Passed | None:
    """Of what was concatenated, each has its block of the factors."""
    axis, start, passed = at.loops + at.told["dimension"], 0, []
    for i, place in enumerate(at.step.inputs):
        size = at.step.equation.invars[i].aval.shape[axis - at.loops]
        if i in at.learned:
            cut = block(factor, axis, start, size)
            if cut is None:
                return None
            passed.append((place, cut))
        start += size
    return passed


def _added(at: _At, factor: Factored) -> Passed | None:
    if any(at.shape(i) != at.output_shape for i in at.learned):
        return None
    signs = (1, -1) if at.step.equation.primitive.name == "sub" else (1, 1)
    return [
        (at.step.inputs[i], factor if signs[i] == 1 else _times(factor, -1)) for i in at.learned
    ]


def _negated(at: _At, factor: Factored) -> Passed | None:
    return [(at.step.inputs[0], _times(factor, -1))]


def _times(factor: Factored, number: Array | int) -> Factored:
    n = jax.eval_shape(factor.each).shape[0]
    return factor.scaled(jnp.full(n, number))


def _multiplied(at: _At, factor: Factored) -> Passed | None:
    """W times or over a number s: gₙ s of W, and ⟨gₙ, W⟩ of s."""
    over = at.step.equation.primitive.name == "div"
    for w, other in ((0, 1),) if over else ((0, 1), (1, 0)):
        place = at.number(other)
        if at.shape(w) == at.output_shape and place is not None:
            break
    else:
        return None
    s = jnp.reshape(at.values[place], ())
    s = 1 / s if over else s
    passed: Passed = [(at.step.inputs[w], _times(factor, s))] if w in at.learned else []
    if other in at.learned:
        of_s = factor.dot(at.value(w))
        of_s = -(s**2) * of_s if over else of_s
        passed.append((place, Itself(of_s.reshape(-1, *at.plan.shapes[place].shape))))
    return passed


def _product(at: _At, factor: Factored) -> Passed | None:
    """Of a matrix product L R of parameters: (g Rᵀ) of L, (Lᵀ g) of R, where g = Σ u vᵀ."""
    (contracted, (batch, _)) = at.told["dimension_numbers"]
    outer = factor.as_outer()
    if outer is None or at.loops or batch or len(at.shape(0)) != 2 or len(at.shape(1)) != 2:
        return None
    passed: Passed = []
    flipped = (contracted[0] == (0,), contracted[1] == (1,))  # which of L, R are transposes
    left, right = (at.value(i).T if flipped[i] else at.value(i) for i in range(2))
    for i in at.learned:
        u, v = outer.u, outer.v
        if i == 0:
            v = einsum("nti,ri->ntr", v, right)
        else:
            u = einsum("nto,or->ntr", u, left)
        inputs_first = factor.rows_are_inputs  # which a transposed Outer says of itself
        f = transposed(Outer(v, u), (1, 0)) if inputs_first else Outer(u, v)
        passed.append((at.step.inputs[i], transposed(f, (1, 0)) if flipped[i] else f))
    return passed


MOVES: dict[str, Callable[[_At, Factored], Passed | None]] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "transpose": _transposed,
    "convert_element_type": _same,
    "copy": _same,
    "reduce_precision": _same,
    "add": _added,
    "add_any": _added,
    "sub": _added,
    "neg": _negated,
    "mul": _multiplied,
    "div": _multiplied,
    "dot_general": _product,
    "slice": _part,
    "concatenate": _cut,
    "broadcast_in_dim": _broadcast,
}
