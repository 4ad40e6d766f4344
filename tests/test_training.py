"""bp.fit, bp.evaluate and bp.minibatches."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_bp as bp

MODEL = bp.chain(bp.dense(8), bp.tanh, bp.dense(3))
LOSS = bp.losses.softmax_cross_entropy
ACCURACY = {"accuracy": lambda a, y: a.argmax(-1) == y}
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-2)  # made once, so that each model is compiled once


def data(n=20, features=5, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, features)).astype(np.float32)
    return x, (x @ random.normal(size=(features, 3))).argmax(-1)


@functools.cache
def start(model=MODEL):
    return jax.jit(model.init)(jax.random.key(0), data()[0][0])


def assert_equal(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def by_hand(model, params, batches, optimizer, method="manual"):
    """The loop that fit stands for."""
    gradient = bp.value_and_grad(model, LOSS, method=method)

    @jax.jit
    def step(params, state, x, y):
        loss, grads = gradient(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(optimizer.init)(params), []
    for x, y in batches:
        params, state, loss = step(params, state, x, y)
        losses.append(loss)
    return params, state, np.array(losses)


@pytest.mark.parametrize("method", ["manual", "autodiff"])
def test_fit_is_the_bare_loop(method):
    x, y = data()
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    run = bp.fit(MODEL, LOSS, start(), batches, ADAM, epochs=3, method=method)
    params, state, losses = by_hand(MODEL, start(), batches * 3, ADAM, method)
    assert_close((run.params, run.opt_state, run.history.loss), (params, state, losses))
    assert (run.step, run.epoch) == (9, 3)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(optax.linear_schedule(1.0, 0.1, 9))),
        optax.adamw(1e-2),
        optax.MultiSteps(ADAM, every_k_schedule=3),
        optax.polyak_sgd(),  # asks for the cost
        optax.chain(SGD, optax.scale_by_backtracking_linesearch(4)),  # asks for the function
    ],
    ids=["schedule and clipping", "adamw", "multi-steps", "polyak", "line search"],
)
def test_any_optax_transformation_trains(optimizer):
    run = bp.fit(MODEL, LOSS, start(), [data()], optimizer, epochs=12)
    assert run.history.loss[-1] < run.history.loss[0]


def traced(loss):
    """The loss, and a list of the batch sizes it was traced for."""
    sizes = []

    def check(a, y):
        if isinstance(y, jax.core.Tracer):
            sizes.append(a.shape[0])

    return bp.losses.loss(loss.value, loss.delta, check=check), sizes


def test_a_ragged_last_batch_is_not_compiled_for():
    loss, sizes = traced(LOSS)
    bp.fit(MODEL, loss, start(), bp.minibatches(*data(20), 16), SGD, epochs=2)
    assert sizes == [16]


def test_a_batch_larger_than_the_first_is_taken():
    x, y = data(20)
    batches = [(x[:4], y[:4]), (x[4:], y[4:]), (x[:4], y[:4])]
    run = bp.fit(MODEL, LOSS, start(), batches, SGD, epochs=1)
    assert_close(run.params, by_hand(MODEL, start(), batches, SGD)[0])
    assert run.history.weight.tolist() == [4, 16, 4]


def test_batches_are_not_filled_up_where_examples_are_mixed():
    model = dataclasses.replace(bp.dense(3), mixes_examples=True)
    loss, sizes = traced(LOSS)
    bp.fit(model, loss, start(model), bp.minibatches(*data(20), 16), SGD, epochs=1)
    assert sizes == [16, 4]


def test_examples_of_weight_0_change_nothing():
    x, y = data(12)
    weights = np.array([1.0, 2.0] * 4 + [0.0] * 4)
    spoilt = np.concatenate([x[:8], 100 * x[8:]])
    optimizer = ADAM
    weighted = bp.fit(MODEL, LOSS, start(), [(spoilt, y, weights)], optimizer, epochs=3)
    without = bp.fit(MODEL, LOSS, start(), [(x[:8], y[:8], weights[:8])], optimizer, epochs=3)
    assert_close(weighted.params, without.params)
    assert_close(weighted.history.loss, without.history.loss)


def test_the_callers_parameters_stay_as_they_were():
    params = start()
    before = jax.tree.map(np.array, params)
    bp.fit(MODEL, LOSS, params, [data()], ADAM, epochs=3)
    assert_equal(before, params)


def test_parameters_that_share_a_buffer_are_trained_apart():
    model = bp.chain(bp.dense(5), bp.dense(5), bp.dense(3))
    params = start(model)
    run = bp.fit(model, LOSS, (params[0], params[0], params[2]), [data()], SGD, epochs=2)
    assert not np.array_equal(run.params[0]["weight"], run.params[1]["weight"])


def test_frozen_parameters_are_not_touched_by_weight_decay():
    params = start()
    run = bp.fit(
        MODEL,
        LOSS,
        params,
        [data()],
        optax.adamw(1e-2, weight_decay=0.5),
        epochs=5,
        frozen=lambda path: path[0] == 0,
    )
    assert_equal(run.params[0], params[0])
    assert not np.array_equal(run.params[2]["weight"], params[2]["weight"])
    assert run.opt_state[0].mu[0] == {"weight": None, "bias": None}


def test_tied_parameters_train():
    model = bp.tied(
        bp.chain(bp.dense(5), bp.tanh, bp.dense(5), bp.dense(3)), {(2, "weight"): (0, "weight")}
    )
    run = bp.fit(model, LOSS, start(model), [data()], optax.adamw(1e-2), epochs=20)
    assert run.params[2]["weight"] is None
    assert run.history.loss[-1] < run.history.loss[0]


@pytest.mark.filterwarnings("ignore:key. without one:UserWarning")
def test_noise_comes_from_the_key():
    model = bp.chain(bp.dense(8), bp.dropout(0.5), bp.dense(3))

    def losses(key):
        run = bp.fit(model, LOSS, start(model), [data()], optax.sgd(0.0), epochs=3, key=key)
        return run.history.loss

    noisy = losses(jax.random.key(1))
    assert len(set(noisy)) == 3
    assert_equal(noisy, losses(jax.random.key(1)))
    assert not np.array_equal(noisy, losses(jax.random.key(2)))
    assert len(set(losses(None))) == 1


def test_microbatches_give_the_same_run():
    whole = bp.fit(MODEL, LOSS, start(), [data()], SGD, epochs=3)
    parts = bp.fit(MODEL, LOSS, start(), [data()], SGD, epochs=3, microbatch=8)
    assert_close(whole.params, parts.params)


def test_steps_end_a_run_inside_an_epoch():
    x, y = data(20)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    run = bp.fit(MODEL, LOSS, start(), batches, SGD, steps=7)
    assert (run.step, run.epoch) == (7, 1)
    assert run.history.epoch.tolist() == [0] * 5 + [1] * 2
    assert_close(run.params, by_hand(MODEL, start(), (batches * 2)[:7], SGD)[0])


def test_no_steps_leave_the_parameters():
    run = bp.fit(MODEL, LOSS, start(), [data()], SGD, steps=0)
    assert_equal(run.params, start())
    assert run.history.epoch_loss.shape == (0,)


def test_batches_may_be_a_function_of_the_epoch():
    asked = []

    def batches(epoch):
        asked.append(epoch)
        yield data(seed=epoch)

    bp.fit(MODEL, LOSS, start(), batches, SGD, epochs=3)
    assert asked == [0, 1, 2]


def test_inputs_may_be_trees_and_endless():
    joined = bp.rule(
        lambda key, x: (),
        lambda params, x, key=None: (x["a"] + x["b"], ()),
        lambda params, residuals, dy: ({"a": dy, "b": dy}, ()),
    )
    model = bp.chain(joined, bp.dense(3))
    x, y = data()
    params = model.init(jax.random.key(0), {"a": x[0], "b": x[0]})
    endless = itertools.repeat(({"a": x, "b": x}, y))
    run = bp.fit(model, LOSS, params, endless, SGD, steps=4)
    assert run.step == 4


def test_history_is_arrays_and_its_epoch_loss_a_mean_over_examples():
    x, y = data(20)
    run = bp.fit(MODEL, LOSS, start(), bp.minibatches(x, y, 16), SGD, epochs=2)
    history = run.history
    assert history.loss.shape == history.weight.shape == history.epoch.shape == (4,)
    mean = (16 * history.loss[0] + 4 * history.loss[1]) / 20
    np.testing.assert_allclose(history.epoch_loss[0], mean, rtol=1e-12)


def test_evaluation_is_the_mean_over_examples_whatever_the_batches():
    x, y = data(20)
    params = start()
    a = MODEL.apply(params, x)
    weights = np.arange(20.0)
    expected = {
        "loss": np.average(jax.vmap(LOSS.value)(a, y), weights=weights),
        "accuracy": np.average(a.argmax(-1) == y, weights=weights),
    }
    measure = bp.evaluate(MODEL, LOSS, metrics=ACCURACY)
    for size in (3, 7, 20):
        batches = [
            (x[i : i + size], y[i : i + size], weights[i : i + size]) for i in range(0, 20, size)
        ]
        assert measure(params, batches) == pytest.approx(expected, rel=1e-5)


def test_every_look_evaluates_and_calls_back():
    x, y = data(20)
    seen = []
    run = bp.fit(
        MODEL,
        LOSS,
        start(),
        bp.minibatches(x, y, 8),
        SGD,
        steps=8,
        every=3,
        evaluation=[(x, y)],
        metrics=ACCURACY,
        callbacks=[lambda run: seen.append((run.step, run.epoch, len(run.history.loss)))],
    )
    assert seen == [(3, 0, 3), (6, 1, 6), (8, 2, 8)]
    assert run.history.evaluated.tolist() == [3, 6, 8]
    measured = bp.evaluate(MODEL, LOSS, metrics=ACCURACY)(run.params, [(x, y)])
    assert {k: v[-1] for k, v in run.history.evaluation.items()} == measured


def test_looks_are_at_the_ends_of_epochs_by_default():
    x, y = data(20)
    seen = []
    callbacks = [lambda run: seen.append((run.step, run.epoch))]
    batches = bp.minibatches(x, y, 8)
    bp.fit(MODEL, LOSS, start(), batches, SGD, epochs=2, callbacks=callbacks)
    assert seen == [(3, 1), (6, 2)]


def test_a_callback_that_returns_true_ends_the_run():
    run = bp.fit(MODEL, LOSS, start(), [data()], SGD, steps=50, callbacks=[lambda r: r.step == 4])
    assert run.step == 4


def test_a_loss_that_is_nan_is_named_by_its_step():
    x, y = data(20)
    spoilt = x.copy()
    spoilt[9] = np.nan

    def batches(epoch):
        return bp.minibatches(spoilt if epoch == 1 else x, y, 8)(epoch)

    with pytest.raises(FloatingPointError, match="nan at step 5, batch 2 of epoch 2"):
        bp.fit(MODEL, LOSS, start(), batches, SGD, epochs=3)
    run = bp.fit(MODEL, LOSS, start(), batches, SGD, epochs=3, stop_on_nan=False)
    assert np.isnan(run.history.loss[4:]).all() and np.isfinite(run.history.loss[:4]).all()


def test_a_nan_is_found_in_an_endless_epoch():
    x, y = data(20)
    batches = itertools.chain([(x, y)] * 10, itertools.repeat((np.nan * x, y)))
    with pytest.raises(FloatingPointError, match="nan at step 11, batch 11 of epoch 1"):
        bp.fit(MODEL, LOSS, start(), batches, SGD, steps=10**9)


def test_importing_the_package_imports_no_extra():
    code = (
        "import sys, functional_bp\n"
        "print({'orbax', 'safetensors', 'tqdm', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def fit(batches=None, optimizer=None, **given):
    batches = [data()] if batches is None else batches
    settings = given or {"epochs": 1}
    return bp.fit(MODEL, LOSS, start(), batches, optimizer or SGD, **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 1, "steps": 1}, "takes epochs or steps, one of the two"),
        ({"key": None}, "takes epochs or steps, one of the two"),
        ({"epochs": -1}, "epochs: takes a whole number from 0, got -1"),
        ({"steps": 2.5}, "steps: takes a whole number from 0, got 2.5"),
        ({"epochs": 1, "every": 0}, "every: takes a whole number from 1, got 0"),
        ({"epochs": 1, "key": 3}, "key: takes one key of jax.random, got 3"),
        ({"epochs": 1, "optimizer": "adam"}, "optimizer: takes an optax.GradientTransformation"),
        ({"epochs": 1, "method": "magic"}, "method: takes one of"),
        ({"epochs": 2, "batches": iter([data()])}, "an iterator is run through once"),
        ({"steps": 9, "batches": iter([data()])}, "epoch 2 needs it again"),
        ({"epochs": 1, "evaluation": iter([data()])}, "an iterator is run through once"),
        ({"epochs": 1, "batches": 3}, "batches: takes an iterable or a function"),
        ({"epochs": 1, "batches": data()}, r"got an array of shape \(20, 5\); is it a batch"),
        ({"epochs": 1, "batches": [(1, 2, 3, 4)]}, "got a tuple of 4"),
        ({"epochs": 1, "batches": []}, "batches: takes at least one per epoch, got none in 1"),
        ({"epochs": 1, "evaluation": []}, "batches: takes examples to evaluate"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        fit(**given)


def test_a_batch_that_does_not_fit_is_named():
    x, y = data()
    good = (x, y)
    with pytest.raises(bp.ModelError, match=r"got 20 examples .* and 3 targets"):
        fit([good, (x, y[:3])])
    with pytest.raises(bp.ModelError, match=r"chain\[0\] dense\(8\): takes examples of shape"):
        fit([good, (x[:, :4], y)])
    with pytest.raises(bp.ModelError, match="takes class ids from 0 to 2, got 0 to 3"):
        fit([good, (x, y), (x, np.where(np.arange(20) == 7, 3, y))])
    with pytest.raises(bp.ModelError, match="empty batch"):
        fit([good, (x[:0], y[:0])])
    with pytest.raises(bp.ModelError, match=r"metrics: mean takes .* to one value per example"):
        fit(epochs=1, evaluation=[good], metrics={"mean": lambda a, y: jnp.mean(a)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"one real number per example, \(20,\), got float64\(3,\)"),
        (np.ones((20, 1)), r"one real number per example, \(20,\), got float64\(20, 1\)"),
        (3.0, r"one real number per example, \(20,\), got .*3"),
        (np.full(20, 1j), r"one real number per example, \(20,\), got complex128\(20,\)"),
        (["heavy"] * 20, r"one real number per example, \(20,\), got <U5\(20,\)"),
        (np.where(np.arange(20) == 7, -1, 1), "finite numbers from 0, got -1 for example 7"),
        (np.where(np.arange(20) == 7, np.nan, 1), "finite numbers from 0, got nan for example 7"),
        (jnp.full(20, jnp.inf), "finite numbers from 0, got inf for example 0"),
    ],
)
def test_weights_that_are_none_are_named(weights, message):
    x, y = data()
    with pytest.raises(bp.ModelError, match=f"^weights: takes {message}"):
        fit([(x, y), (x, y, weights)])
    with pytest.raises(bp.ModelError, match=f"^weights: takes {message}"):
        bp.evaluate(MODEL, LOSS)(start(), [(x, y, weights)])


def test_minibatches_have_every_example_once_an_epoch():
    x, y = np.arange(10.0), np.arange(10)
    for seed in (None, 0):
        batches = bp.minibatches({"x": x}, y, 4, seed=seed)
        epochs = [list(batches(epoch)) for epoch in (0, 1, 1)]
        orders = [np.concatenate([b[1] for b in epoch]) for epoch in epochs]
        assert [len(b[1]) for b in epochs[0]] == [4, 4, 2]
        assert all(sorted(order) == list(range(10)) for order in orders)
        assert all(np.array_equal(bx["x"], by) for bx, by in itertools.chain(*epochs))
        assert np.array_equal(orders[1], orders[2])
        assert np.array_equal(orders[0], orders[1]) == (seed is None)


def test_minibatches_take_examples_with_their_targets():
    with pytest.raises(bp.ModelError, match=r"10 examples .* and 9 targets"):
        bp.minibatches(np.zeros(10), np.zeros(9), 4)
    for size in (0, 2.5, "4"):
        with pytest.raises(bp.ModelError, match=f"size: takes a whole number from 1, got .*{size}"):
            bp.minibatches(np.zeros(10), np.zeros(10), size)
    with pytest.raises(bp.ModelError, match="seed: takes a whole number from 0, got -1"):
        bp.minibatches(np.zeros(10), np.zeros(10), 4, seed=-1)


def tried(model, **given):
    """A step, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bp.fit(model, LOSS, start(model), [data()], SGD, **{"steps": 1} | given)


