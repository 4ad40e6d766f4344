"""What ``help`` shows of a layer or a loss, its words and its equations forward and back, and what
an editor shows of a module.

The equations are written once, beside the code, as what ``rule``, ``activation`` and ``loss`` take
or in front of the function that makes a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .checks import ModelError, told
from .values import recalled

P = ParamSpec("P")
T = TypeVar("T")


class Equations(NamedTuple):
    """What a layer or a loss computes, one equation a line, or several with two spaces between.

    ``bp.equations`` writes those of a whole model. There ``x`` and ``y`` become what the layers
    around call them, a parameter's symbol (W of ``weight``, b of ``bias``, s of ``scale``, else its
    name) and δ take the number of their layer, and all other letters stay.

    Attributes:
      forward: its output, from its input and parameters.
      backward: ∂C/∂ its input and parameters, from ∂C/∂ its output.
      x, y: what these equations call its input and its output.
      latex: the same two texts in LaTeX, equation for equation and line by line, where a table of
        symbols does not make them well.

    Example:
      >>> bp.tanh.equations.backward
      '∂C/∂z = ∂C/∂a ⊙ (1 − a²)'
    """

    forward: str
    backward: str
    x: str = "x"
    y: str = "y"
    latex: tuple[str, str] | None = None


def stated(what: str, value: Any, x: str = "x", y: str = "y") -> Equations | None:
    """Equations from a pair of texts, forward and backward, about x and y; or as they are."""
    if value is None:
        return None
    if isinstance(value, Equations) and all(isinstance(text, str) for text in value[:4]):
        return value
    if not isinstance(value, tuple) or [type(text) for text in value] != [str, str]:
        raise ModelError(f"{what}: takes two texts, forward and backward, got {told(value)}")
    forward, backward = value
    return Equations(forward, backward, x, y)


def composed(doc: str, equations: Equations | tuple[str, str] | None) -> str:
    """A docstring: its first paragraph, the equations, and the rest."""
    first, _, rest = inspect.cleandoc(doc).partition("\n\n")
    parts = [first]
    for title, text in zip(("Forward:", "Backward:"), equations[:2] if equations else ()):
        parts += [title, textwrap.indent(text, "    ")]
    return "\n\n".join(part for part in (*parts, rest) if part)


def explained(
    forward: str, backward: str, *, x: str = "x", y: str = "y"
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that makes layers or losses, with their equations, about x and y.

    They go into the function's docstring, and with it into every layer or loss that it makes. A
    call with other arguments than it takes is a ``ModelError``, as with other values.
    """
    equations = Equations(inspect.cleandoc(forward), inspect.cleandoc(backward), x, y)

    def explained(make: Callable[P, T]) -> Callable[P, T]:
        doc, signature = inspect.getdoc(make) or "", inspect.signature(make)

        @recalled
        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                names = ", ".join(signature.parameters)
                raise ModelError(f"{make.__name__}: takes {names}: {error}") from None
            result = make(*args, **kwargs)
            return dataclasses.replace(result, equations=equations, doc=doc)  # type: ignore[type-var]

        made.__doc__ = composed(doc, equations)
        return made

    return explained


def shown(names: dict[str, Any]) -> Callable[[], list[str]]:
    """A module's ``__dir__``: of its names those that are public, and Python's own."""
    return lambda: sorted(n for n in names if n in names["__all__"] or re.fullmatch("__.*__", n))
