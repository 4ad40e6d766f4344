"""What a run shows while it trains."""

import sys
import types

import jax
import numpy as np
import optax
import pytest

import functional_bp as bp
from functional_bp.training import progress

MODEL, LOSS, SGD = bp.dense(3), bp.losses.softmax_cross_entropy, optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
Y = np.arange(12) % 3
BATCHES = bp.minibatches(X, Y, 4)
EVALUATED = {
    "evaluation": [(X, Y)],
    "metrics": {"accuracy": lambda a, y: a.argmax(-1) == y},
}


def fit(batches=BATCHES, **given):
    given = given if "steps" in given else {"epochs": 2} | given
    return bp.fit(MODEL, LOSS, MODEL.init(jax.random.key(0), X[0]), batches, SGD, **given)


@pytest.fixture
def without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)


@pytest.fixture
def always(monkeypatch):
    """It is shown whenever it can be."""
    monkeypatch.setattr(progress, "_PAUSE", 0.0)


def test_nothing_is_shown_where_nobody_looks(capfd):
    fit()
    fit(progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_notebook_is_watched(monkeypatch):
    kernel, terminal = types.SimpleNamespace(kernel=None), types.SimpleNamespace()
    for shell, watched in ((kernel, True), (terminal, False), (None, False)):
        ipython = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert progress.is_watched() is watched


@pytest.mark.parametrize("installed", [True, False])
def test_a_terminal_is_shown_how_far_a_run_has_come(installed, capfd, monkeypatch):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit()
    assert "6/6" in capfd.readouterr().err
    fit(progress=False)
    assert capfd.readouterr().err == ""


def test_without_tqdm_there_is_a_line_for_each_epoch(capfd, without_tqdm, always):
    run = fit(progress=True, **EVALUATED)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("epoch 1/2, step 3/6, ") and " left, cost " in first
    accuracy, loss = (run.history.evaluation[name][-1] for name in ("accuracy", "loss"))
    assert second.startswith("epoch 2/2, step 6/6, ")
    assert f"cost {run.history.loss[-1]:.4g}, evaluated: " in second
    assert f"accuracy {accuracy:.4g}" in second and f"loss {loss:.4g}" in second


def test_without_tqdm_a_long_epoch_is_not_silent(capfd, without_tqdm, always, monkeypatch):
    monkeypatch.setattr(progress, "_SILENCE", 0.0)
    fit(BATCHES, steps=2, progress=True)
    assert capfd.readouterr().err.count("\n") >= 2


def test_short_epochs_share_a_line(capfd, without_tqdm):
    fit(epochs=2, progress=True)  # compiles
    capfd.readouterr()
    fit(epochs=300, progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) < 300 and lines[-1].startswith("epoch 300/300, step 900/900, ")


def test_the_bar_of_tqdm_says_epoch_cost_and_evaluation(capfd, always):
    pytest.importorskip("tqdm")
    run = fit(progress=True, **EVALUATED)
    last = capfd.readouterr().err.split("\r")[-1]
    assert "epoch 2/2" in last and "6/6" in last
    assert f"cost {run.history.loss[-1]:.4g}, evaluated: " in last


def test_a_total_that_is_not_known_is_learnt_from_the_first_epoch(capfd, without_tqdm, always):
    fit(lambda epoch: BATCHES(epoch), epochs=3, progress=True)
    first, *_, last = capfd.readouterr().err.splitlines()
    assert "step 3/9, " in first and "step 9/9, " in last
    fit(lambda epoch: BATCHES(epoch), steps=4, progress=True)
    assert "epoch 2, step 4/4, " in capfd.readouterr().err


def test_a_resumed_run_is_shown_from_where_it_was(capfd, always, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    pytest.importorskip("tqdm")
    fit(epochs=1, checkpoints=tmp_path)
    fit(epochs=2, checkpoints=tmp_path, resume=True, progress=True)
    shown = capfd.readouterr().err
    assert "3/6" in shown and "1/6" not in shown


def test_it_is_shown_ten_times_a_second_at_most(capfd, without_tqdm, monkeypatch):
    now = [0.0]
    drawn = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.Progress, "_say", lambda self: drawn.append(now[0]))
    monkeypatch.setattr(progress, "_SILENCE", 0.0)

    def batches(epoch):
        while True:
            now[0] += 0.01
            yield X, Y

    fit(batches, steps=100, steps_per_call=1, progress=True)
    assert 9 <= len(drawn) <= 11
