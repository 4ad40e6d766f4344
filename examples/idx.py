"""IDX files, plain or gzip: the format of MNIST and Fashion-MNIST.

byte 0, 1   zero
byte 2      the type of the data; 8 is unsigned bytes
byte 3      the number of dimensions
4 bytes     the size of each dimension, most significant byte first
the data    row by row
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 8


class IdxError(ValueError):
    """A file is not what it should be; the message names it, what it has and what was expected."""


def read(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise IdxError(
                f"{path}: expected a whole gzip file, got a broken one: {error}"
            ) from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise IdxError(
            f"{path}: expected an IDX file of unsigned bytes, which begins 00 00 08, "
            + (
                f"got one that begins {content[:4].hex(' ')}"
                if content
                else "got one that is empty"
            )
        )
    dimensions = content[3]
    begin = 4 + 4 * dimensions
    if len(content) < begin:
        raise IdxError(
            f"{path}: expected the sizes of {dimensions} dimensions, got a file of "
            f"{len(content)} bytes; is it truncated?"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise IdxError(
            f"{path}: expected {math.prod(shape):,} bytes for its shape {shape}, got "
            f"{len(content) - begin:,}; is it truncated?"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def load(folder: Path, part: str, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Images, as numbers from 0 to 1, ``(n, rows * columns)``, and labels, ``(n,)``.

    Args:
      part: ``train`` or ``t10k``, as the files' names begin.
    """
    images_path, labels_path = (
        find(folder, f"{part}-images-idx3"),
        find(folder, f"{part}-labels-idx1"),
    )
    images, labels = read(images_path), read(labels_path)
    if images.ndim != 3:
        raise IdxError(f"{images_path}: expected images (n, rows, columns), got {images.shape}")
    if labels.ndim != 1:
        raise IdxError(f"{labels_path}: expected labels (n,), got {labels.shape}")
    if len(images) != len(labels):
        raise IdxError(
            f"{labels_path}: expected a label for each of the {len(images):,} images in "
            f"{images_path.name}, got {len(labels):,}"
        )
    if len(labels) == 0:
        raise IdxError(f"{images_path}: expected images, got none")
    if labels.max() >= classes:
        raise IdxError(
            f"{labels_path}: expected labels from 0 to {classes - 1}, got {labels.max()}"
        )
    x = images.reshape(len(images), -1).astype(np.float32) / 255
    return x, labels.astype(np.int32)


def find(folder: Path, name: str) -> Path:
    """The file of that name, plain or gzip, with a dash or a dot before ``idx``."""
    names = [
        f"{spelled}-ubyte{end}"
        for end in ("", ".gz")
        for spelled in (name, name.replace("-idx", ".idx"))
    ]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise IdxError(f"{folder}: expected one of {', '.join(names)}, got none of them")
