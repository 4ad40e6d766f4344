"""A plan of a function of parameters and one example: where the two meet.

What no example reaches is *static*: parameters, constants, and whatever is made of them alone, in
or out of loops. It is computed once, by the plan's ``steps``. The rest, the plan's ``body``, goes
over a batch. A *meeting* is an operand of the body that is static and made of parameters: there the
factors of a gradient are read, an activation and a δ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from .jaxprs import ELEMENTWISE, Equation, Scan, evaluated, source_of
from .routes import InNamed, Route

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
      tap: the shape and dtype of what δ is the cotangent of, for one turn of the loops; where a
        rule is known by name, of every array that its factors hold.
      route: how the two meet; None where that is not known, and δ is the gradient itself.
      operation: what it is called.
      source: where it is in the user's code.
    """

    static: Static
    loops: tuple[int, ...]
    tap: Any
    route: Route | InNamed | None
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
class Loop:
    """A ``scan``; ``kinds`` of its inputs: 0 the same at every turn, 1 carried, 2 with an entry for
    each turn."""

    body: Body
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    meetings: tuple[int, ...]
    scan: Scan
    kinds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Remat:
    """A ``checkpoint``: ``again(function)`` is computed again on the way back."""

    body: Body
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    meetings: tuple[int, ...]
    again: Callable[..., Any]


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
    """Instructions over local values, of which the first are the inputs.

    Attributes:
      statics: the static values that it uses, in order.
      places: how many local values there are.
    """

    instructions: list[Instruction | Loop | Remat | Choice] = field(default_factory=list)
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
      taps_apart: whether δ at the meetings is to be found by a pass of its own, when it is asked
        for: with taps in it, the pass that gives totals and ∂C/∂x would be dearer, or take up what
        is not finite in a branch that was not chosen.
    """

    leaves: int
    body: Body = field(default_factory=Body)
    learned: list[bool] = field(default_factory=list)
    known: dict[int, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    shapes: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    taps_apart: bool = False
