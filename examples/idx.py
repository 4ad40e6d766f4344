"""MNIST's IDX files, plain or gzip: http://yann.lecun.com/exdb/mnist describes the format."""

import gzip
import math
from pathlib import Path

import numpy as np

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
UNSIGNED_BYTE = 0x08
GZIP = b"\x1f\x8b"


def load(folder):
    """Images (n, 784) from 0 to 1 and labels (n,) of both splits: {"train": (x, y), "test": …}."""
    splits = {}
    for split, names in FILES.items():
        images_file, labels_file = (find(Path(folder), name) for name in names)
        images, labels = read(images_file, axes=3), read(labels_file, axes=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{labels_file}: {len(labels)} labels, for the {len(images)} images of "
                f"{images_file}"
            )
        if labels.max(initial=0) > 9:
            raise ValueError(f"{labels_file}: labels from 0 to 9 expected, read {labels.max()}")
        x = images.reshape(len(images), -1).astype(np.float32) / 255
        splits[split] = (x, labels.astype(np.int32))
    return splits


def find(folder, name):
    """The file of that name, plain or gzip, with either of the usual spellings."""
    spellings = [name, name.replace("-idx", ".idx")]
    candidates = [folder / (s + ending) for s in spellings for ending in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: none of {', '.join(path.name for path in candidates)}")


def read(path, axes):
    """The array of an IDX file of unsigned bytes with that many axes."""
    data = path.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: gzip that cannot be unpacked: {error}") from None
    expected = bytes([0, 0, UNSIGNED_BYTE, axes])
    if data[:4] != expected:
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes with {axes} axes: expected it to begin "
            f"with {expected.hex(' ')}, read {data[:4].hex(' ') or 'nothing'}"
        )
    if len(data) < 4 + 4 * axes:
        raise ValueError(f"{path}: truncated in its header, {len(data)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
    numbers = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if numbers.size != math.prod(shape):
        raise ValueError(
            f"{path}: {math.prod(shape)} numbers expected for shape {shape}, read {numbers.size}"
        )
    return numbers.reshape(shape)
