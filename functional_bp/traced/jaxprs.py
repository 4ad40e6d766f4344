"""What is known of JAX's jaxprs: every dependence on the form of an equation is in this file.

A jaxpr is a program in single assignments: equations of one primitive each. Its form is JAX's own
business and changes; what is not as expected here is not followed, and costs time, not exactness.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Equation = Any
Value = Any


def _core() -> Any:
    """JAX's names for programs, imported when a function is traced: that takes a fifth of what
    importing all of this package does."""
    from jax.extend import core

    return core


@dataclass(frozen=True, eq=False)
class Program:
    """A jaxpr: ``equations`` over variables, those of ``inputs`` given and ``constants`` known."""

    inputs: tuple[Any, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Any, ...]
    constants: dict[Any, Value]


def program_of(jaxpr: Any) -> Program:
    """The program of a jaxpr, closed or not."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constants = dict(zip(inner.constvars, getattr(jaxpr, "consts", ())))
    return Program(tuple(inner.invars), tuple(inner.eqns), tuple(inner.outvars), constants)


def is_literal(variable: Any) -> bool:
    """Whether an input of an equation is a constant that stands in it."""
    return isinstance(variable, _core().Literal)


def evaluated(equation: Equation, values: Sequence[Value]) -> list[Value]:
    """The outputs of one equation."""
    primitive = equation.primitive
    alone = _broadcast_beside(values) if primitive.name in ELEMENTWISE else []
    if alone:
        values = [lax.squeeze(value, alone) for value in values]
    with equation.ctx.manager:
        found = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    found = list(found) if primitive.multiple_results else [found]
    return [lax.expand_dims(value, alone) for value in found] if alone else found


def _broadcast_beside(values: Sequence[Value]) -> list[int]:
    """The axes of one entry in all operands, such as a batch of one, where another axis is
    broadcast. What is broadcast is summed on the way back, and beside such an axis XLA's sums over
    examples took 2 ms on a CPU in place of 0.13, up to a fifth of a step."""
    shapes = [jnp.shape(value) for value in values]
    if len(set(map(len, shapes))) > 1 or len(set(shapes)) == 1:
        return []
    return [axis for axis, sizes in enumerate(zip(*shapes)) if set(sizes) == {1}]


def with_effects(program: Program) -> Equation | None:
    """An equation that does more than give its outputs, as ``jax.debug.print`` does."""
    for equation in program.equations:
        if getattr(equation, "effects", ()):
            inside = map(with_effects, map(program_of, _core().jaxprs_in_params(equation.params)))
            return next(filter(None, inside), equation)
    return None


# ---- equations with programs inside


def called(equation: Equation) -> Program | None:
    """The program of ``jit`` and the like, which stands for its equations."""
    if equation.primitive.name not in ("jit", "pjit", "closed_call", "core_call"):
        return None
    jaxpr = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return _of_equation(equation, jaxpr)


def name_of(equation: Equation) -> str | None:
    """The name of a ``jit`` that is of a ``custom_vjp`` alone. (What ``vmap`` or a derivative make
    of one has its name too; of a derivative there is no ``custom_vjp`` left.)"""
    program = called(equation)
    if program is None or len(program.equations) != 1:
        return None
    (inside,) = program.equations
    is_whole = (*inside.invars, *inside.outvars) == (*program.inputs, *program.outputs)
    is_rule = inside.primitive.name.startswith("custom_vjp") and is_whole
    return equation.params.get("name") if is_rule else None


def checkpointed(equation: Equation) -> tuple[Program, Callable[..., Any]] | None:
    """The program of ``jax.checkpoint``, and the same ``jax.checkpoint`` of another function."""
    params = equation.params
    if equation.primitive.name not in ("remat2", "remat", "checkpoint"):
        return None
    program = _of_equation(equation, params.get("jaxpr"))
    if program is None or not {"policy", "prevent_cse"} <= params.keys():
        return None

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.checkpoint(function, policy=params["policy"], prevent_cse=params["prevent_cse"])

    return program, again


@dataclass(frozen=True, eq=False)
class Scan:
    """A ``lax.scan``: its inputs are ``constants`` of every step, then ``carried`` values, then
    those that have an entry for each step."""

    program: Program
    constants: int
    carried: int
    length: int
    reverse: bool
    unroll: int


def scanned(equation: Equation) -> Scan | None:
    """A scan, its inputs told apart by their shapes."""
    params = equation.params
    if equation.primitive.name != "scan" or not {"jaxpr", "length", "reverse"} <= params.keys():
        return None
    program, length = _of_equation(equation, params["jaxpr"]), params["length"]
    if program is None:
        return None

    def stacked(outside: Any, inside: Any) -> bool:
        return outside.aval.shape == (length, *inside.aval.shape)

    xs = [stacked(*pair) for pair in zip(equation.invars, program.inputs)]
    ys = [stacked(*pair) for pair in zip(equation.outvars, program.outputs)]
    carried, constants = ys.count(False), len(xs) - xs.count(True) - ys.count(False)
    told_apart = xs == sorted(xs) and ys == sorted(ys) and constants >= 0
    if not told_apart:
        return None
    unroll = params.get("unroll", 1)
    return Scan(program, constants, carried, length, params["reverse"], unroll)


