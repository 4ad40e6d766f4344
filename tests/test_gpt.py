"""The GPT of the examples: what it learns, draws and writes."""

import re
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp

EXAMPLES = Path(__file__).parent.parent / "examples"
PANGRAM = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def raised(params, by=0.3):
    """Parameters of which none is 0 and no scale 1."""
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda p: p + by * jax.random.normal(next(keys), p.shape, p.dtype), params)


def made(rotary=None, kv_heads=None, x64=True):
    """``(sizes, model, loss, params, ids)`` of a small decoder."""
    from decoder import Sizes, model_and_loss

    sizes = Sizes(11, 3, 4, 16, 9, rotary, kv_heads)
    model, loss = model_and_loss(sizes)
    ids = jnp.asarray(np.random.default_rng(0).integers(11, size=(2, 9)).astype(np.int32))
    params = raised(bp.init(model, loss, jax.random.key(0), ids[0], ids[0]))
    return (
        sizes,
        model,
        loss,
        jax.tree.map(lambda p: p.astype(float), params) if x64 else params,
        ids,
    )


KINDS = [(None, None), (1e4, 2), (1e4, None), (None, 1)]


def logits_of(model, params, ids):
    return model.apply(params[0], ids) @ params[0][0]["weight"].T


@pytest.mark.parametrize(
    ("rotary", "kv_heads", "x64"),
    [
        (None, None, True),
        (1e4, 2, True),
        (1e4, 2, False),
        pytest.param(1e4, None, True, marks=pytest.mark.exhaustive),
        pytest.param(None, 1, True, marks=pytest.mark.exhaustive),
        pytest.param(None, None, False, marks=pytest.mark.exhaustive),
    ],
)
def test_logits_from_the_cache_are_those_of_the_whole_text(rotary, kv_heads, x64):
    import generating

    with jax.enable_x64(x64):
        sizes, model, _, params, ids = made(rotary, kv_heads, x64)

        @jax.jit
        def both(params):
            reading, found = generating.read(sizes, params[0], ids[:, :4], empty(sizes, params)), []
            for i in range(4, 9):
                found.append(reading.logits)
                reading = generating.read(sizes, params[0], ids[:, i : i + 1], reading.cache)
            found = jnp.concatenate([*found, reading.logits], axis=1)
            return found, logits_of(model, params, ids), reading.cache.filled

        found, wanted, filled = both(params)
        assert found.dtype == wanted.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(found, wanted, atol=1e-11 if x64 else 1e-5, rtol=0)
        assert filled == 9


def empty(sizes, params):
    import generating

    return generating.empty(sizes, params[0], 2)


@pytest.mark.exhaustive
def test_the_decoders_gradient_with_its_tied_loss_is_autodiffs():
    with jax.enable_x64(True):
        _, model, loss, params, ids = made(1e4, 2)
        bp.testing.check_model(model, loss, params, ids, jnp.roll(ids, 1, axis=1))


