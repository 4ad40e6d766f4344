"""Several steps to a call: the same run, bit for bit, from the same batches."""

import functools
import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp
from functional_bp.training import calls

LOSS = bp.losses.softmax_cross_entropy
X = np.random.default_rng(0).normal(size=(46, 6)).astype(np.float32)
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
BATCHES = bp.minibatches(X, Y, 4, seed=1)  # 12 to an epoch, of which the last has 2 examples
WEIGHTS = np.random.default_rng(1).uniform(size=len(Y))


def weighted(epoch):
    for rows in np.split(np.random.default_rng(epoch).permutation(44), 11):
        yield X[rows], Y[rows], WEIGHTS[rows]


def of_two_lengths(epoch):
    """Sequences, three batches of one length and three of another by turns."""
    for i in range(12):
        rows, length = slice(3 * i, 3 * i + 3), 2 + i // 3 % 2
        yield np.stack([X[rows]] * length, axis=1), Y[rows]


DENSE = bp.chain(bp.dense(5), bp.sigmoid, bp.dense(3))
NORMED = bp.chain(bp.dense(5), bp.batch_norm(), bp.relu, bp.dense(3))
NOISY = bp.chain(bp.dense(5), bp.dropout(0.3), bp.tanh, bp.dense(3))
RECURRENT = bp.chain(bp.gru(4, output="last"), bp.dense(3))
SGD, ADAM = optax.sgd(0.5), optax.adam(1e-2)
RUNS = {
    "dense and sigmoid": {"model": DENSE, "optimizer": SGD},
    "running averages": {"model": NORMED},
    "dropout": {"model": NOISY, "key": jax.random.key(3)},
    "frozen": {"model": DENSE, "frozen": lambda path: path[0] == 0},
    "weights": {"model": DENSE, "batches": weighted},
    "microbatches": {"model": DENSE, "microbatch": 2},
    "autodiff": {"model": DENSE, "method": "autodiff"},
    "looks on the way": {"model": NOISY, "key": jax.random.key(3), "every": 5},
    "a list": {"model": DENSE, "batches": list(BATCHES(0))},
    "two lengths": {"model": RECURRENT, "batches": of_two_lengths, "example": X[:2]},
    "clipping and a schedule": {
        "model": DENSE,
        "optimizer": optax.chain(
            optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(0.1, 0.01, 20))
        ),
    },
}


@functools.cache
def start(model, shape):
    return jax.jit(model.init)(jax.random.key(0), jnp.ones(shape))


def fit(model=DENSE, optimizer=ADAM, batches=BATCHES, example=X[0], **given):
    settings = given if "steps" in given else {"epochs": 3} | given
    return bp.fit(model, LOSS, start(model, example.shape), batches, optimizer, **settings)


