"""From a program to its plan, equation by equation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..checks import abstract
from .jaxprs import (
    ELEMENTWISE,
    Equation,
    Program,
    Scan,
    branches,
    called,
    checkpointed,
    is_literal,
    scanned,
)
from .plan import (
    OUTPUT,
    Body,
    Choice,
    Instruction,
    Local,
    Loop,
    Meeting,
    Plan,
    Ref,
    Remat,
    Source,
    Static,
    Step,
)
from .routes import InNamed, Route, recognised, recognised_by_name

Value = Any


class NotFollowed(Exception):
    """A loop in which a parameter meets an example in a way that is not known."""


def plan_of(program: Program, leaves: int, trained: Sequence[bool]) -> Plan:
    """The plan of a program whose first ``leaves`` inputs are parameters, the rest an example."""
    plan = Plan(leaves)
    planner = _Planner(plan, plan.body, ())
    inputs: list[Ref] = []
    for variable, learned in zip(program.inputs[:leaves], trained, strict=True):
        inputs.append(Static(planner.new_static(variable.aval, learned)))
    inputs += [planner.new_local() for _ in program.inputs[leaves:]]
    plan.body.outputs = tuple(map(planner.output, planner.walk(program, inputs)))
    return plan


@dataclass(eq=False)
class _Planner:
    """Plans one body; ``loops`` are the lengths of those around it."""

    plan: Plan
    body: Body
    loops: tuple[int, ...]
    calls: tuple[Equation, ...] = ()

    def new_static(self, like: Any, learned: bool, lengths: tuple[int, ...] = ()) -> int:
        self.plan.learned.append(learned and jnp.issubdtype(like.dtype, jnp.inexact))
        self.plan.shapes.append(abstract((*lengths, *like.shape), like.dtype))
        return len(self.plan.learned) - 1

    def new_local(self) -> Local:
        self.body.places += 1
        return Local(self.body.places - 1)

    def is_learned(self, ref: Ref) -> bool:
        return isinstance(ref, Static) and self.plan.learned[ref.place]

    def known(self, value: Value) -> Static:
        place = self.new_static(jax.typeof(value), learned=False)
        self.plan.known[place] = value
        return Static(place, (False,) * len(self.loops))

    def walk(self, program: Program, inputs: Sequence[Ref]) -> list[Ref]:
        """Plans the equations of a program; gives where its outputs are."""
        where: dict[Any, Ref] = dict(zip(program.inputs, inputs, strict=True))
        where |= {variable: self.known(value) for variable, value in program.constants.items()}

        def ref(variable: Any) -> Ref:
            return self.known(variable.val) if is_literal(variable) else where[variable]

        for equation in program.equations:
            refs = [ref(variable) for variable in equation.invars]
            where |= zip(equation.outvars, self.equation(equation, refs), strict=True)
        return [ref(variable) for variable in program.outputs]

    def equation(self, equation: Equation, refs: list[Ref]) -> list[Ref]:
        """Plans one equation: as a static step, as its own equations, or as an instruction."""
        by_name = self.by_name(equation, refs)
        if by_name is not None:
            return by_name
        inside = called(equation)
        if inside is not None and any(map(self.is_learned, refs)):
            called_in = dataclasses.replace(self, calls=(equation, *self.calls))
            return called_in.walk(inside, refs)
        if all(isinstance(ref, Static) for ref in refs) and self.stays_static(refs):
            return self.step(equation, refs)  # type: ignore[return-value]
        if not any(map(self.is_learned, refs)):
            return self.instruction(equation, refs)
        return self.followed(equation, refs) or self.met(equation, refs)

    def stays_static(self, refs: Sequence[Ref]) -> bool:
        """Not so constants of each turn of a loop: they would be kept for all turns."""
        mapped = any(any(ref.mapped) for ref in refs if isinstance(ref, Static))
        return not mapped or any(map(self.is_learned, refs))

    def step(self, equation: Equation, refs: Sequence[Any]) -> list[Static]:
        turns = [any(over) for over in zip(*(ref.mapped for ref in refs))] or [False] * len(
            self.loops
        )
        maps = tuple(
            tuple(0 if ref.mapped[i] else None for ref in refs)
            for i, over in enumerate(turns)
            if over
        )
        lengths = tuple(n for n, over in zip(self.loops, turns) if over)
        learned = any(map(self.is_learned, refs))
        outputs = tuple(
            self.new_static(variable.aval, learned, lengths) for variable in equation.outvars
        )
        inputs = tuple(ref.place for ref in refs)
        source = Source((equation, *self.calls))
        self.plan.steps.append(Step(equation, inputs, outputs, maps, source))
        return [Static(place, tuple(turns)) for place in outputs]

    def instruction(self, equation: Equation | None, refs: Sequence[Ref], **met: Any) -> list[Ref]:
        for ref in refs:
            self.uses(ref)
        count = len(equation.outvars) if equation is not None else 1
        outputs = [self.new_local() for _ in range(count)]
        places = tuple(local.place for local in outputs)
        self.body.instructions.append(Instruction(equation, tuple(refs), places, **met))
        return list(outputs)

    def uses(self, ref: Ref) -> None:
        if isinstance(ref, Static):
            self.body.statics[ref] = None

    # ---- meetings

    def met(self, equation: Equation, refs: list[Ref]) -> list[Ref]:
        """An equation of whose operands some are static and made of parameters."""
        operands = tuple(i for i, ref in enumerate(refs) if self.is_learned(ref))
        route = recognised(equation, operands[0]) if len(operands) == 1 else None
        if route is None:
            self.check_cost(equation, operands)
            self.plan.taps_apart |= equation.primitive.name not in ELEMENTWISE
        meetings = []
        for i in operands:
            like = equation.outvars[0] if route else equation.invars[i]
            tap = abstract(like.aval.shape, like.aval.dtype)
            meetings.append(self.meeting(refs[i], tap, route, equation))
        return self.instruction(equation, refs, operands=operands, meetings=tuple(meetings))

    def by_name(self, equation: Equation, refs: list[Ref]) -> list[Ref] | None:
        """A function whose rule is known by its name. Its weights must be static, and in a loop a
        vocabulary's the same at every turn; else its equations are planned."""
        operands = tuple(i for i, ref in enumerate(refs) if self.is_learned(ref))
        if not operands or all(isinstance(ref, Static) for ref in refs):
            return None
        routes = recognised_by_name(equation, operands)
        if not routes:
            return None
        for i in next(iter(routes.values())).rule.shared:
            ref = refs[i]
            of_turns = isinstance(ref, Static) and any(ref.mapped)
            if isinstance(ref, Local) or (of_turns and routes[operands[0]].rule.reads):
                return None
        meetings = tuple(self.meeting(refs[i], r.taps, r, equation) for i, r in routes.items())
        return self.instruction(equation, refs, operands=operands, meetings=meetings)

    def check_cost(self, equation: Equation, operands: Sequence[int]) -> None:
        """In a loop a gradient for each turn would be kept, so it must be as small as an output."""
        largest = max(math.prod(variable.aval.shape) for variable in equation.outvars)
        sizes = [math.prod(equation.invars[i].aval.shape) for i in operands]
        if self.loops and equation.primitive.name not in ELEMENTWISE and max(sizes) > largest:
            raise NotFollowed(equation)

    def meeting(
        self,
        ref: Any,
        tap: Any,
        route: Route | InNamed | None,
        equation: Equation | None,
    ) -> int:
        operation = OUTPUT if equation is None else equation.primitive.name
        operation = operation if route is None else route.name
        source = Source(self.calls if equation is None else (equation, *self.calls))
        self.body.meetings.append(Meeting(ref, self.loops, tap, route, operation, source))
        return len(self.body.meetings) - 1

    def output(self, ref: Ref) -> Local | Static:
        """A static value where one of each example is wanted."""
        if not self.is_learned(ref):
            self.uses(ref)
            return ref
        assert isinstance(ref, Static)
        whole = self.plan.shapes[ref.place]
        tap = abstract(whole.shape[sum(ref.mapped) :], whole.dtype)
        met = {"operands": (0,), "meetings": (self.meeting(ref, tap, None, None),)}
        (local,) = self.instruction(None, [ref], **met)
        return local

    # ---- what has a body of its own

    def followed(self, equation: Equation, refs: list[Ref]) -> list[Ref] | None:
        """What has programs inside, if everything in them is followed."""
        scan, remat, programs = scanned(equation), checkpointed(equation), branches(equation)
        if scan is not None:
            follow = functools.partial(self.loop, scan, refs)
        elif remat is not None:
            follow = functools.partial(self.remat, *remat, refs)
        elif programs is not None and isinstance(refs[0], Local):
            follow = functools.partial(self.choice, programs, refs)
        else:
            return None
        before = [(planned, _collected(planned)) for planned in (self.plan, self.body)]
        try:
            return follow()
        except NotFollowed:
            if self.loops:
                raise
            for planned, collected in before:
                vars(planned).update(collected)
            return None

    def inside(
        self, program: Program, given: Sequence[Ref | None], *turns: int
    ) -> tuple[_Planner, list[Ref]]:
        """The planner of a body for ``program``, and where its outputs are. ``given`` has what the
        static inputs are there, and None for those that the body takes."""
        inner = _Planner(self.plan, Body(), (*self.loops, *turns), self.calls)
        inputs = [inner.new_local() if ref is None else ref for ref in given]
        return inner, inner.walk(program, inputs)

    def choice(self, programs: Sequence[Program], refs: Sequence[Ref]) -> list[Ref]:
        index, refs = refs[0], refs[1:]
        taken = tuple(ref for ref in refs if isinstance(ref, Local))
        bodies, first = [], len(self.body.meetings)
        for program in programs:
            inner, outputs = self.inside(program, list(map(_if_static, refs)))
            inner.body.outputs = tuple(map(inner.output, outputs))
            self.body.meetings += inner.body.meetings
            self.body.statics |= inner.body.statics
            bodies.append(inner.body)
        found: list[Ref] = [self.new_local() for _ in programs[0].outputs]
        places, meetings = tuple(ref.place for ref in found), self.meetings_from(first)
        self.body.instructions.append(Choice(index, tuple(bodies), taken, places, meetings))
        self.plan.taps_apart = True
        return found

    def remat(self, program: Program, again: Callable[..., Any], refs: Sequence[Ref]) -> list[Ref]:
        taken = [ref for ref in refs if isinstance(ref, Local)]
        inner, outputs = self.inside(program, list(map(_if_static, refs)))
        outside = list(map(_if_static, outputs))
        return self.block(inner, outputs, outside, taken, functools.partial(Remat, again=again))

    def loop(self, scan: Scan, refs: Sequence[Ref]) -> list[Ref]:
        program, first = scan.program, scan.constants
        last = first + scan.carried
        carries = dict(zip(program.inputs[first:last], program.outputs[: scan.carried]))

        def given(i: int, ref: Ref) -> Static | None:
            """What a static input is inside; None for one that the body takes."""
            carried = first <= i < last and carries[program.inputs[i]] is not program.inputs[i]
            if isinstance(ref, Local) or carried:
                return None
            return Static(ref.place, (*ref.mapped, i >= last))

        there = [given(i, ref) for i, ref in enumerate(refs)]
        taken = [i for i, ref in enumerate(there) if ref is None]
        begin = [self.output(refs[i]) for i in taken]
        inner, outputs = self.inside(program, there, scan.length)

        def outside(i: int, ref: Ref) -> Static | None:
            """What comes out static: what every turn left as it was, or a value for each turn."""
            if isinstance(ref, Local):
                return None
            static = i + first not in taken if i < scan.carried else ref.mapped[-1]
            return Static(ref.place, ref.mapped[:-1]) if static else None

        kinds = tuple((i >= first) + (i >= last) for i in taken)
        make = functools.partial(Loop, scan=scan, kinds=kinds)
        come_out = [outside(i, ref) for i, ref in enumerate(outputs)]
        return self.block(inner, outputs, come_out, begin, make)

    def block(
        self,
        inner: _Planner,
        outputs: Sequence[Ref],
        outside: Sequence[Static | None],
        inputs: Sequence[Ref],
        make: Callable[..., Loop | Remat],
    ) -> list[Ref]:
        """An instruction with a body; ``outside`` has what of its outputs is static."""
        kept = [inner.output(ref) for ref, static in zip(outputs, outside) if static is None]
        inner.body.outputs = tuple(kept)
        first = len(self.body.meetings)
        self.body.meetings += inner.body.meetings
        around = [Static(ref.place, ref.mapped[: len(self.loops)]) for ref in inner.body.statics]
        for ref in (*around, *inputs):
            self.uses(ref)
        found: list[Ref] = [self.new_local() if static is None else static for static in outside]
        places = tuple(ref.place for ref in found if isinstance(ref, Local))
        meetings = self.meetings_from(first)
        self.body.instructions.append(make(inner.body, tuple(inputs), places, meetings))
        return found

    def meetings_from(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, len(self.body.meetings)))


def _if_static(ref: Ref) -> Static | None:
    return ref if isinstance(ref, Static) else None


def _collected(planned: Plan | Body) -> dict[str, Any]:
    """Copies of the lists and dicts in which a plan or a body collects."""
    return {k: v.copy() for k, v in vars(planned).items() if isinstance(v, (list, dict))}
