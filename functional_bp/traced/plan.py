"""A plan of a function of parameters and one example: where the two meet.

What no example reaches is *static*: parameters, constants, and whatever is made of them alone, in
or out of loops. It is computed once, by the plan's ``steps``. The rest, the plan's ``body``, goes
over a batch. A *meeting* is an operand of the body that is static and made of parameters: there the
factors of a gradient are read, an activation and a δ.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    evaluated,
    is_literal,
    scanned,
    source_of,
)
from .routes import Route, recognised

Value = Any
OUTPUT = "the output"


@dataclass(frozen=True, eq=False)
class Source:
    """Where an equation is in the user's code, looked up when it is asked for.

    Attributes:
      equations: the equation, and those around it that called it, from the inside out. (JAX keeps
        the program of a jitted function from where it was called first.)
    """

    equations: tuple[Equation, ...]

    def __str__(self) -> str:
        found = filter(None, map(source_of, self.equations))
        return next(found, "unknown source")


@dataclass(frozen=True)
class Static:
    """A static value, by its place among those of the plan.

    Inside loops it may have an entry for each turn: ``mapped`` says over which of the loops around,
    the outermost first, and those axes come first.
    """

    place: int
    mapped: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Local:
    """A value of the body, which an example may reach."""

    place: int


Ref = Static | Local


@dataclass(frozen=True, eq=False)
class Step:
    """A static equation, over all turns of the loops that any of its inputs is mapped over."""

    equation: Equation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    maps: tuple[tuple[int | None, ...], ...]
    source: Source

    def __call__(self, *values: Value) -> list[Value]:
        function: Callable[..., list[Value]] = functools.partial(_evaluated, self.equation)
        for axes in reversed(self.maps):
            function = jax.vmap(function, axes)
        return function(*values)


def _evaluated(equation: Equation, *values: Value) -> list[Value]:
    return evaluated(equation, values)


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where a static value that is made of parameters meets an example.

    Attributes:
      static: the value.
      loops: the lengths of the loops around, the outermost first.
      tap: the shape and dtype of what δ is the cotangent of, for one turn of the loops.
      route: how the two meet; None where that is not known, and δ is the gradient itself.
      operation: what it is called.
      source: where it is in the user's code.
    """

    static: Static
    loops: tuple[int, ...]
    tap: jax.ShapeDtypeStruct
    route: Route | None
    operation: str
    source: Source

    @property
    def is_unknown(self) -> bool:
        """Whether what is kept for each example may be larger than what the operation gives."""
        return self.route is None and self.operation not in (*ELEMENTWISE, OUTPUT)