def reverse_alone(equation: Equation) -> bool:
    """Whether under ``vmap`` an equation has a reverse-mode derivative alone: a ``custom_vjp`` has
    no other, and the cotangents of a branch that is not chosen are held back by
    ``stop_gradient``, through which no tangent is transposed."""
    if equation.primitive.name.startswith("custom_vjp") or equation.primitive.name == "cond":
        return True
    programs = map(program_of, _core().jaxprs_in_params(equation.params))
    return any(reverse_alone(inner) for program in programs for inner in program.equations)


def branches(equation: Equation) -> list[Program] | None:
    """The programs of a ``lax.cond`` or ``switch``; its first input says which."""
    if equation.primitive.name != "cond":
        return None
    programs = [program_of(jaxpr) for jaxpr in equation.params["branches"]]
    fits = all(len(p.inputs) == len(equation.invars) - 1 for p in programs)
    return programs if fits else None


def _of_equation(equation: Equation, jaxpr: Any) -> Program | None:
    if jaxpr is None:
        return None
    program = program_of(jaxpr)
    fits = len(program.inputs) == len(equation.invars)
    return program if fits and len(program.outputs) == len(equation.outvars) else None


# ---- how a parameter meets an example

ELEMENTWISE = (
    *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter"),
    *("select_n", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "copy"),
    "convert_element_type",
)


@dataclass(frozen=True)
class Product:
    """``dot_general``: the axes of both operands that go together, and those that are summed."""

    batch: tuple[tuple[int, ...], tuple[int, ...]]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]


def product(equation: Equation) -> Product | None:
    """A matrix product."""
    numbers = equation.params.get("dimension_numbers")
    if equation.primitive.name != "dot_general" or numbers is None:
        return None
    contracted, batch = (tuple(map(tuple, axes)) for axes in numbers)
    return Product(batch, contracted)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LookUp:
    """Rows of a table's ``axis``, one for each id; ``offsets``: which axes of the output are those
    of a row. An id outside is the nearest inside where it ``clips``, else it has no row."""

    axis: int
    offsets: tuple[int, ...]
    clips: bool


def look_up(equation: Equation) -> LookUp | None:
    """A ``gather`` of whole rows."""
    if equation.primitive.name != "gather":
        return None
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table = equation.invars[0].aval.shape
    axes = tuple(numbers.start_index_map)
    if len(axes) != 1 or axes != tuple(numbers.collapsed_slice_dims):
        return None
    if getattr(numbers, "operand_batching_dims", ()):
        return None
    if tuple(sizes) != tuple(1 if i == axes[0] else size for i, size in enumerate(table)):
        return None
    clips = equation.params["mode"] == lax.GatherScatterMode.CLIP
    return LookUp(axes[0], tuple(numbers.offset_dims), clips)


def convolution(equation: Equation) -> dict[str, Any] | None:
    """What ``lax.conv_general_dilated`` takes besides its operands."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")
    params = equation.params
    if not {*names, "dimension_numbers"} <= params.keys() or params.get("batch_group_count") != 1:
        return None
    options = {name: params[name] for name in names}
    return options | {"dimension_numbers": params["dimension_numbers"]}


# ---- what becomes of parameters before

_MOVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("reshape", "squeeze", "convert_element_type", "reduce_precision", "copy"), ()),
    **dict.fromkeys(("add", "add_any", "sub", "neg", "mul", "div"), ()),
    "transpose": ("permutation",),
    "broadcast_in_dim": ("broadcast_dimensions",),
    "slice": ("start_indices", "strides"),
    "split": ("sizes", "axis"),
    "concatenate": ("dimension",),
    "dot_general": ("dimension_numbers",),
}


def move(equation: Equation) -> tuple[str, dict[str, Any]] | None:
    """An operation that factors may go through: its name, and what it is told."""
    name, params = equation.primitive.name, equation.params
    if name not in _MOVES or not set(_MOVES[name]) <= params.keys():
        return None
    return name, {told: params[told] for told in _MOVES[name]}


# ---- where in the user's source


def source_of(equation: Equation) -> str | None:
    """``file:line`` of the user's code that an equation comes from, if it is known."""
    traceback = getattr(equation.source_info, "traceback", None)
    frames = [
        frame
        for frame in getattr(traceback, "frames", None) or ()
        if not frame.file_name.startswith((_HERE, _JAX))
    ]
    theirs = [frame for frame in frames if _SITE_PACKAGES not in frame.file_name]
    for frame in theirs or frames:
        return f"{frame.file_name}:{frame.line_num}"
    return None


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_SITE_PACKAGES = f"{os.sep}site-packages{os.sep}"
