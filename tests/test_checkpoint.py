"""Stopping a run and going on from its checkpoints."""

import concurrent.futures
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
# A run that is the same is gone on with in silence.
pytestmark = pytest.mark.filterwarnings("error:checkpoints:UserWarning")

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


def fit(folder, steps=None, model=MODEL, loss=LOSS, optimizer=ADAM, batches=BATCHES, **given):
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
    settings |= given
    if settings["evaluation"] is None:
        settings["metrics"] = None
    params = jax.jit(model.init)(jax.random.key(0), X[0])
    return bp.fit(model, loss, params, batches, optimizer, **settings)


def assert_same(a, b):
    """Two runs, bit for bit."""
    parts = [(run.params, run.opt_state, run.step, run.epoch, vars(run.history)) for run in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


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


def test_a_schedule_goes_on_where_it_was(tmp_path):
    for steps in (2, 3, 6):  # more steps are no other run
        run = fit(tmp_path, steps, optimizer=schedule(0.0), evaluation=None)
    assert_same(run, fit(None, 6, optimizer=schedule(0.0), evaluation=None))


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
    assert steps_in(tmp_path) == [6, 8]


CHILD = """
import sys, warnings
import jax, numpy as np
import test_checkpoint as t

warnings.simplefilter("error", UserWarning)  # in a new process it is the same run
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
        kills.append((random.randint(1, 4), random.uniform(0, 0.1)))  # in steps, and in seconds
        for _ in range(kills[-1][0]):
            process.stdout.readline()
        time.sleep(kills[-1][1])
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


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (bp.lstm(4), "lstm(4)"),
        (bp.lstm(4, reverse=True, truncate=2), "lstm(4, reverse=True, truncate=2)"),
        (bp.rnn(4, activation="relu", output="last"), "rnn(4, activation=relu, output=last)"),
        (bp.gru(4, trained_state=True), "gru(4, trained_state=True)"),
        (bp.gru(4, checkpoint=2), "gru(4, checkpoint=2)"),
        (bp.bidirectional(bp.gru(4)), "bidirectional(gru(4), gru(4, reverse=True))"),
        (bp.dense(4), "dense(4)"),
        (bp.dense(4, bias=False), "dense(4, bias=False)"),
        (bp.embedding(5, 4), "embedding(5, 4)"),
        (bp.embedding(5, 4, dtype=jnp.bfloat16), "embedding(5, 4, dtype=bfloat16)"),
        (bp.leaky_relu(0.2), "leaky_relu(0.2)"),
        (bp.concatenate(0), "concatenate(0)"),
        (bp.repeat(bp.dense(4), 2), "repeat(dense(4), 2)"),
        (
            bp.tied(bp.chain(bp.dense(4), bp.dense(4)), {(1, "weight"): (0, "weight")}),
            "tied(chain(dense(4), dense(4)), 1.weight=0.weight)",
        ),
    ],
    ids=str,
)
def test_a_name_says_what_a_layer_is_made_with(layer, name):
    assert layer.name == name


def stem(act, loss=LOSS):
    """A run of a model with an activation, and of a loss."""
    model = bp.chain(bp.dense(6), act, bp.dense(3))
    return {"model": model, "loss": loss, "frozen": None, "evaluation": None}


def named(sigma, dsigma=jnp.cos):
    return bp.activation(sigma, dsigma, name="mine")


def lossy(factor):
    """Losses of one name."""
    return bp.losses.loss(
        lambda a, y: factor * LOSS.value(a, y), lambda a, y: factor * LOSS.delta(a, y), name="mine"
    )


SLOPES = np.linspace(1, 2, 6, dtype=np.float32)


@pytest.mark.parametrize(
    ("begun", "other", "method"),
    [
        (stem(named(jnp.sin)), stem(named(jnp.arctan)), "manual"),
        (stem(named(jnp.sin)), stem(named(jnp.arctan)), "autodiff"),
        (stem(named(jnp.sin)), stem(named(jnp.sin, jnp.sin)), "manual"),
        (stem(named(lambda z: z * SLOPES)), stem(named(lambda z: z * SLOPES[::-1])), "manual"),
        (stem(bp.tanh, lossy(1.0)), stem(bp.tanh, lossy(2.0)), "manual"),
    ],
    ids=["function", "function by autodiff", "derivative", "constant", "loss"],
)
def test_functions_of_one_name_are_told_apart(begun, other, method, tmp_path):
    fit(tmp_path, 2, method=method, **begun)
    written = contents(tmp_path)
    with pytest.raises(bp.ModelError, match="model and loss: of the same names and shapes, they"):
        fit(tmp_path, 4, method=method, **other)
    assert contents(tmp_path) == written


def schedule(last):
    return optax.adam(optax.linear_schedule(1e-2, last, 9))


def injected(rate):
    return optax.inject_hyperparams(optax.sgd)(rate)


RATE = "optimizer: its updates are others, by another learning rate, schedule or option"
ORDER = "batches: the first batch of the first epoch holds something else"


@pytest.mark.parametrize(
    ("begun", "other", "said"),
    [
        ({}, {"optimizer": optax.adam(2e-2)}, RATE),
        ({"optimizer": schedule(0.0)}, {"optimizer": schedule(1e-3)}, RATE),
        ({"optimizer": injected(0.1)}, {"optimizer": injected(0.2)}, "those of the checkpoint are"),
        ({}, {"batches": bp.minibatches(X, Y, 8, seed=2)}, ORDER),
        ({}, {"batches": bp.minibatches(X, Y, 5, seed=1)}, "batch size: it has 8, this run has 5"),
        ({}, {"method": "autodiff"}, "method: it has manual, this run has autodiff"),
        ({}, {"microbatch": 4}, "microbatch: it has none, this run has 4"),
    ],
)
def test_what_may_be_another_is_said(begun, other, said, tmp_path):
    fit(tmp_path, 3, every=3, evaluation=None, **begun)  # at the end of an epoch
    with pytest.warns(UserWarning, match=said) as warned:
        run = fit(tmp_path, 4, every=3, evaluation=None, **other)
    assert run.step == 4
    assert [str(w.message).count("\n") for w in warned] == [1]
    assert warned[0].filename == __file__


def test_another_version_of_jax_is_said_and_nothing_is_refused_for_it(tmp_path, monkeypatch):
    fit(tmp_path, 2, **stem(named(jnp.sin)))
    monkeypatch.setattr(jax, "__version__", "0.99")
    with pytest.warns(UserWarning, match=r"software: it has jax .*, this run has jax 0\.99, optax"):
        fit(tmp_path, 4, **stem(named(jnp.cos)))


def test_epochs_of_any_kind_are_gone_on_with_in_silence(tmp_path):
    """Every epoch is asked for once, but the first, where a run goes on from a later one."""
    asked = []

    def batches(epoch):
        asked.append(epoch)
        yield from BATCHES(epoch)

    fit(tmp_path / "function", epochs=1, every=None, batches=batches)
    assert asked == [0]
    whole = fit(None, epochs=3, every=None)
    assert_same(fit(tmp_path / "function", epochs=3, every=None, batches=batches), whole)
    assert asked == [0, 0, 1, 2]

    class Loader:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return BATCHES(0)

    loader = Loader()
    fit(tmp_path / "loader", epochs=1, every=None, batches=loader)
    fit(tmp_path / "loader", epochs=3, every=None, batches=loader)
    assert loader.begun == 3
    fit(tmp_path / "once", 2, batches=BATCHES(0))
    assert fit(tmp_path / "once", 3, batches=BATCHES(0)).step == 3


def interrupting(*places):
    """Batches, and a callback, that press Ctrl-C at these batches or looks of the run."""
    met = itertools.count()

    def press():
        if next(met) in places:
            signal.raise_signal(signal.SIGINT)

    def batches(epoch):
        for batch in BATCHES(epoch):
            press()
            yield batch

    return batches, lambda run: press()


@pytest.mark.parametrize(("every", "places"), [(None, {1: 1, 3: 3, 4: 3}), (2, {0: 0, 2: 2, 4: 3})])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(every, places, tmp_path):
    """Interrupted while a batch is fetched (1, 4; 0, 4), and while it is looked at (3; 2).

    Args:
      places: which batch or look is interrupted, with the steps done by then.
    """
    whole = fit(None, 7, every=every)
    for place, step in places.items():
        looks = []
        folder = tmp_path / str(place)
        batches, callback = interrupting(place)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, 7, every=every, batches=batches, callbacks=[callback])
        assert steps_in(folder)[-1:] == ([step] if step else [])
        resumed = fit(folder, 7, every=every, callbacks=[lambda run: looks.append(run.step)])  # noqa: B023
        assert_same(resumed, whole)
        assert looks and looks[-1] == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_midst_of_a_step_waits_for_its_end(tmp_path):
    whole = fit(None, 6, every=3)
    presses = []

    def check(a, y):
        """Targets are looked at inside a step."""
        if not isinstance(y, jax.core.Tracer) and len(presses) < 1:
            presses.append(signal.raise_signal(signal.SIGINT))

    pressing = bp.losses.loss(LOSS.value, LOSS.delta, check=check, name=LOSS.name)
    steps = []
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, 6, every=3, loss=pressing, callbacks=[lambda run: steps.append(run.step)])
    assert presses and not steps
    assert steps_in(tmp_path) == [1]
    assert_same(fit(tmp_path, 6, every=3), whole)


def test_a_second_ctrl_c_ends_a_step_at_once(tmp_path):
    def check(a, y):
        if not isinstance(y, jax.core.Tracer):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

    pressing = bp.losses.loss(LOSS.value, LOSS.delta, check=check, name=LOSS.name)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, 6, loss=pressing)
    assert steps_in(tmp_path) == []


def test_a_handler_of_ones_own_is_called_and_left_in_place(tmp_path):
    called = []
    before = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        batches, callback = interrupting(3)
        assert fit(tmp_path, 6, batches=batches, callbacks=[callback]).step == 6
        assert called == [signal.SIGINT]
    finally:
        assert signal.signal(signal.SIGINT, before) is not before


def test_a_run_in_another_thread_writes_checkpoints(tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as threads:
        assert threads.submit(fit, tmp_path, 4).result().step == 4


INTERRUPTED = """
import sys
import test_checkpoint as t

def batches(epoch):
    for batch in t.BATCHES(epoch):
        print(epoch, flush=True)
        yield batch

t.fit(sys.argv[1], 10**6, every=10**6, batches=batches)
"""


def test_a_process_that_ctrl_c_ends_leaves_its_last_step(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, tmp_path],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    begun = [process.stdout.readline() for _ in range(4)]  # it trains
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGINT)
    fetched = len(begun) + len(process.stdout.readlines())
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGINT and errors.endswith("KeyboardInterrupt\n")
    (step,) = steps_in(tmp_path)
    assert step in (fetched - 1, fetched)
    assert_same(fit(tmp_path, step + 2, every=10**6), fit(None, step + 2, every=10**6))


def test_a_second_run_in_a_folder_is_refused_while_the_first_writes_there(tmp_path):
    refusals = []

    def second(run):
        with pytest.raises(ValueError, match="is being written by another run") as error:
            fit(tmp_path, 4)
        with pytest.raises(ValueError, match="is being written by another run"):
            bp.delete_checkpoints(tmp_path)
        refusals.append(str(error.value))

    run = fit(tmp_path, 4, callbacks=[second])
    sentence = f"checkpoints: {tmp_path} is being written by another run (process {os.getpid()})"
    assert refusals == [sentence] * 2
    assert_same(fit(tmp_path, 4), run)
    bp.delete_checkpoints(tmp_path)
    assert_same(fit(tmp_path, 4, resume=False), run)


FULL = """
import resource, signal, sys, time
from pathlib import Path
import test_checkpoint as t

def allow(size):  # bytes of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for last in (6, 10):
    folder = Path(sys.argv[1], str(last))

    def full(run):
        if run.step == 6:
            while not (folder / "4").exists():
                time.sleep(0.01)
            allow(int(sys.argv[2]))

    try:
        t.fit(folder, last, callbacks=[full])
    except OSError as error:
        print(error)
    allow(resource.RLIM_INFINITY)
"""


def test_a_disk_that_is_full_is_said_in_a_sentence_and_loses_nothing(tmp_path):
    """It fills while the last checkpoint is written, and one on the way."""
    pytest.importorskip("resource")
    ran = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, "2000"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""
    for last, said in zip((6, 10), ran.stdout.splitlines(), strict=True):
        assert said == (
            f"checkpoints: step 6 could not be written to {tmp_path / str(last)}: File too large; "
            "the latest complete one is step 4"
        )
        assert_same(fit(tmp_path / str(last), 10), fit(None, 10))


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