@dataclass(frozen=True, eq=False)
class Instruction:
    """One equation of the body: the ``meetings`` are of the inputs at ``operands``."""

    equation: Equation | None
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    operands: tuple[int, ...] = ()
    meetings: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """An equation with a body of its own: a loop, or what is computed again on the way back.

    Of a loop ``kinds`` tells the inputs apart: 0 the same at every turn, 1 carried, 2 with an entry
    for each turn.
    """

    body: Body
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    meetings: tuple[int, ...]
    scan: Scan | None = None
    kinds: tuple[int, ...] = ()
    again: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """A ``cond`` whose branch an example chooses: all are computed, as under ``vmap``, and
    the chosen one's outputs are taken."""

    index: Ref
    bodies: tuple[Body, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    meetings: tuple[int, ...]


@dataclass(eq=False)
class Body:
    """Instructions over local values: the first places are the inputs'."""

    inputs: int
    instructions: list[Instruction | Block | Choice] = field(default_factory=list)
    outputs: tuple[Ref, ...] = ()
    statics: dict[Static, None] = field(default_factory=dict)
    places: int = 0
    meetings: list[Meeting] = field(default_factory=list)


@dataclass(eq=False)
class Plan:
    """What is static, how it comes about, and the body.

    Attributes:
      leaves: how many parameters there are: the first static values.
      learned: for each static value, whether it is made of parameters.
      known: static values that are constants.
      steps: how the others come about, in order.
      shapes: and dtypes of all of them, over all turns of their loops.
      splits: whether what is computed with taps is dearer, or safe from what is not finite in a
        branch that was not chosen, in the cotangents of taps alone.
    """

    leaves: int
    body: Body
    learned: list[bool] = field(default_factory=list)
    known: dict[int, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    shapes: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    splits: bool = False


class NotFollowed(Exception):
    """A loop in which a parameter meets an example in a way that is not known."""


def plan_of(program: Program, leaves: int, trained: Sequence[bool]) -> Plan:
    """The plan of a program whose first ``leaves`` inputs are parameters, the rest an example."""
    plan = Plan(leaves, Body(len(program.inputs) - leaves))
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
            self.plan.splits |= equation.primitive.name not in ELEMENTWISE
        meetings = []
        for i in operands:
            like = equation.outvars[0] if route else equation.invars[i]
            tap = abstract(like.aval.shape, like.aval.dtype)
            meetings.append(self.meeting(refs[i], tap, route, equation))
        return self.instruction(equation, refs, operands=operands, meetings=tuple(meetings))

    def check_cost(self, equation: Equation, operands: Sequence[int]) -> None:
        """In a loop a gradient for each turn would be kept, so it must be as small as an output."""
        largest = max(math.prod(variable.aval.shape) for variable in equation.outvars)
        sizes = [math.prod(equation.invars[i].aval.shape) for i in operands]
        if self.loops and equation.primitive.name not in ELEMENTWISE and max(sizes) > largest:
            raise NotFollowed(equation)

    def meeting(
        self,
        ref: Any,
        tap: jax.ShapeDtypeStruct,
        route: Route | None,
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
        before = self.mark()
        try:
            if scan is not None:
                return self.loop(scan, refs)
            if remat is not None:
                return self.remat(*remat, refs)
            if programs is not None and isinstance(refs[0], Local):
                return self.choice(programs, refs)
            return None
        except NotFollowed:
            if self.loops:
                raise
            self.back_to(before)
            return None

    def mark(self) -> tuple[int, ...]:
        lists = self.plan.learned, self.plan.steps, self.body.meetings, self.body.instructions
        return (self.body.places, *(len(some) for some in lists))

    def back_to(self, mark: tuple[int, ...]) -> None:
        """Forgets what was planned since."""
        self.body.places, statics, steps, meetings, instructions = mark
        del self.plan.learned[statics:], self.plan.shapes[statics:]
        self.plan.known = {k: v for k, v in self.plan.known.items() if k < statics}
        self.body.statics = {ref: None for ref in self.body.statics if ref.place < statics}
        del self.plan.steps[steps:], self.body.meetings[meetings:]
        del self.body.instructions[instructions:]

    def choice(self, programs: Sequence[Program], refs: Sequence[Ref]) -> list[Ref]:
        index, *refs = refs
        taken = tuple(ref for ref in refs if isinstance(ref, Local))
        bodies, first = [], len(self.body.meetings)
        for program in programs:
            inner = _Planner(self.plan, Body(len(taken)), self.loops, self.calls)
            inputs = [inner.new_local() if isinstance(ref, Local) else ref for ref in refs]
            inner.body.outputs = tuple(map(inner.output, inner.walk(program, inputs)))
            self.body.meetings += inner.body.meetings
            self.body.statics |= inner.body.statics
            bodies.append(inner.body)
        outputs: list[Ref] = [self.new_local() for _ in programs[0].outputs]
        places = tuple(ref.place for ref in outputs)
        meetings = tuple(range(first, len(self.body.meetings)))
        self.body.instructions.append(Choice(index, tuple(bodies), taken, places, meetings))
        self.plan.splits = True
        return outputs

    def remat(self, program: Program, again: Callable[..., Any], refs: Sequence[Ref]) -> list[Ref]:
        locals_ = [ref for ref in refs if isinstance(ref, Local)]
        inner = _Planner(self.plan, Body(len(locals_)), self.loops, self.calls)
        inputs = [inner.new_local() if isinstance(ref, Local) else ref for ref in refs]
        outputs = inner.walk(program, inputs)
        outside = [ref if isinstance(ref, Static) else None for ref in outputs]
        return self.block(inner, outputs, outside, inputs=tuple(locals_), again=again)

    def loop(self, scan: Scan, refs: Sequence[Ref]) -> list[Ref]:
        program, first = scan.program, scan.constants
        last = first + scan.carried
        carries = dict(zip(program.inputs[first:last], program.outputs[: scan.carried]))

        def given(i: int, ref: Ref) -> Ref | None:
            """What a static input is inside; None for one that the body takes."""
            carried = first <= i < last and carries[program.inputs[i]] is not program.inputs[i]
            if isinstance(ref, Local) or carried:
                return None
            return Static(ref.place, (*ref.mapped, i >= last))

        inside = [given(i, ref) for i, ref in enumerate(refs)]
        taken = [i for i, ref in enumerate(inside) if ref is None]
        begin = [self.output(refs[i]) for i in taken]
        inner = _Planner(self.plan, Body(len(taken)), (*self.loops, scan.length), self.calls)
        inputs = [inner.new_local() if ref is None else ref for ref in inside]
        outputs = inner.walk(program, inputs)

        def outside(i: int, ref: Ref) -> Static | None:
            """What comes out static: what every turn left as it was, or a value for each turn."""
            static = i + first not in taken if i < scan.carried else _is_mapped(ref)
            return Static(ref.place, ref.mapped[:-1]) if static else None  # type: ignore[union-attr]

        return self.block(
            inner,
            outputs,
            [outside(i, ref) for i, ref in enumerate(outputs)],
            inputs=tuple(begin),
            scan=scan,
            kinds=tuple((i >= first) + (i >= last) for i in taken),
        )

    def block(
        self,
        inner: _Planner,
        outputs: Sequence[Ref],
        outside: Sequence[Static | None],
        **options: Any,
    ) -> list[Ref]:
        """An instruction with a body; ``outside`` has what of its outputs is static."""
        kept = [inner.output(ref) for ref, static in zip(outputs, outside) if static is None]
        inner.body.outputs = tuple(kept)
        first = len(self.body.meetings)
        self.body.meetings += inner.body.meetings
        for ref in inner.body.statics:
            self.uses(Static(ref.place, ref.mapped[: len(self.loops)]))
        for ref in options["inputs"]:
            self.uses(ref)
        found: list[Ref] = [self.new_local() if static is None else static for static in outside]
        places = tuple(ref.place for ref in found if isinstance(ref, Local))
        meetings = tuple(range(first, len(self.body.meetings)))
        self.body.instructions.append(
            Block(inner.body, outputs=places, meetings=meetings, **options)
        )
        return found


def _is_mapped(ref: Ref) -> bool:
    return isinstance(ref, Static) and ref.mapped[-1]
