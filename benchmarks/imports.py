"""Importing

Each time in a new process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

from .compare import Candidate, Row


def rows() -> Iterable[Row]:
    yield Row(
        "import functional_bp",
        [
            _importing("ours, after jax and optax", "functional_bp"),
            _importing("jax and optax themselves", "jax, optax"),
        ],
    )


def _importing(name: str, modules: str) -> Candidate:
    before = "" if "jax" in modules else "import jax, optax"
    program = (
        f"import time; {before}\nstart = time.perf_counter()\n"
        f"import {modules}\nprint(time.perf_counter() - start)"
    )

    def seconds() -> float:
        return float(subprocess.check_output([sys.executable, "-c", program], text=True))

    return Candidate(
        name, lambda: (seconds, ()), jit=False, same=False, clock=lambda function, _: function()
    )