NOISY = bp.chain(bp.dense(8), bp.residual(bp.chain(bp.dropout(0.5), bp.dense(8))), bp.dense(3))
TRACED = bp.from_function(
    lambda params, x, key=None: params["w"] @ x,
    init=lambda key, x: {"w": jnp.zeros((3, *x.shape))},
    name="traced",
)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (NOISY, r"nothing is random in chain\[1\]\[0\]\[0\] dropout\(0.5\); give key=jax.random"),
        (TRACED, "nothing is random in traced; give key="),
        (bp.chain(bp.dropout(0.1), bp.dense(3)), r"in chain\[0\] dropout\(0.1\);"),
        (bp.chain(*[bp.dropout(0.1)] * 5, bp.dense(3)), r"chain\[2\] dropout\(0.1\) and 2 more;"),
    ],
)
def test_a_random_layer_without_a_key_is_named(model, named):
    with pytest.warns(UserWarning, match=named) as said:
        bp.fit(model, LOSS, start(model), [data()], SGD, steps=1)
    assert len(said) == 1 and said[0].filename == __file__
    tried(model, key=jax.random.key(0))


def test_a_layer_in_its_inference_form_wants_no_key():
    tried(bp.chain(bp.dense(8), bp.dropout(0.5).inference(), bp.dense(3)))
    tried(NOISY.inference())
    tried(MODEL)


