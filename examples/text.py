"""Text to learn by its characters: reading it, its ids, windows, what a run says and keeps."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

import functional_bp as bp

HELD_OUT = 0.05  # of the text, at its end


class TextError(Exception):
    """A text that cannot be learnt from; the message says why."""


def text_of(path: Path | None, least: int) -> str:
    """The text of a file, or the topics of Python's ``help()``; of so many characters at least."""
    text = default_text() if path is None else read_text(path)
    if len(text) < least:
        raise TextError(f"text: takes at least {least:,} characters, got {len(text):,}")
    return text


def default_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{path}: takes text in UTF-8, got {error.reason} at byte {error.start}"
        raise TextError(message) from error
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    if not text:
        raise TextError(f"{path}: takes a text, got an empty file")
    return text


def characters_and_ids(text: str) -> tuple[list[str], np.ndarray, int]:
    """The characters that there are, sorted; the place of each of the text's among them; and where
    the held-out text begins."""
    characters = sorted(set(text))
    ids = np.searchsorted(characters, list(text)).astype(np.int32)
    cut = len(ids) - int(HELD_OUT * len(ids))
    print(f"{cut:,} characters to learn from, {len(ids) - cut:,} held out, {len(characters)} kinds")
    return characters, ids, cut


def windows(
    ids: np.ndarray, length: int, size: int, seed: tuple[int, int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (characters, the characters that follow), ``(size, length)`` each, from a random
    place on and in random order; without a seed, from the beginning in order."""
    random = np.random.default_rng(seed)
    first = 0 if seed is None else int(random.integers(length))
    starts = np.arange(first, len(ids) - length, length)
    if seed is not None:
        random.shuffle(starts)
    for begin in range(0, len(starts), size):
        positions = starts[begin : begin + size, None] + np.arange(length)
        yield ids[positions], ids[positions + 1]


def reporting() -> Callable[[bp.Run], None]:
    """A callback of ``bp.fit`` that prints the bits per character after every epoch."""
    begin = time.perf_counter()

    def report(run: bp.Run) -> None:
        history = run.history
        print(
            f"epoch {run.epoch:2d}   {time.perf_counter() - begin:5.1f} s   bits per character: "
            f"{history.epoch_loss[-1] / math.log(2):.3f} learning, "
            f"{history.evaluation['loss'][-1] / math.log(2):.3f} held out",
            flush=True,
        )

    return report


@dataclass(frozen=True)
class Kept:
    """What a run keeps in a folder: its checkpoints, and the characters that its ids stand for."""

    folder: Path
    name: str

    @property
    def checkpoints(self) -> Path:
        return self.folder / f"{self.name}-checkpoints"

    def has_checkpoints(self) -> bool:
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def begin(self, characters: list[str], resume: bool) -> None:
        """A resumed run takes the characters of the run it goes on with: their ids are the
        model's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / f"{self.name}-characters.json"
        if resume and self.has_checkpoints():
            theirs = read_characters(known)
            if theirs != characters:
                differ = sorted(set(theirs) ^ set(characters))
                raise TextError(
                    f"--resume: takes the text of the run in {self.folder}, got one with other "
                    f"characters: {differ}"
                )
        else:
            bp.delete_checkpoints(self.checkpoints)  # refused while another run writes there
        write_characters(known, characters)

    def stop(self) -> NoReturn:
        """Says what Ctrl-C has left, and ends the program."""
        kept = f"--resume goes on from {self.checkpoints}"
        print(f"stopped; {kept if self.has_checkpoints() else 'no step is done'}", file=sys.stderr)
        sys.exit(130)  # as a program does that Ctrl-C ends


def read_characters(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(
            f"--resume: takes {path}, the characters of the run to go on with: {error.strerror}"
        ) from error
    try:
        characters = json.loads(content)
    except ValueError:  # neither JSON nor UTF-8
        characters = None
    if not isinstance(characters, list) or not all(isinstance(c, str) for c in characters):
        raise TextError(
            f"--resume: takes {path}, a JSON list of the characters of the run to go on with, got "
            f"{len(content)} bytes that are not a whole one"
        )
    return characters


def write_characters(path: Path, characters: list[str]) -> None:
    """The file is there whole or not at all, and is left alone where it says the same."""
    content = json.dumps(characters)
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") == content:
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            written = Path(folder) / path.name
            written.write_text(content, encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        raise TextError(f"{path}: could not be written: {error.strerror}") from error
