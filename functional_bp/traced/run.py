"""Runs a plan: static values once, the body for one example, with a tap at every meeting.

A tap is an argument that is never read. Its cotangent is δ: of what an operation gives, where the
factors follow from that, else of the parameter itself, one for each example.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .jaxprs import evaluated, reverse_alone
from .named import tapped
from .plan import Body, Choice, Instruction, Local, Loop, Plan, Ref, Remat, Static
from .routes import InNamed

Value = Any
Statics = dict[Static, Value]


def static_values(plan: Plan, leaves: Sequence[Array]) -> list[Value]:
    """Every static value, from the parameters."""
    values: list[Value] = [*leaves, *[None] * (len(plan.learned) - len(leaves))]
    for place, value in plan.known.items():
        values[place] = value
    for step in plan.steps:
        found = step(*(values[place] for place in step.inputs))
        for place, value in zip(step.outputs, found, strict=True):
            values[place] = value
    return values


def run(
    body: Body, statics: Statics, inputs: Sequence[Value], taps: Sequence[Array] | None
) -> tuple[list[Value], list[Value]]:
    """The body's outputs, and what its routes read.

    Args:
      statics: those that the body uses, as they are at this turn of the loops around.
      taps: one for each meeting; None to run without.
    """
    values: dict[int, Value] = dict(enumerate(inputs))
    read: list[Value] = [()] * len(body.meetings)

    def value(ref: Ref) -> Value:
        return values[ref.place] if isinstance(ref, Local) else statics[ref]

    for instruction in body.instructions:
        given = [value(ref) for ref in instruction.inputs]
        here = None if taps is None else [taps[i] for i in instruction.meetings]
        if isinstance(instruction, Choice):
            found, reads = _choice(instruction, value(instruction.index), statics, given, here)
        elif isinstance(instruction, Loop):
            found, reads = _loop(instruction, statics, given, here)
        elif isinstance(instruction, Remat):
            found, reads = _remat(instruction, statics, given, here)
        else:
            found, reads = _instruction(body, instruction, given, here)
        values |= zip(instruction.outputs, found, strict=True)
        for i, activation in zip(instruction.meetings, reads, strict=True):
            read[i] = activation
    return [value(ref) for ref in body.outputs], read


def _instruction(
    body: Body, instruction: Instruction, given: list[Value], taps: list[Array] | None
) -> tuple[list[Value], list[Value]]:
    def outputs(values: Sequence[Value]) -> list[Value]:
        if instruction.equation is None:
            return list(values)
        return evaluated(instruction.equation, values)

    routes = [body.meetings[i].route for i in instruction.meetings]
    if routes and isinstance(routes[0], InNamed):
        return _by_name(routes, given, taps)  # type: ignore[arg-type]
    if not instruction.meetings or taps is None:
        return outputs(given), [()] * len(instruction.meetings)
    route = body.meetings[instruction.meetings[0]].route
    if route is None:
        in_reverse = instruction.equation is not None and reverse_alone(instruction.equation)
        of_parameters = _tapped_in_reverse if in_reverse else _tapped_both_ways
        return of_parameters(outputs, given, instruction.operands, taps), [()] * len(taps)
    (output,) = outputs(given)
    return [_tapped(output, taps[0])], [route.reads(given)]


def _by_name(
    routes: list[InNamed], given: list[Value], taps: list[Value] | None
) -> tuple[list[Value], list[Value]]:
    """By the function's own rule; its taps' cotangents are the arrays in its factors."""

    def apart(factors: list[Any]) -> list[list[Array]]:
        return [route.apart(factors[route.operand]) for route in routes]

    outputs = tapped(routes[0].rule, given, taps, apart)
    return outputs, [() if taps is None else route.reads(given) for route in routes]


@jax.custom_jvp
def _tapped(z: Array, tap: Array) -> Array:
    """z; δ, its cotangent, is also that of ``tap``."""
    return z


@_tapped.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[0], operator.add(*tangents)


def _tapped_both_ways(
    function: Callable[[Sequence[Value]], list[Value]],
    values: list[Value],
    operands: tuple[int, ...],
    taps: list[Array],
) -> list[Value]:
    """``function(values)``; the cotangents of the operands are also those of ``taps``.

    An operand that all examples share stays one array, as it would not with a tap added to it.
    """

    @jax.custom_jvp
    def tapped(values: list[Value], taps: list[Array]) -> list[Value]:
        return function(values)

    @tapped.defjvp
    def _(primals: Any, tangents: Any) -> tuple[list[Value], list[Value]]:
        moved = list(tangents[0])
        for i, tangent in zip(operands, tangents[1], strict=True):
            moved[i] = moved[i] + tangent
        return jax.jvp(function, (primals[0],), (moved,))

    return tapped(values, taps)


def _tapped_in_reverse(
    function: Callable[[Sequence[Value]], list[Value]],
    values: list[Value],
    operands: tuple[int, ...],
    taps: list[Array],
) -> list[Value]:
    """The same of a function that has a reverse-mode derivative alone."""

    @jax.custom_vjp
    def tapped(values: list[Value], taps: list[Array]) -> list[Value]:
        return function(values)

    def forward(values: list[Value], taps: list[Array]) -> tuple[list[Value], Any]:
        return jax.vjp(function, values)

    def backward(pull: Any, dy: list[Array]) -> tuple[list[Array], list[Array]]:
        (found,) = pull(dy)
        return found, [found[i] for i in operands]

    tapped.defvjp(forward, backward)
    return tapped(values, taps)


def _choice(
    choice: Choice,
    index: Array,
    statics: Statics,
    given: list[Value],
    taps: list[Array] | None,
) -> tuple[list[Value], list[Value]]:
    found: list[Value] = []
    reads: list[Value] = []
    for k, body in enumerate(choice.bodies):
        chosen = index == k

        def guarded(value: Value, chosen: Array = chosen) -> Value:
            """No cotangent comes from a branch that was not chosen, though 0 · ∞ may be in it."""
            return jnp.where(chosen, value, lax.stop_gradient(value))

        here = None
        if taps is not None:
            theirs = taps[len(reads) : len(reads) + len(body.meetings)]
            here = jax.tree.map(guarded, theirs)
        outputs, read = run(body, statics, list(map(guarded, given)), here)
        found = [jnp.where(chosen, *pair) for pair in zip(outputs, found)] if found else outputs
        reads += read
    return found, reads


def _remat(
    remat: Remat, statics: Statics, given: list[Value], taps: list[Array] | None
) -> tuple[list[Value], list[Value]]:
    used = {ref: statics[ref] for ref in remat.body.statics}
    places = list(used)

    def inside(
        used: list[Value], given: list[Value], taps: list[Array] | None
    ) -> tuple[list[Value], list[Value]]:
        return run(remat.body, dict(zip(places, used)), given, taps)

    return remat.again(inside)(list(used.values()), given, taps)


def _loop(
    loop: Loop, statics: Statics, given: list[Value], taps: list[Array] | None
) -> tuple[list[Value], list[Value]]:
    body, scan = loop.body, loop.scan
    around = {ref: statics[Static(ref.place, ref.mapped[:-1])] for ref in body.statics}
    turning = {ref: value for ref, value in around.items() if ref.mapped[-1]}
    same, begin, entries = (
        [value for value, kind in zip(given, loop.kinds) if kind == k] for k in range(3)
    )

    def turn(carried: list[Value], xs: Any) -> tuple[list[Value], Any]:
        of_turn, entries, taps = xs
        here = around | dict(zip(turning, of_turn))
        outputs, read = run(body, here, [*same, *carried, *entries], taps)
        return outputs[: len(carried)], (outputs[len(carried) :], read)

    carried, (ys, read) = lax.scan(
        turn,
        begin,
        (list(turning.values()), entries, taps),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    return [*carried, *ys], read
