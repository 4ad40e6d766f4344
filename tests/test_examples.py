"""The examples, as a newcomer runs them, shortened."""

import gzip
import runpy
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("sklearn")


@pytest.fixture
def train_digits(monkeypatch):
    """The example's module, its deep networks shallow, and a function that sets its options."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_digits

    monkeypatch.setattr(train_digits, "DEPTH", 2)
    return train_digits


@pytest.fixture
def options(monkeypatch):
    """Sets the command line."""
    return lambda *given: monkeypatch.setattr(sys, "argv", ["train_digits.py", *map(str, given)])


def idx_file(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)


def written(folder, compress=False):
    """The four files of a little MNIST."""
    random = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = random.integers(0, 256, (n, 4, 4), np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_file(array) + array.tobytes()
            if compress:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return folder


def test_digits_are_learned_with_gradients_equal_to_autodiffs(
    train_digits, options, tmp_path, capsys
):
    options("--deep-steps", 20, "--out", tmp_path)
    train_digits.main()
    lines = dict(
        line.strip().split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line
    )
    assert float(lines["test accuracy"].rstrip("%")) >= 97
    difference = lines["largest relative difference of manual and autodiff gradients"]
    assert 0 < float(difference) < 5e-6
    for picture in ("learning.png", "errors.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_images_of_ones_own_are_learned_and_gone_on_with(train_digits, options, tmp_path, capsys):
    def learn(*given):
        options("--data", written(tmp_path, compress=True), "--out", tmp_path, *given)
        given = train_digits.command_line()
        run, _ = train_digits.learn(*train_digits.load(given.data), given)
        return run, capsys.readouterr().out

    learn("--epochs", 2)
    resumed, out = learn("--epochs", 3, "--resume")
    assert "epoch  2" not in out and "epoch  3" in out
    whole, out = learn("--epochs", 3)
    assert "epoch  1" in out
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_help_says_what_the_example_does(train_digits, options, capsys):
    options("--help")
    with pytest.raises(SystemExit):
        train_digits.main()
    out = capsys.readouterr().out
    assert "by the hand-written δ recursion" in out
    for option in ("--data", "--out", "--resume", "--epochs"):
        assert option in out


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_plain_and_gzip(compress, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import idx

    x, y = idx.load(written(tmp_path, compress), "train")
    assert x.shape == (40, 16) and x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
    assert y.tolist() == [n % 10 for n in range(40)]


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"
FEW, MANY = np.zeros(3, np.uint8), np.full(40, 10, np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, lambda good: good[:-1], r"expected 640 bytes .* \(40, 4, 4\), got 639"),
        (IMAGES, lambda good: good + b"\0", "expected 640 bytes .* got 641"),
        (IMAGES, lambda good: good[:9], "expected the sizes of 3 dimensions, got a file of 9"),
        (IMAGES, lambda good: good[:3], "expected an IDX file .* begins 00 00 08$"),
        (IMAGES, lambda good: b"", "got one that is empty"),
        (IMAGES, lambda good: b"<!DOCTYPE html>", "got one that begins 3c 21 44 4f"),
        (IMAGES, lambda good: b"\0\0\x0d" + good[3:], "unsigned bytes, .* begins 00 00 0d 03"),
        (IMAGES, lambda good: gzip.compress(good)[:-20], "expected a whole gzip file"),
        (IMAGES, lambda good: gzip.compress(good)[:30] + bytes(20), "expected a whole gzip file"),
        (IMAGES, lambda good: idx_file(MANY) + MANY.tobytes(), r"expected images .* \(40,\)"),
        (LABELS, lambda good: idx_file(np.zeros((2, 3, 4))) + bytes(24), "expected labels"),
        (LABELS, lambda good: idx_file(FEW) + FEW.tobytes(), "each of the 40 images .* got 3"),
        (LABELS, lambda good: idx_file(MANY) + MANY.tobytes(), "from 0 to 9, got 10"),
    ],
)
def test_files_that_are_not_idx_or_not_whole_are_named(
    name, content, message, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    import idx

    path = written(tmp_path) / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(idx.IdxError, match=f"{path}: .*{message}"):
        idx.load(tmp_path, "train")


def test_a_folder_without_the_files_is_named_on_the_command_line(train_digits, options, tmp_path):
    options("--data", tmp_path, "--out", tmp_path)
    with pytest.raises(SystemExit, match=f"^{tmp_path}: expected one of train-images-idx3-ubyte"):
        runpy.run_path(str(EXAMPLES / "train_digits.py"), run_name="__main__")
