"""What a layer and a loss are to Python: values that are never changed, made by a call."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Value:
    """Copies of it are itself. It pickles as the call that made it, or as its public name.

    What was changed since, by ``dataclasses.replace``, pickles as functions do: not if they are
    inside others. (cloudpickle takes those.)
    """

    name: str
    made_by: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        for path in (self.name, f"losses.{self.name}"):
            if _public(path) is self:
                return _public, (path,)
        if self.made_by is None:
            return super().__reduce_ex__(protocol)
        make, args, options = self.made_by
        return functools.partial(make, **options), args


def _public(path: str) -> Any:
    """What the package calls so, or None."""
    try:
        return operator.attrgetter(path)(sys.modules["functional_bp"])
    except AttributeError:
        return None


def recalled(make: Callable[P, T]) -> Callable[P, T]:
    """A function that makes values, which remember the call."""

    @functools.wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> T:
        value = make(*args, **options)
        object.__setattr__(value, "made_by", (made, args, options))  # it is frozen, but new
        return value

    return made
