"""What the public functions take: one check for each kind of argument.

Each check returns the value it was given, and raises ``ModelError`` with the argument's name, what
it takes and what it got. A number may be traced where its type says ``Array``: its value is then
not looked at.
"""

from __future__ import annotations

import inspect
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


class ModelError(ValueError):
    """Something given to a model does not fit it; the message begins with the layer's place."""


def whole(what: str, value: Any, least: int | None = 1) -> int:
    """A whole number of Python or NumPy, from ``least``."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or (least is not None and value < least):
        bound = "" if least is None else f" from {least}"
        raise ModelError(f"{what}: takes a whole number{bound}, got {told(value)}")
    return int(value)


def number(
    what: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Any:
    """A finite real number above or from a lower bound, and below or up to an upper one."""
    if is_traced(value) and value.shape == () and _is_real(value.dtype):
        return value
    scalar = np.ndim(value) == 0 and hasattr(value, "dtype") and _is_real(value.dtype)
    if (scalar or isinstance(value, Real)) and not isinstance(value, (bool, np.bool_)):
        n = float(value)
        if math.isfinite(n) and above < n < below and least <= n <= most:
            return value
    bounds = (
        [f"above {above:g}"] * (above > -math.inf)
        + [f"from {least:g}"] * (least > -math.inf)
        + [f"below {below:g}"] * (below < math.inf)
        + [f"up to {most:g}"] * (most < math.inf)
    )
    kind = f"a finite number {' and '.join(bounds)}".rstrip()
    raise ModelError(f"{what}: takes {kind}, got {told(value)}")


def choice(what: str, value: Any, words: Any) -> str:
    """One of the words of a ``Literal``."""
    options = get_args(words)
    if not isinstance(value, str) or value not in options:
        raise ModelError(f"{what}: takes one of {', '.join(options)}, got {told(value)}")
    return value


def flag(what: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ModelError(f"{what}: takes True or False, got {told(value)}")
    return bool(value)


def text(what: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ModelError(f"{what}: takes a text, got {told(value)}")
    return value


def function(what: str, value: Any, *, or_none: bool = False) -> Callable[..., Any]:
    """Something that can be called; None where it may be left out."""
    if not (callable(value) or (or_none and value is None)):
        raise ModelError(f"{what}: takes a function, got {told(value)}")
    return value


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of this name."""
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return False


def called_with(what: str, function: Callable[..., Any], *names: str) -> None:
    """Raises unless a function can be called with so many arguments, by place."""
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise ModelError(
            f"{what}: takes a function of ({', '.join(names)}), got {told(function)}: {error}"
        ) from None
    except ValueError:  # a builtin, which does not say
        return


def floating(what: str, value: Any) -> Any:
    """A floating-point dtype, or its name."""
    try:
        fits = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ModelError(f"{what}: takes a floating-point dtype, got {told(value)}")
    return value


def scalar_cost(what: str, value: Any) -> Any:
    """A scalar that has a gradient; ``what`` is whose it is, with an article."""
    scalar = jax.tree.map(jnp.shape, value) == ()
    if not scalar or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ModelError(f"takes {what} that is a scalar, floating-point, got {described(value)}")
    return value


def sequence(what: str, value: Any) -> Sequence[Any]:
    """A list or tuple."""
    if not isinstance(value, (list, tuple)):
        raise ModelError(f"{what}: takes a list or tuple, got {told(value)}")
    return value


def arrays_of(what: str, value: Any) -> Tree:
    """A tree of arrays, or of their shapes and dtypes."""
    if value is None or not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value)):
        raise ModelError(f"{what}: takes a tree of arrays, got {told(value)}")
    return value


def path_of(what: str, value: Any) -> Path:
    """A path in the file system."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ModelError(f"{what}: takes a path, got {told(value)}")
    return Path(value)


def random_key(what: str, value: Any, *, or_none: bool = True) -> Any:
    """One key of ``jax.random``, or None where it may be left out."""
    if value is None and or_none:
        return None
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype == np.uint32 and shape is not None and len(shape) == 1
    if not (typed or raw):
        raise ModelError(
            f"{what}: takes one key of jax.random, got {told(value)}; jax.random.key(0) is one"
        )
    return value


def weights_of(n: int, value: Any) -> Any:
    """A weight for each of n examples: real numbers from 0."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape != (n,) or not (_is_real(dtype) or jnp.issubdtype(dtype, bool)):
        raise ModelError(f"weights: takes one real number per example, ({n},), got {told(value)}")
    if not is_traced(value):
        given = np.asarray(value).astype(np.float64)
        bad = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
        if bad.size:
            raise ModelError(
                f"weights: takes finite numbers from 0, got {given[bad[0]]:g} for example {bad[0]}"
            )
    return value


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape and dtype as JAX takes them: without x64, int64 is int32."""
    dtype = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def is_traced(value: Any) -> bool:
    """Whether a value is not known while a function is traced."""
    return isinstance(value, jax.core.Tracer)


def _is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def told(value: Any) -> str:
    """A value as an error says it: an array or tree of arrays by shapes, anything else as it is."""
    if any(hasattr(leaf, "dtype") and np.ndim(leaf) for leaf in jax.tree.leaves(value)):
        return described(value)
    return textwrap.shorten(repr(value), 300, placeholder=" …")


def described(x: Tree) -> str:
    """Shapes and dtypes of a tree, as an error says them: ``float32(32, 10)``."""

    def leaf_text(leaf: Any) -> Text:
        if hasattr(leaf, "dtype"):
            return Text(f"{leaf.dtype}{tuple(leaf.shape)}")
        return Text(type(leaf).__name__)

    return textwrap.shorten(str(jax.tree.map(leaf_text, x)), 300, placeholder=" …")


class Text(str):
    """Text that prints without quotes inside a tree."""

    __repr__ = str.__str__
