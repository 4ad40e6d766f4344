"""The examples, as a newcomer runs them, shortened."""

import errno
import gzip
import importlib
import json
import os
import re
import runpy
import signal
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import functional_bp as bp

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
    """Sets the command line, of whichever example."""
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
    train_digits, options, tmp_path, capsys, monkeypatch
):
    methods, grad = set(), bp.grad

    def asked(*of, method="manual", **how):
        methods.add(method)
        return grad(*of, method=method, **how)

    monkeypatch.setattr(bp, "grad", asked)
    options("--deep-steps", 20, "--out", tmp_path)
    train_digits.main()
    lines = dict(
        line.strip().split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line
    )
    assert float(lines["test accuracy"].rstrip("%")) >= 97
    difference = lines["largest relative difference of manual and autodiff gradients"]
    assert methods == {"manual", "autodiff"} and float(difference) < 5e-6  # or equal to the bit
    for picture in ("learning.png", "errors.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_images_of_ones_own_are_learned_and_gone_on_with(train_digits, options, tmp_path, capsys):
    def learn(*given):
        options("--data", written(tmp_path, compress=True), "--out", tmp_path, *given)
        given = train_digits.parser().parse_args()
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


PARSERS = {  # what each example needs
    "char_lm": "orbax.checkpoint",
    "dp_sgd": "dp_accounting",
    "flax_gpt": "flax",
    "flax_private": "flax",
    "gpt": "matplotlib",
    "gpt2": "safetensors",
    "kfac_autoencoder": "matplotlib",
    "mislabelled": "equinox",
    "noise_scale": "flax",
    "train_digits": "matplotlib",
    "vanishing_gradients": "matplotlib",
}


@pytest.fixture
def example(request, monkeypatch):
    """The module of an example."""
    pytest.importorskip(PARSERS[request.param])
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(request.param)
    if not hasattr(module, "parser"):
        pytest.skip("builds no parser of its own")
    return module


@pytest.mark.parametrize("example", PARSERS, indirect=True)
def test_every_option_of_every_example_says_what_it_takes(example, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    wrong = {  # by the function of options.py that reads the option
        "whole": ("", "many", "nan", "1.5", "-1", "1e9", "0"),
        "number": ("", "much", "nan", "inf", "-inf", "1e999", "-1", "0"),
        "folder": (file, file / "below", "a" * 1000),
    }
    for action in example.parser()._actions:
        if action.nargs == 0 or action.type is Path:  # a switch; a file, which the example reads
            continue
        kind = "choice" if action.choices else action.type.__qualname__.split(".")[0]
        for value in ("unheard-of",) if action.choices else wrong[kind]:
            if (action.dest, value) in (("seed", "0"), ("prompt_ids", "0")):
                continue
            option = action.option_strings[-1]
            with pytest.raises(SystemExit) as stopped:
                example.parser().parse_args([f"{option}={value}"])
            assert stopped.value.code == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"error: argument {option}: " in said
            if action.choices:
                assert "invalid choice: 'unheard-of' (choose from " in said
            else:
                assert re.search(rf": takes a .+[,;] got {re.escape(str(value))}", said), said


@pytest.mark.parametrize(
    ("example", "given", "message"),
    [
        ("dp_sgd", "--delta=1", "takes a number above 1e-15, below 1; got 1"),
        ("dp_sgd", "--rate=1.5", "takes a number above 0.001, up to 1; got 1.5"),
        ("dp_sgd", "--noise=0.2", "takes a number above 0.2, up to 1e+06; got 0.2"),
        (
            "kfac_autoencoder",
            "--seed=4294967296",
            "a whole number from 0 to 4294967295, got 4294967296",
        ),
        ("train_digits", "--epochs=0", "takes a whole number from 1, got 0"),
        ("vanishing_gradients", "--length=1", "takes a whole number from 2, got 1"),
    ],
    indirect=["example"],
)
def test_what_is_beyond_a_limit_ends_the_example_in_one_sentence(
    example, given, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", given])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(message)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_plain_and_gzip(compress, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import idx

    x, y = idx.load(written(tmp_path, compress), "train")
    assert x.shape == (40, 16) and x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
    assert y.tolist() == [n % 10 for n in range(40)]


@pytest.fixture
def kfac_autoencoder(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    import kfac_autoencoder

    return kfac_autoencoder


def test_kfac_and_adam_learn_to_compress_digits(
    kfac_autoencoder, monkeypatch, options, tmp_path, capsys
):
    small = {"WIDTHS": (12, 4), "BATCHES": (128,), "DAMPINGS": (1e-2,), "RATES": (1e-2,)}
    for name, value in small.items():
        monkeypatch.setattr(kfac_autoencoder, name, value)
    options("--epochs", 12, "--out", tmp_path)
    kfac_autoencoder.main()
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("training loss ")[1].split(",")[0]) for line in lines[2:5]]
    assert len(lines) == 9 and min(losses) > 0
    assert losses[0] < 13.4 / 2  # K-FAC's, beside that of a code that says nothing
    assert (tmp_path / "kfac_autoencoder.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("losses", "leader"), [((3.0, 1.0), "K-FAC"), ((3.0, 2.5), "Adam")])
def test_the_finding_is_of_the_numbers(kfac_autoencoder, losses, leader):
    def run(name, losses, seconds):
        losses = np.array(losses)
        seconds = seconds * np.arange(1, len(losses) + 1)
        return kfac_autoencoder.Run(name, seconds, losses, losses / 4, losses / 2, (), ())

    best = {"K-FAC": run("K-FAC", losses, 2.0), "Adam": run("Adam", (4, 3, 2.5, 2), 1.0)}
    said = kfac_autoencoder.finding(best)
    other, part = {"K-FAC": ("Adam", "100%"), "Adam": ("K-FAC", "75%")}[leader]
    assert f"{leader} needs {part} of the time" in said and f"at which {other} ends" in said


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


PANGRAM = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture
def learn_text(monkeypatch, options, tmp_path, capsys):
    """Runs the example on a text, with a small network; returns what it prints."""
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.syspath_prepend(EXAMPLES)
    import char_lm

    def run(text, *given):
        path = tmp_path / "text.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        small = ("--units", 8, "--length", 8, "--sample", 7, "--temperature", 0.5)
        options("--text", path, "--out", tmp_path, *small, *given)
        char_lm.main()
        return capsys.readouterr().out

    return run


def test_a_text_is_learned_sampled_and_gone_on_with(learn_text):
    import char_lm

    out = learn_text(PANGRAM * 40, "--epochs", 1)
    bits = [float(part.split()[0]) for part in out.split("bits per character: ")[1].split(",")]
    assert all(0 < b < 6 for b in bits)
    _, written = out.rstrip("\n").split("--- temperature 0.5 ---\n")
    assert len(written) == 1 + 7 and set(written) <= set(PANGRAM)

    with pytest.warns(UserWarning, match="optimizer: its updates are others"):  # a longer schedule
        resumed = learn_text(PANGRAM * 40, "--epochs", 2, "--resume")
    assert "epoch  1" not in resumed and "epoch  2" in resumed
    learning = resumed.split("bits per character: ")[1].split()[0]
    assert float(learning) < bits[0]

    with pytest.raises(
        bp.ModelError, match=r"it has float32\(32, 8\), this run has float32\(36, 9\)"
    ):
        learn_text(PANGRAM * 40, "--epochs", 3, "--resume", "--units", 9)
    with pytest.raises(char_lm.TextError, match=r"^--resume: .* other characters: \['!', '\.'\]"):
        learn_text(PANGRAM.replace(".", "!") * 40, "--epochs", 3, "--resume")


def test_ctrl_c_ends_the_example_in_a_sentence_and_resume_goes_on(
    learn_text, tmp_path, monkeypatch, capsys
):
    import char_lm

    cut = char_lm.windows

    def pressed(ids, length, size, seed):
        for i, batch in enumerate(cut(ids, length, size, seed)):
            if seed == (0, 1) and i == 2:
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(char_lm, "windows", pressed)
        learn_text(PANGRAM * 40, "--epochs", 2)
    assert stopped.value.code == 130
    sentence = f"stopped; --resume goes on from {tmp_path / 'char-lm-checkpoints'}\n"
    assert capsys.readouterr().err == sentence
    resumed = learn_text(PANGRAM * 40, "--epochs", 2, "--resume")
    assert "epoch  1" not in resumed and "epoch  2" in resumed


def test_the_characters_of_a_run_are_kept_whole(learn_text, tmp_path, monkeypatch):
    import char_lm

    def refused(message, *given):
        with pytest.raises((char_lm.TextError, ValueError), match=message):
            learn_text(PANGRAM * 40, *given)

    known = tmp_path / "char-lm-characters.json"
    learn_text(PANGRAM * 40, "--epochs", 1)
    content, written = known.read_bytes(), known.stat().st_mtime_ns
    learn_text(PANGRAM * 40, "--epochs", 1, "--resume")
    assert known.stat().st_mtime_ns == written
    for spoilt in (b"", content[:20], b"{}", b"\xff"):
        known.write_bytes(spoilt)
        message = f"^--resume: takes {known}, a JSON list .* got {len(spoilt)} bytes that are not"
        refused(message, "--resume")
        assert known.read_bytes() == spoilt
    known.unlink()
    refused(f"^--resume: takes {known}, the characters .*: No such file or directory$", "--resume")

    known.write_bytes(content)

    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(char_lm.TextError, match=f"^{known}: could not be written: No space"):
            learn_text(PANGRAM.upper() * 40)
    assert known.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "char-lm-characters.json",
        "char-lm-checkpoints",
        "text.txt",
    ]


def test_a_run_of_the_example_is_left_alone_by_another(learn_text, tmp_path, monkeypatch):
    from text import Kept

    fit = bp.fit

    def another(*args, callbacks, **given):
        def run_another(run):
            monkeypatch.setattr(bp, "fit", fit)
            for resume in ([], ["--resume"]):
                with pytest.raises(ValueError, match="is being written by another run"):
                    learn_text(PANGRAM.upper() * 40, *resume)

        return fit(*args, callbacks=[*callbacks, run_another], **given)

    monkeypatch.setattr(bp, "fit", another)
    learn_text(PANGRAM * 40, "--epochs", 1)
    assert json.loads((tmp_path / "char-lm-characters.json").read_text()) == sorted(set(PANGRAM))
    assert Kept(tmp_path, "char-lm").has_checkpoints()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text.txt: takes a text, got an empty file"),
        ("é".encode("latin-1") * 400, "text.txt: takes text in UTF-8, got .* at byte 0"),
        (PANGRAM, "text: takes at least 322 characters, got 45"),
    ],
)
def test_a_text_that_cannot_be_learned_from_is_named(learn_text, text, message):
    import char_lm

    with pytest.raises(char_lm.TextError, match=message):
        learn_text(text)


def test_the_networks_are_compared_on_the_adding_problem(monkeypatch, options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    import vanishing_gradients

    monkeypatch.delitem(vanishing_gradients.CELLS, "GRU")  # two of the three are quicker
    options("--length", 4, "--units", 3, "--steps", 2, "--out", tmp_path)
    vanishing_gradients.main()
    lines = capsys.readouterr().out.splitlines()
    names = ["giving 1 always:", "plain RNN", "LSTM", "picture:"]
    assert all(line.startswith(name) for line, name in zip(lines, names, strict=True))
    for line in lines[1:3]:
        *_, before, _, after, _ = line.replace(",", "").split()
        assert float(before) > 0 and float(after) > 0
    assert (tmp_path / "vanishing_gradients.png").read_bytes().startswith(b"\x89PNG")


def test_the_adding_problem_marks_one_number_in_each_half(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    import vanishing_gradients

    x, y = vanishing_gradients.adding_problem(np.random.default_rng(0), 20, 7)
    numbers, marks = x[..., 0], x[..., 1]
    np.testing.assert_array_equal(marks[:, :3].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 3:].sum(1), 1)
    np.testing.assert_allclose((numbers * marks).sum(1, keepdims=True), y, rtol=1e-6)
