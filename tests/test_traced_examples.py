"""The examples with models of other libraries, as a newcomer runs them, shortened."""

import importlib
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import functional_bp as bp

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"-?[\d.]+(?:e[-+]\d+)?"


@pytest.fixture
def example(request, monkeypatch):
    """The module of an example."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


@pytest.fixture
def ran(example, monkeypatch, tmp_path, capsys):
    """Runs the example, and returns what it prints, with its picture drawn."""

    def run(*given):
        argv = [f"{example.__name__}.py", "--out", str(tmp_path), *map(str, given)]
        monkeypatch.setattr(sys, "argv", argv)
        example.main()
        picture = tmp_path / f"{example.__name__}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        out = capsys.readouterr().out
        assert f"wrote {picture}\n" in out
        return out

    return run


def numbers(text):
    return [float(number) for number in re.findall(NUMBER, text)]


def gradients_of(cost, params, x, y):
    """The definition: one row for each example."""
    grads = jax.vmap(jax.grad(cost), (None, 0, 0))(params, x, y)
    return np.concatenate(
        [np.asarray(g, np.float64).reshape(len(x), -1) for g in jax.tree.leaves(grads)], axis=1
    )


@pytest.mark.parametrize("example", ["flax_private"], indirect=True)
def test_a_flax_network_is_trained_in_private_with_jax_privacys_gradient(example, ran):
    import dp_sgd

    small = ("--width", 2, "--batch", 8, "--microbatch", 4, "--calls", 1)
    out = ran(*small, "--steps", 3, "--noise", 8, "--seed", 0)
    largest = float(re.search(rf"its largest number is ({NUMBER})", out)[1])
    first = re.match(r"clipped gradient of 8 held-out images, (\d+) of them clipped\n", out)
    assert int(first[1]) > 0
    compared = re.findall(
        rf"(functional_bp|jax-privacy) \((.*)\) +({NUMBER}) ms +({NUMBER}) MiB +"
        rf"largest difference ({NUMBER})",
        out,
    )
    ways = [(name, way) for way in ("all at once", "4 at a time") for name in
            ("functional_bp", "jax-privacy")]  # fmt: skip
    assert [(name, way) for name, way, *_ in compared] == ways
    for *_, milliseconds, mebibytes, difference in compared:
        assert float(milliseconds) > 0 and float(mebibytes) > 0
        assert float(difference) < 1e-5 * largest
    assert [int(n) for n in re.findall(r"step +(\d+)   held out", out)] == [1, 2, 3]
    assert "--seed: whoever knows it" in out
    rows = dp_sgd.rows_for(example.pictures.IMAGES, 0.25)
    [epsilon] = dp_sgd.epsilons(example.pictures.IMAGES, 0.25, rows, 8.0, 1e-4, [3])
    said = f"({epsilon:.3f}, 0.0001)-differentially private, if the seed were secret"
    assert out.splitlines()[-1].endswith(said)


@pytest.mark.parametrize("example", ["flax_private"], indirect=True)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--batch=361", "takes a whole number from 1 to 360, got 361"),
        ("--microbatch=7", "--microbatch: takes a divisor of 256, got 7"),
        ("--noise=0.2", "takes a number above 0.2, up to 1e+06; got 0.2"),
    ],
)
def test_what_cannot_be_run_in_private_is_said_in_one_sentence(
    example, given, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["flax_private.py", given])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(message)


@pytest.mark.parametrize("example", ["mislabelled"], indirect=True)
def test_wrong_labels_are_found_far_more_often_than_by_chance(example, ran):
    out = ran("--width", 4, "--epochs", 6, "--wrong", 0.1)
    planted = round(0.1 * example.pictures.IMAGES)
    assert out.startswith(f"{planted} of {example.pictures.IMAGES} labels are wrong; ")
    lines = {line[:31].strip(): numbers(line[31:]) for line in out.splitlines() if line[0] == " "}
    assert list(lines) == [example.NORM, example.AGAINST, example.HARM, "chance"]
    assert lines["chance"] == [round(planted**2 / example.pictures.IMAGES, 1)]
    for name, least in ((example.NORM, 0.5), (example.HARM, 0.5), (example.AGAINST, 0.2)):
        found, of, among = lines[name]
        assert of == among == planted and least * planted < found <= planted
    found = max(lines[name][0] for name in (example.NORM, example.AGAINST, example.HARM))
    assert f" found the most: {found / planted:.0%} of the wrong labels" in out.splitlines()[-1]


@pytest.mark.parametrize("example", ["mislabelled"], indirect=True)
def test_wrong_labels_are_planted_where_it_is_said(example):
    right = np.arange(200) % 10
    given, planted = example.with_errors(np.random.default_rng(0), right, 0.25)
    np.testing.assert_array_equal(planted, given != right)
    assert planted.sum() == 50 and given.min() >= 0 and given.max() <= 9


@pytest.mark.parametrize("example", ["mislabelled"], indirect=True)
def test_suspicions_are_what_their_definitions_say(example):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 1, 8, 8)).astype(np.float32), np.arange(7, dtype=np.int32)
    model, params = bp.from_equinox(example.network(jax.random.key(0), 2))

    def cost(params, x, y):
        return example.LOSS.costs(model.apply(params, x[None]), y[None])[0]

    g, v = np.split(gradients_of(cost, params, x, y), [4])
    scores = example.suspicions(model, params, (x[:4], y[:4]), (x[4:], y[4:]))
    units = v / np.linalg.norm(v, axis=1, keepdims=True)
    expected = {
        example.NORM: np.linalg.norm(g, axis=1),
        example.AGAINST: -g @ v.mean(0),
        example.HARM: np.maximum(0, -g @ units.T).mean(1),
    }
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(score, expected[name], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("example", ["noise_scale"], indirect=True)
def test_the_noise_of_every_group_of_parameters_is_told(example, ran):
    out = ran("--features", 1, "--blocks", 1, "--steps", 2, "--measurements", 2, "--batch", 16)
    head, first, last, _, said = out.splitlines()
    columns = re.findall(r"\S+(?: \S+)*", head)
    assert columns == ["step", "held out", example.TOGETHER, *example.GROUPS]
    (at, _, before, *_), (end, _, after, *groups) = (numbers(line) for line in (first, last))
    assert (at, end) == (0, 2) and len(groups) == len(example.GROUPS)
    assert min(groups) <= after <= max(groups)  # the whole is a weighted mean of its parts
    assert f"a batch of {before:.0f} before training and {after:.0f} after it" in said


@pytest.mark.parametrize("example", ["noise_scale"], indirect=True)
def test_noise_scales_of_groups_are_what_their_definition_says(example):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(300, 8, 8)).astype(np.float32), np.arange(300, dtype=np.int32) % 3
    module = example.Transformer(1, 1)
    params = bp.from_flax(module).init(jax.random.key(0), x[0])
    groups = example.grouped(params)
    assert sorted(name for group in groups.values() for name in group) == sorted(params["params"])

    def cost(params, x, y):
        logits = module.apply({"params": params}, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    scales = jax.jit(lambda params: example.noise_scales(module, params, x, y))(params)
    for name, group in (groups | {example.TOGETHER: params["params"]}).items():
        g = gradients_of(
            lambda group, x, y: cost(params["params"] | group, x, y),
            *(group, x, y),
        )
        trace = g.var(0, ddof=1).sum()
        expected = trace / ((g.mean(0) ** 2).sum() - trace / len(g))
        np.testing.assert_allclose(scales[name], expected, rtol=1e-3)


@pytest.mark.parametrize("example", ["flax_gpt"], indirect=True)
def test_two_lines_of_a_flax_gpt_change_neither_cost_nor_gradient(example, monkeypatch, capsys):
    small = {"vocabulary": 50, "length": 9, "batch": 2, "features": 8, "heads": 2, "layers": 1}
    argv = [f"--{name}={value}" for name, value in small.items()]
    monkeypatch.setattr(sys, "argv", ["flax_gpt.py", *argv, "--calls=2"])
    example.main()
    out = capsys.readouterr().out
    assert "gradient of 2 sequences of 9 words of 50\n" in out
    assert re.search(r"  Flax alone .* ms .* MiB\n  with bp\.ops .* ms .* MiB\n", out)
    assert 0 <= float(out.split()[-1]) < 1e-5
    monkeypatch.setattr(sys, "argv", ["flax_gpt.py", "--features=9"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--features: takes a multiple of 4 heads, got 9" in capsys.readouterr().err
