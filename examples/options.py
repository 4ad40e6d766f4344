"""What the examples take on their command lines: a parser, and what is a ``type=`` of argparse."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRIVACY = ("chex", "dp_accounting", "jax_privacy")  # modules that the extra ``privacy`` brings


class Parser(argparse.ArgumentParser):
    """Describes an example by its docstring, line for line.

    Args:
      needs: the modules of extras that the example is to import when it is at work. Where one is
        not installed, it ends before it begins; ``--help`` takes none.
    """

    def __init__(
        self, docstring: str | None, needs: tuple[str, ...] = ("matplotlib", "sklearn")
    ) -> None:
        super().__init__(
            description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.needs = needs

    def parse_args(self, *given: Any) -> Any:
        args = super().parse_args(*given)
        missing = [module for module in self.needs if not installed(module)]
        if missing:
            extras = sorted({"privacy" if module in PRIVACY else "examples" for module in missing})
            sys.exit(
                f"takes {' and '.join(missing)}, not installed here; "
                f"pip install -e '.[{','.join(extras)}]'"
            )
        return args

    def takes(self, option: str, kind: Callable[[str], Any], default: Any, meaning: str) -> None:
        self.add_argument(option, type=kind, default=default, help=f"{meaning} (%(default)s)")

    def learns_text(self) -> None:
        """Adds ``--text``, a file."""
        self.add_argument(
            "--text",
            type=Path,
            metavar="FILE",
            help="learn this text, in UTF-8 (default: the topics of Python's help())",
        )

    def samples_at(self, *temperatures: float) -> None:
        """Adds ``--temperature``, one or several."""
        self.add_argument(
            "--temperature",
            type=number(above=1e-3, up_to=1e3),
            nargs="+",
            metavar="T",
            default=list(temperatures),
            help="of the samples: below 1 likelier characters, above 1 wilder ones (default: "
            f"{' '.join(map(str, temperatures))})",
        )

    def resumes(self, kept: str) -> None:
        """Adds ``--out``, a folder for what is kept, and ``--resume`` from its checkpoints."""
        self.add_argument(
            "--out",
            type=folder,
            metavar="DIR",
            default="out",
            help=f"folder for the {kept} (default: %(default)s)",
        )
        self.add_argument(
            "--resume",
            action="store_true",
            help="go on from the latest checkpoint in the output folder; a run without this option "
            "deletes the checkpoints there and begins anew",
        )


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False


def whole(least: int = 1, up_to: float = math.inf) -> Callable[[str], int]:
    """A whole number from ``least``, and at most ``up_to``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= up_to:
            until = "" if math.isinf(up_to) else f" to {up_to}"
            raise argparse.ArgumentTypeError(
                f"takes a whole number from {least}{until}, got {text}"
            )
        return value

    return parse


def number(
    above: float = 0.0, up_to: float = math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """A finite number above ``above``, at most ``up_to`` and below ``below``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value <= up_to and value < below):  # also where it is not a number
            until = "" if math.isinf(up_to) else f", up to {up_to:g}"
            until += "" if math.isinf(below) else f", below {below:g}"
            raise argparse.ArgumentTypeError(f"takes a number above {above:g}{until}; got {text}")
        return value

    return parse


seed = whole(0, 2**32 - 1)  # what a JAX key, a NumPy generator and scikit-learn all take


def folder(text: str) -> Path:
    """A folder, which need not exist yet."""
    path = Path(text)
    try:
        for part in (path, *path.parents):
            if part.exists() and not part.is_dir():
                raise argparse.ArgumentTypeError(f"takes a folder, got {text}: {part} is a file")
    except OSError as error:  # a name too long, a folder that may not be entered
        message = f"takes a folder, got {text}: {error.strerror}"
        raise argparse.ArgumentTypeError(message) from error
    return path
