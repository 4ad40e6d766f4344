"""Runs the comparisons; ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
from pathlib import Path

import jax

from . import FAMILIES
from .compare import HEADER, compare, lines_of

HERE = Path(__file__).parent


def main() -> None:
    arguments = _parsed()
    chosen = _chosen(arguments.names)
    budget, turns = (0.1, (2, 3)) if arguments.quick else (arguments.budget, (5, 400))
    save = arguments.save
    if save is None and not arguments.names and not arguments.quick:
        save = HERE

    machine = _machine()
    text: list[str] = []
    record = []

    def say(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        text.extend(lines)

    say(_heading(machine))
    for family, rows in chosen:
        title, _, notes = family.__doc__.strip().partition("\n\n")
        say(f"\n## {title}\n", *[f"{notes}\n"] * bool(notes), HEADER)
        missing: list[str] = []
        for row in rows:
            results, skipped = compare(row, budget=budget, turns=turns)
            say(*lines_of(row.title, results))
            missing += skipped
            record.append(
                {
                    "family": family.__name__.rpartition(".")[2],
                    "title": row.title,
                    "results": [dataclasses.asdict(result) for result in results],
                    "skipped": skipped,
                }
            )
        say(*[f"\n{line}" for line in missing])
    if save:
        save.mkdir(parents=True, exist_ok=True)
        (save / "RESULTS.md").write_text("\n".join(text) + "\n")
        (save / "results.json").write_text(
            json.dumps({"machine": machine, "rows": record}, indent=1) + "\n"
        )
        print(f"saved: {save / 'RESULTS.md'}, {save / 'results.json'}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares hand-written gradients with autodiff, the usual and the strongest "
        "form, on this machine's default device. Ratios count, not milliseconds.",
        epilog=f"Families: {', '.join(FAMILIES)}. A full run takes some minutes and replaces "
        "RESULTS.md and results.json in this package.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a family, or words of a row's title; default all"
    )
    parser.add_argument("--quick", action="store_true", help="a few calls each: does it run?")
    parser.add_argument(
        "--budget", type=float, default=6, metavar="S", help="seconds of calls per row (default 6)"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="where to write the table; default: this package after a full run, else nowhere",
    )
    return parser.parse_args()


def _chosen(names: list[str]) -> list[tuple]:
    """(family, its rows) for what was asked."""
    chosen, unknown = [], set(names)
    for name in FAMILIES:
        family = importlib.import_module(f"{__package__}.{name}")
        rows = []
        for row in family.rows():
            matching = {n for n in names if n == name or n in row.title}
            unknown -= matching
            if matching or not names:
                rows.append(row)
        if rows:
            chosen.append((family, rows))
    if unknown:
        raise SystemExit(f"no family and no row is called {', '.join(sorted(unknown))}")
    return chosen


def _machine() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


HEADING = """\
# Benchmarks

Written by `python -m benchmarks`.

{machine}

Ratios count, not milliseconds: candidates of a row ran by turns in one process; a ratio is the
median over turns of our time over theirs, below 1 where ours is faster. *usual* is what most
people write, *strongest* what an expert would. Temp MiB is what the program allocates besides its
arguments and results, whose memory serves as scratch space too. Trace and compile are medians
after a first time."""


def _heading(machine: dict[str, str]) -> str:
    return HEADING.format(machine="\n".join(f"- {k}: {v}" for k, v in machine.items()))


if __name__ == "__main__":
    main()
