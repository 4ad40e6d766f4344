"""A fingerprint of what a function computes, the same in every process.

Two functions of one name may compute different things. Their programs, as JAX traces them, say
which: every operation, its operands, its numbers. What does not change a result is left out: names,
where an object lies in memory, and which parts JAX happens to share.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import abstract

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr, Var

Tree = Any


def program_of(function: Callable[..., Tree], *args: Tree) -> tuple[str, Tree]:
    """A fingerprint of what a function computes of arguments of these shapes and dtypes, and the
    shapes of what it returns.

    Constants belong to the program. Where arrays lie does not. Another version of JAX may trace
    another program for the same function.
    """
    shapes = jax.tree.map(lambda a: abstract(a.shape, a.dtype), args)
    jaxpr, results = jax.make_jaxpr(function, return_shape=True)(*shapes)
    return _digest(_jaxpr(jaxpr)), results


def contents_of(arrays: Tree) -> str:
    """A fingerprint of a tree's arrays: of their shapes, dtypes and numbers."""
    return _digest(part for leaf in jax.tree.leaves(arrays) for part in _array(leaf))


def _digest(parts: Iterator[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def _jaxpr(closed: ClosedJaxpr | Jaxpr) -> Iterator[str | bytes]:
    """The operations in order; a variable is called by its number."""
    from jax.extend.core import ClosedJaxpr, Literal  # which takes long

    jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
    numbers: dict[Var, int] = {}

    def new(variables: list[Var]) -> str:
        for variable in variables:
            numbers[variable] = len(numbers)
        return " ".join(str(variable.aval) for variable in variables)

    def operands(atoms: list[Any]) -> Iterator[str | bytes]:
        for atom in atoms:
            if isinstance(atom, Literal):
                yield from _array(atom.val)
            else:
                yield f"{numbers[atom]}"

    yield new(jaxpr.constvars)
    yield new(jaxpr.invars)
    for constant in closed.consts if isinstance(closed, ClosedJaxpr) else ():
        yield from _array(constant)
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from operands(equation.invars)
        yield from _parameter({k: v for k, v in equation.params.items() if k != "name"})
        yield new(equation.outvars)
    yield "->"
    yield from operands(jaxpr.outvars)


def _parameter(value: Any) -> Iterator[str | bytes]:
    """A parameter of an operation, if it is data. A function is not; what JAX has traced of one is
    there beside it."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        yield from _jaxpr(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key)
            yield from _parameter(value[key])
    elif isinstance(value, (tuple, list)):
        yield f"{len(value)}"
        for part in value:
            yield from _parameter(part)
    elif isinstance(value, (set, frozenset)):
        yield from _parameter(sorted(value, key=str))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parameter([getattr(value, part.name) for part in dataclasses.fields(value)])
    elif isinstance(value, (np.ndarray, jax.Array)):
        yield from _array(value)
    elif isinstance(value, Integral):  # of NumPy or Python
        yield f"{int(value)}"
    elif value is None or isinstance(value, (str, float, complex, enum.Enum, np.dtype)):
        yield str(value)


def _array(value: Any) -> Iterator[str | bytes]:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield str(value.dtype)
        value = jax.random.key_data(value)
    array = np.asarray(value)
    yield f"{array.dtype}{array.shape}"
    yield array.tobytes()