def test_a_module_of_a_library_is_random_where_it_drops():
    eqx = pytest.importorskip("equinox")
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    key, x = jax.random.key(0), data()[0][0]
    linear, rngs = eqx.nn.Linear(5, 3, key=key), nnx.Rngs(0)
    for dropped in (False, True):
        rate = 0.5 * dropped
        noisy = {"noisy": {"deterministic": False}} if dropped else {}
        flax = bp.from_flax(nn.Dropout(rate), deterministic=True, **noisy)
        models = [
            (flax, flax.init(key, x)),
            bp.from_equinox(eqx.nn.Sequential([linear, eqx.nn.Dropout(rate)])),
            bp.from_nnx(nnx.Sequential(nnx.Linear(5, 3, rngs=rngs), nnx.Dropout(rate, rngs=rngs))),
        ]
        assert [model.random for model, _ in models] == [dropped] * 3
        assert not any(model.inference().random for model, _ in models)


def test_metrics_without_an_evaluation_are_refused():
    with pytest.raises(bp.ModelError, match=r"takes them with evaluation=.*got accuracy and no"):
        tried(MODEL, metrics=ACCURACY)


NONE_FROZEN = r"frozen: the predicate freezes none .* paths are \(0, 'bias'\), \(0, 'weight'\), …"


