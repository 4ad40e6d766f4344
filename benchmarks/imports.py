"""Importing

Each time in a new process.
"""

from __future__ import annotations

import os
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
    # Collected first: otherwise a pass of the garbage collector over jax's objects, due at some
    # later allocation whosever it is, falls now into the one and now into the other.
    before = "" if "jax" in modules else "import jax, optax; import gc; gc.collect()"
    program = (
        f"import time; {before}\nstart = time.perf_counter()\n"
        f"import {modules}\nprint(time.perf_counter() - start)"
    )

    def seconds() -> float:
        # With compiled bytecode on disk, as pip leaves it.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [sys.executable, "-c", program]
        return float(subprocess.check_output(command, text=True, env=environment))

    return Candidate(
        name, lambda: (seconds, ()), jit=False, same=False, clock=lambda function, _: function()
    )
