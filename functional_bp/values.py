"""What a layer and a loss are to Python: values that are never changed, made of functions."""

from __future__ import annotations

from typing import Any, NoReturn, Self


class Value:
    """Copies of it are itself. It does not pickle, for what it does is code."""

    name: str

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self.name}: is made of functions, which do not pickle; keep the code that makes it, "
            "and save the parameters with bp.save_params"
        )