def test_what_is_written_is_the_likeliest_given_all_before_it_beyond_the_context_too():
    import generating

    with jax.enable_x64(True):
        sizes, model, _, params, ids = made(1e4, 2)
        key = jax.random.key(0)
        written = generating.write(sizes, params[0], ids[:, :3], 15, key, top_k=1)
        best = jax.jit(lambda window: logits_of(model, params, window).argmax(-1))
        text, start = np.asarray(ids[:, :3]), 0
        for i in range(15):  # of 9 positions 5 are read anew where all are filled
            if text.shape[1] - start > 9:
                start = text.shape[1] - 5
            t = text.shape[1] - start
            window = np.pad(text[:, start:], ((0, 0), (0, 9 - t)))  # nobody sees what is behind
            new = np.asarray(best(window))[:, t - 1]
            np.testing.assert_array_equal(written[:, i], new)
            text = np.append(text, new[:, None].astype(text.dtype), axis=1)
        np.testing.assert_array_equal(
            generating.write(sizes, params[0], text[:, :12], 2, key, top_k=1),
            generating.write(sizes, params[0], text[:, 3:12], 2, key, top_k=1),
        )
        with pytest.raises(bp.ModelError, match="takes up to 9 ids, got 10"):
            generating.read(sizes, params[0], text[:, :10], empty(sizes, params))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [3]),
        (3, 1.0, [1, 3, 4]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (None, 0.3, [3]),
        (None, 0.5, [1, 3]),
        (None, 0.66, [1, 3, 4]),
        (None, 0.96, [0, 1, 2, 3, 4]),
        (2, 0.61, [3]),  # 0.4 of 0.65 is 0.615
        (2, 0.62, [1, 3]),
        (3, 0.45, [3]),
    ],
)
def test_the_likeliest_are_drawn_and_no_others(top_k, top_p, kept):
    import generating

    p = np.array([0.08, 0.25, 0.05, 0.4, 0.22])
    logits = jnp.asarray(np.log(p) + 3, jnp.float32)[None]
    found = np.asarray(generating.chosen(logits, top_k, top_p))
    assert np.flatnonzero(np.isfinite(found[0])).tolist() == kept
    np.testing.assert_array_equal(found[0, kept], logits[0, kept])


def test_ids_are_drawn_as_often_as_their_probability_says():
    import generating

    sizes, model, _, params, ids = made(x64=False)
    n = 4000
    prompts = jnp.broadcast_to(ids[:1, :4], (n, 4))
    drawn = generating.write(sizes, params[0], prompts, 1, jax.random.key(0), temperature=2.0)
    p = jax.nn.softmax(logits_of(model, params, ids[:1, :4])[0, -1] / 2)
    counts = np.bincount(drawn[:, 0], minlength=11)
    np.testing.assert_array_less(abs(counts - n * p), 4 * np.sqrt(n * p * (1 - p)))


def test_every_id_is_drawn_anew_and_where_a_text_is_read_anew_too():
    import generating

    sizes, _, _, params, ids = made(x64=False)
    equal = jax.tree.map(jnp.zeros_like, params[0])  # every id is as likely as every other
    drawn = generating.write(sizes, equal, ids[:1, :5], 15, jax.random.key(0))[0]
    assert len(set(drawn)) > 5
    assert len({tuple(drawn[i : i + 5]) for i in (0, 5, 10)}) == 3  # 5 fill the 9 positions


def test_attention_is_of_positions_before_and_sums_to_one():
    import generating

    sizes, _, _, params, ids = made(1e4, 2, x64=False)
    p = generating.attention(sizes, params[0], ids[0, :6])
    assert p.shape == (3, 4, 6, 6)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(p, jnp.tril(p))