def test_a_predicate_that_freezes_nothing_is_said_with_the_paths():
    def frozen(path):
        return path[0] == "0"

    x, y = data()
    gradient = bp.value_and_grad(MODEL, LOSS, frozen=frozen)
    for act in (
        lambda: bp.fit(MODEL, LOSS, start(), [(x, y)], SGD, steps=3, frozen=frozen),
        lambda: [gradient(start(), x, y) for _ in range(3)],
        lambda: bp.grad(MODEL, LOSS, frozen=frozen, method="autodiff")(start(), x, y),
        lambda: bp.trainable(start(), frozen),
    ):
        with pytest.warns(UserWarning, match=NONE_FROZEN) as said:
            act()
        assert len(said) == 1
    tried(MODEL, frozen=lambda path: path[0] == 0)
    tried(MODEL, frozen=False)


def test_a_run_says_what_matters_on_a_line():
    x, y = data(20)
    batches = bp.minibatches(x, y, 8, seed=0)
    assert repr(batches) == "minibatches(20 examples, 3 × 8 an epoch, shuffled with seed 0)"
    assert repr(bp.minibatches(x, y, 8)).endswith("3 × 8 an epoch, in order)")
    run = bp.fit(
        MODEL, LOSS, start(), batches, SGD, epochs=2, evaluation=[(x, y)], metrics=ACCURACY
    )
    evaluated = ", ".join(f"{k} {v[-1]:.4g}" for k, v in run.history.evaluation.items())
    told = f"6 steps, last cost {run.history.loss[-1]:.4g}; evaluated after 6: {evaluated}"
    assert repr(run.history) == f"History({told})"
    assert repr(run) == f"Run(2 epochs, {told}; 75 parameters)"
    none = bp.fit(MODEL, LOSS, start(), batches, SGD, steps=0)
    assert repr(none) == "Run(0 epochs, 0 steps; 75 parameters)"


def test_a_deep_model_is_shown_by_its_two_ends():
    deep = bp.chain(*[bp.dense(512), bp.relu] * 60, bp.dense(10))
    assert len(repr(deep)) <= 300 < len(deep.name)
    assert repr(deep).startswith("chain(dense(512), relu, dense(512), ")
    assert repr(deep).endswith(", …, dense(512), relu, dense(512), relu, dense(10))")
    assert repr(MODEL) == MODEL.name
    assert len(repr(bp.residual(deep))) <= 300