def assert_same(a, b):
    """Two runs, bit for bit."""
    parts = [(run.params, run.opt_state, run.step, run.epoch, vars(run.history)) for run in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


@pytest.fixture
def patient(monkeypatch):
    """A call may be long: how many steps it has does not hang on time."""
    monkeypatch.setattr(calls, "_LONGEST", 1e9)


@pytest.fixture
def counted(monkeypatch):
    """How many steps each call was made with."""
    counts = []
    run = calls.Calls.run

    def counting(self, state, batches, form):
        counts.append(sum(batch.steps for batch in batches))
        return run(self, state, batches, form)

    monkeypatch.setattr(calls.Calls, "run", counting)
    return counts


@pytest.mark.parametrize("name", RUNS)
def test_several_steps_to_a_call_are_the_same_run(name, patient, counted):
    one = fit(**RUNS[name], steps_per_call=1)
    assert set(counted) == {1}
    for several in (2, 5, 100, None):
        counted.clear()
        assert_same(fit(**RUNS[name], steps_per_call=several), one)
        assert max(counted) > 1


@pytest.mark.parametrize("name", ["running averages", "dropout", "weights", "looks on the way"])
def test_a_run_goes_on_with_another_number_of_steps_to_a_call(name, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    whole = fit(**RUNS[name], steps_per_call=1, steps=30)
    for steps, several in ((1, 4), (2, 1), (9, 4), (12, 8), (25, 3), (30, 8)):
        how = {"checkpoints": tmp_path, "resume": True, "steps": steps}
        run = fit(**RUNS[name] | how, steps_per_call=several)
    assert_same(run, whole)


@pytest.mark.parametrize("several", [1, 4, None])
def test_no_batch_is_asked_for_before_it_is_needed(several, patient):
    asked = []

    def batches(epoch):
        for i in itertools.count():
            asked.append(i)
            yield X[:4], Y[:4]

    seen = []
    fit(
        batches=batches,
        steps=23,
        every=10,
        steps_per_call=several,
        callbacks=[lambda run: seen.append((run.step, len(asked)))],
    )
    assert seen == [(10, 10), (20, 20), (23, 23)]
    once = iter([(X[:4], Y[:4])] * 40)
    fit(batches=once, steps=7, steps_per_call=several)
    assert len(list(once)) == 33


def test_arrays_on_a_device_go_one_at_a_time(counted):
    batches = [(jnp.asarray(X[:4]), Y[:4])] * 3 + [(X[:4], Y[:4])] * 3
    run = fit(batches=batches, epochs=2, steps_per_call=4)
    assert counted == [1, 1, 1, 3] * 2
    assert run.step == 12


def test_what_changes_the_types_of_its_state_is_stepped_with(counted):
    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda p: (p + 1).astype(jnp.float32), state)

    widening = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.bfloat16), update)
    runs = [
        fit(optimizer=optax.chain(widening, SGD), steps=20, steps_per_call=several)
        for several in (1, 8)
    ]
    assert_same(*runs)
    assert runs[0].opt_state[0] == 20 and 8 in counted


@pytest.mark.parametrize("several", [1, 4, 64])
def test_a_loss_that_is_not_finite_is_named_by_its_step(several):
    def batches(epoch):
        for i in itertools.count():
            asked.append(i)
            yield (X[:4] if i < 10 else np.nan * X[:4]), Y[:4]

    asked = []
    with pytest.raises(FloatingPointError, match="nan at step 11, batch 11 of epoch 1"):
        fit(batches=batches, steps=10**9, steps_per_call=several)
    assert len(asked) == 256


@pytest.mark.parametrize("place", [0, 3, 6, 9])
def test_an_interrupt_between_gathering_and_training_loses_no_step(place, tmp_path):
    pytest.importorskip("orbax.checkpoint")

    def batches(epoch):
        for i, batch in enumerate(BATCHES(epoch)):
            if i == place:
                signal.raise_signal(signal.SIGINT)
            yield batch

    how = {"checkpoints": tmp_path, "resume": True, "epochs": 2, "key": None}
    with pytest.raises(KeyboardInterrupt):
        fit(batches=batches, steps_per_call=4, **how)
    written = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert written == ([place] if place else [])
    assert_same(fit(steps_per_call=4, **how), fit(epochs=2))


def test_class_ids_are_looked_at_in_every_batch():
    y = np.where(np.arange(46) == 30, 3, Y)
    with pytest.raises(bp.ModelError, match="takes class ids from 0 to 2, got 0 to 3"):
        fit(batches=bp.minibatches(X, y, 4), steps_per_call=5)


class Held:
    """An array of another library's."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_a_batch_of_another_library_leaves_the_others_weights():
    batches = [(X[:4], Y[:4]), (Held(X[:6]), Held(Y[:6])), (X[:4], Y[:4])]
    run = fit(batches=batches, epochs=1)
    assert run.history.weight.tolist() == [4, 6, 4]


def test_minibatches_know_how_many_they_are():
    for n, size, batches in ((46, 4, 12), (44, 4, 11), (3, 4, 1)):
        made = bp.minibatches(X[:n], Y[:n], size)
        assert len(made) == batches == len(list(made(0)))