@pytest.fixture
def learn_text(monkeypatch, tmp_path, capsys):
    """Runs the example on a text, with a small network; returns what it prints."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("orbax.checkpoint")
    import gpt

    def run(text, *given, out="out"):
        path = tmp_path / "text.txt"
        path.write_text(text)
        given = ["--size=tiny", "--sample=40", f"--text={path}", f"--out={tmp_path / out}", *given]
        monkeypatch.setattr(sys, "argv", ["gpt.py", *given])
        gpt.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def learnt(monkeypatch):
    """The runs that the example makes, and with which options."""
    runs, fit = [], bp.fit

    def kept(*args, **given):
        runs.append((fit(*args, **given), given))
        return runs[-1][0]

    monkeypatch.setattr(bp, "fit", kept)
    return runs


@pytest.fixture
def wrote(monkeypatch):
    """The options with which the example writes."""
    import generating

    options, write = [], generating.write

    def kept(*args, **given):
        options.append(given)
        return write(*args, **given)

    monkeypatch.setattr(generating, "write", kept)
    return options


def test_a_text_is_learnt_stopped_gone_on_with_and_written_from(
    learn_text, learnt, wrote, tmp_path, monkeypatch, capsys
):
    import gpt

    cut = gpt.windows

    def pressed(ids, length, size, seed):
        for i, batch in enumerate(cut(ids, length, size, seed)):
            if seed == (0, 1) and i == 2:
                signal.raise_signal(signal.SIGINT)
            yield batch

    options = "--epochs=2", "--dropout=0.1", "--accumulate=2", "--top-k=9", "--top-p=0.9"
    out = learn_text(PANGRAM * 40, *options)
    bits = re.findall(r"epoch +(\d) .* ([\d.]+) learning, ([\d.]+) held out", out)
    assert [epoch for epoch, *_ in bits] == ["1", "2"]
    assert 0 < float(bits[1][2]) < float(bits[0][2]) < 6
    written = out.split("--- temperature 0.8 ---\n")[1].split("\nwrote ")[0]
    assert len(written) == 41 and set(written) <= set(PANGRAM)
    assert wrote == [{"temperature": 0.8, "top_k": 9, "top_p": 0.9}]
    ((first, given),) = learnt
    assert given["microbatch"] == 4 and given["key"] is not None
    assert given["compute_dtype"] is None
    assert (tmp_path / "out" / "gpt-attention.png").read_bytes().startswith(b"\x89PNG")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(gpt, "windows", pressed)
        learn_text(PANGRAM * 40, *options, out="two")
    assert stopped.value.code == 130
    folder = tmp_path / "two" / "gpt-checkpoints"
    assert capsys.readouterr().err == f"stopped; --resume goes on from {folder}\n"
    resumed = learn_text(PANGRAM * 40, *options, "--resume", out="two")
    assert "epoch  1" not in resumed and "epoch  2" in resumed
    jax.tree.map(np.testing.assert_array_equal, learnt[-1][0].params, first.params)
    assert resumed.split("---")[2].split("\nwrote")[0] == out.split("---")[2].split("\nwrote")[0]


def test_bfloat16_and_learned_positions_learn_too(learn_text, learnt):
    learn_text(PANGRAM * 40, "--epochs=1", "--dtype=bfloat16", "--positions=learned")
    ((run, given),) = learnt
    assert given["compute_dtype"] == "bfloat16" and given["microbatch"] is given["key"] is None
    assert run.params[0][1]["weight"].shape == (32, 32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(run.params))


def test_weights_alone_decay():
    import gpt
    from decoder import Sizes, model_and_loss

    model, loss = model_and_loss(Sizes(11, 2, 2, 8, 9))
    ids = np.zeros(9, np.int32)
    optimizer = gpt.optimizer(0.5, 40)

    @jax.jit
    def second_update(key):  # the first step's rate is 0
        params = raised(bp.init(model, loss, key, ids, ids))
        state, zeros = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
        _, state = optimizer.update(zeros, state, params)
        return params, optimizer.update(zeros, state, params)[0]

    params, updates = second_update(jax.random.key(0))
    for (path, update), p in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)
    ):
        decay = -0.25 * 0.1 * p if path[-1].key == "weight" else jnp.zeros_like(p)
        np.testing.assert_allclose(update, decay, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=huge"], "argument --size: invalid choice: 'huge'"),
        (["--top-p=1.5"], "argument --top-p: takes a number above 0, up to 1; got 1.5"),
        (["--top-p=0"], "argument --top-p: takes a number above 0, up to 1; got 0"),
        (["--top-k=0"], "argument --top-k: takes a whole number from 1 to 1000000, got 0"),
        (["--dropout=1"], "argument --dropout: takes a number above 0, below 1; got 1"),
    ],
)
def test_options_out_of_range_are_told(learn_text, options, message, capsys):
    with pytest.raises(SystemExit):
        learn_text(PANGRAM, *options)
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_told(learn_text):
    import text

    with pytest.raises(text.TextError, match="text: takes at least 660 characters, got 45"):
        learn_text(PANGRAM)


def test_the_sentence_that_is_drawn_is_a_whole_one():
    import gpt

    text = "of it.  No.  This is one\nthat is shown.  And this is not."
    assert gpt.sentence(text, 60) == "This is one\nthat is shown."
    assert gpt.sentence(text, 20) == "No."
    assert gpt.sentence("No sentence", 5) == "No se"
