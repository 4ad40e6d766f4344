"""Stopping a run and going on from its checkpoints."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp

pytest.importorskip("orbax.checkpoint")

LOSS = bp.losses.softmax_cross_entropy
MODEL = bp.tied(
    bp.chain(bp.dense(6), bp.tanh, bp.dropout(0.2), bp.dense(6), bp.tanh, bp.dense(3)),
    {(3, "weight"): (0, "weight")},
)
X = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
BATCHES = bp.minibatches(X, Y, 8, seed=1)
ADAM = optax.adam(1e-2)
MEASURE = {"accuracy": lambda a, y: a.argmax(-1) == y}


def fit(folder, steps=None, model=MODEL, loss=LOSS, optimizer=ADAM, **given):
    settings = {
        "steps": steps,
        "key": jax.random.key(2),
        "frozen": lambda path: path == (5, "bias"),
        "evaluation": [(X, Y)],
        "metrics": MEASURE,
        "every": 2,
        "checkpoints": folder,
        "resume": True,
    }
    params = jax.jit(model.init)(jax.random.key(0), X[0])
    return bp.fit(model, loss, params, BATCHES, optimizer, **settings | given)


def assert_same(a, b):
    """Two runs, bit for bit."""
    parts = [(run.params, run.opt_state, run.step, run.epoch, vars(run.history)) for run in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


def contents(folder):
    """What every file holds."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_a_run_stopped_at_a_look_goes_on_as_if_it_had_not(tmp_path):
    whole = fit(None, 10)
    for stop in (2, 6, 8):  # inside an epoch of three batches, at its end, inside again
        folder = tmp_path / str(stop)
        assert fit(folder, stop).step == stop
        assert_same(fit(folder, 10), whole)


def test_a_run_takes_several_stops_anywhere(tmp_path):
    for stop in (1, 2, 5, 5, 10):
        run = fit(tmp_path, stop, evaluation=None)
    assert_same(run, fit(None, 10, evaluation=None))


def test_bfloat16_parameters_and_keys_in_the_optimizer_come_back(tmp_path):
    x = X.astype(jnp.bfloat16)
    model = bp.dense(3)
    params = jax.jit(model.init)(jax.random.key(0), x[0])
    noisy = optax.add_noise(0.1, 0.5, jax.random.key(4))

    def run(folder, steps):
        how = {"checkpoints": folder, "resume": True}
        return bp.fit(model, LOSS, params, [(x, Y)], noisy, steps=steps, **how)

    run(tmp_path, 2)
    resumed, whole = run(tmp_path, 5), run(None, 5)
    assert resumed.params["weight"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    stop = [lambda run: run.step == 4]
    assert fit(tmp_path, 10, callbacks=stop).step == 4
    assert fit(tmp_path, 10).step == 4


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    before = fit(tmp_path, 4)
    written = contents(tmp_path)
    assert_same(fit(tmp_path, 4), before)
    assert contents(tmp_path) == written


def test_the_two_latest_checkpoints_are_kept(tmp_path):
    fit(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["6", "8"]


CHILD = """
import sys
import jax, numpy as np
import test_checkpoint as t

folder, result = sys.argv[1:]
says = [lambda run: print(run.step, flush=True)]
run = t.fit(folder or None, 30, every=1, callbacks=says)
leaves = jax.tree.leaves((run.params, run.opt_state, vars(run.history)))
np.savez(result, *leaves)
"""


def test_a_process_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    """A checkpoint is written at every step, so that most kills fall into the writing of one."""

    def child(folder):
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, folder, tmp_path / f"{folder and 'killed'}.npz"],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        )

    folder = str(tmp_path / "checkpoints")
    assert child("").communicate()  # never stops
    kills, steps = [], []
    while len(kills) < 3:
        process = child(folder)
        steps.append(int(process.stdout.readline()))  # it trains
        kills.append(random.uniform(0, 0.4))
        time.sleep(kills[-1])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before the kill, {kills}, {steps}"
    process = child(folder)
    steps.append(int(process.communicate()[0].split()[0]))
    assert process.returncode == 0, f"after {kills}"
    assert steps == sorted(steps) and steps[-1] > 1, "no run went on from another's checkpoint"
    with np.load(tmp_path / ".npz") as whole, np.load(tmp_path / "killed.npz") as killed:
        assert whole.files == killed.files
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], killed[name], err_msg=f"{kills}, {steps}")


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path):
    fit(tmp_path, 2)
    written = contents(tmp_path)
    with pytest.raises(ValueError, match=r"has a checkpoint of step 2; resume=True goes on"):
        fit(tmp_path, 4, resume=False)
    assert contents(tmp_path) == written


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(tmp_path):
    fit(tmp_path, 2)
    written = contents(tmp_path)

    def refused(*differences, **given):
        with pytest.raises(bp.ModelError, match="is of another run") as error:
            fit(tmp_path, 4, **given)
        assert str(tmp_path / "2") in str(error.value)
        for difference in differences:
            assert difference in str(error.value)
        assert contents(tmp_path) == written

    wide = bp.chain(bp.dense(7), bp.tanh, bp.dense(3))
    refused(
        "model: it has tied(chain(dense(6)",
        "params.0.weight: it has float32(6, 6), this run has float32(7, 6)",
        "params.3.bias: it has float32(6,), this run has none",
        "opt_state.0.mu.0.bias: it has float32(6,), this run has float32(7,)",
        model=wide,
        frozen=None,
    )
    refused("optimizer: it has ScaleByAdamState, EmptyState", optimizer=optax.adamw(1e-2))
    refused("opt_state.0.mu.0.bias: it has float32(6,), this run has none", optimizer=optax.sgd(1))
    refused("key: it has [0, 2], this run has [0, 3]", key=jax.random.key(3))
    refused("key: it has [0, 2], this run has none", key=None)
    refused("frozen: it has 5.bias, this run has none", frozen=None)
    smooth = bp.losses.loss(LOSS.value, LOSS.delta, name="smooth")
    refused("loss: it has softmax_cross_entropy, this run has smooth", loss=smooth)


# orbax stops reading at the first file that fails, with others still under way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_is_not_whole_is_named_and_left_alone(tmp_path):
    fit(tmp_path, 4)
    held = [path for path in (tmp_path / "4").rglob("*") if path.is_file()]
    read = [path for path in held if not path.parts[-2].startswith(("ocdbt", "4"))]
    refusals = 0
    for path, size in itertools.product(read, (0, 0.5)):
        whole = path.read_bytes()
        os.truncate(path, int(len(whole) * size))
        written = contents(tmp_path)
        try:
            run = fit(tmp_path, 4)
        except ValueError as error:
            refusals += 1
            assert f"{tmp_path / '4'} cannot be read, expected the state of a run" in str(error)
            assert "Other checkpoints in the folder: [2]" in str(error)
        else:
            assert run.step == 4  # nothing of the run was in what is missing
        assert contents(tmp_path) == written
        path.write_bytes(whole)
    assert refusals >= 6


def test_what_cannot_be_a_folder_of_checkpoints_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(ValueError, match=r"checkpoints: takes a folder, got the file .*file"):
        fit(file, 2)
    assert file.read_text() == "text"
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="takes orbax-checkpoint; pip install"):
        fit(tmp_path / "new", 2)
