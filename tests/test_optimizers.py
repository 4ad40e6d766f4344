"""Every optimiser of optax with ``fit``: it trains, or is refused by name."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import optax
import optax.contrib
import pytest

import functional_bp as bp

LOSS = bp.losses.softmax_cross_entropy
MODEL = bp.chain(bp.dense(4), bp.tanh, bp.dense(3))
X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
Y = np.arange(6) % 3
PARAMS = MODEL.init(jax.random.key(0), X[0])
SGD = optax.sgd(0.1)
ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


def everywhere(value):
    return lambda params: jax.tree.map(lambda _: value, params)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


RATE = {"learning_rate": 0.01}
INNER = {"inner": SGD}
NOTHING = {}
# What each is made with. One that is new in optax fails until it is here.
OPTAX = {
    **dict.fromkeys(("adabelief", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan"), RATE),
    **dict.fromkeys(("amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw"), RATE),
    **dict.fromkeys(("noisy_sgd", "novograd", "optimistic_adam", "optimistic_adam_v2"), RATE),
    **dict.fromkeys(("optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd"), RATE),
    **dict.fromkeys(("sign_sgd", "signum", "sm3", "yogi", "scale_by_rprop"), RATE),
    **dict.fromkeys(
        ("adadelta", "adafactor", "lbfgs", "polyak_sgd", "add_decayed_weights"), NOTHING
    ),
    **dict.fromkeys(("apply_every", "centralize", "identity", "keep_params_nonnegative"), NOTHING),
    **dict.fromkeys(("normalize_by_update_norm", "scale_by_adadelta", "scale_by_adam"), NOTHING),
    **dict.fromkeys(("scale_by_adamax", "scale_by_adan", "scale_by_amsgrad"), NOTHING),
    **dict.fromkeys(("scale_by_belief", "scale_by_distance_over_gradients"), NOTHING),
    **dict.fromkeys(("scale_by_factored_rms", "scale_by_lbfgs", "scale_by_lion"), NOTHING),
    **dict.fromkeys(
        ("scale_by_novograd", "scale_by_optimistic_gradient", "scale_by_polyak"), NOTHING
    ),
    **dict.fromkeys(("scale_by_param_block_norm", "scale_by_param_block_rms"), NOTHING),
    **dict.fromkeys(("scale_by_radam", "scale_by_rms", "scale_by_rss", "scale_by_sign"), NOTHING),
    **dict.fromkeys(("scale_by_sm3", "scale_by_stddev", "scale_by_trust_ratio"), NOTHING),
    **dict.fromkeys(("scale_by_yogi", "set_to_zero", "zero_nans"), NOTHING),
    "adaptive_grad_clip": {"clipping": 0.1},
    "add_noise": {"eta": 0.1, "gamma": 0.5, "key": jax.random.key(0)},
    "apply_if_finite": INNER | {"max_consecutive_errors": 2},
    "chain": (SGD, optax.clip(1.0)),
    "clip": {"max_delta": 0.1},
    "clip_by_block_rms": {"threshold": 0.1},
    "clip_by_global_norm": {"max_norm": 0.1},
    "conditionally_mask": INNER | {"should_transform_fn": lambda step, **_: step > 0},
    "conditionally_transform": INNER | {"should_transform_fn": lambda step, **_: step > 0},
    "ema": {"decay": 0.9},
    "flatten": INNER,
    "freeze": {"mask": everywhere(True)},
    "inject_hyperparams": {"inner_factory": lambda learning_rate=0.1: optax.sgd(learning_rate)},
    "inject_stateful_hyperparams": {
        "inner_factory": lambda learning_rate=0.1: optax.sgd(learning_rate)
    },
    "lookahead": {"fast_optimizer": SGD, "sync_period": 2, "slow_step_size": 0.5},
    "masked": INNER | {"mask": is_matrix},
    "measure_with_ema": {"measure": optax.tree.norm, "decay": 0.9},
    "multi_transform": {"transforms": {"all": SGD}, "param_labels": everywhere("all")},
    "named_chain": (("first", SGD),),
    "partition": {"transforms": {"all": SGD}, "param_labels": everywhere("all")},
    "scale": {"step_size": -0.1},
    "scale_by_backtracking_linesearch": {"max_backtracking_steps": 4},
    "scale_by_learning_rate": RATE,
    "scale_by_schedule": {"step_size_fn": lambda count: -0.1},
    "scale_by_zoom_linesearch": {"max_linesearch_steps": 4},
    "selective_transform": {"optimizer": SGD, "freeze_mask": False},
    "snapshot": {"measure_name": "norm", "measure": optax.tree.norm},
    "stateless": {"f": lambda g, _: jax.tree.map(lambda g: -0.1 * g, g)},
    "stateless_with_tree_map": {"f": lambda g, _: -0.1 * g},
    "trace": {"decay": 0.9},
    "with_extra_args_support": {"tx": SGD},
    "MultiSteps": {"opt": SGD, "every_k_schedule": 2},
}
CONTRIB = {
    **dict.fromkeys(("acprop", "ademamix", "adopt", "galore", "madgrad", "muon"), RATE),
    **dict.fromkeys(("scale_by_madgrad", "simplified_ademamix", "sophia"), RATE),
    **dict.fromkeys(("cocob", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam"), NOTHING),
    **dict.fromkeys(("hutchinson_estimator_diag_hessian", "normalize", "prodigy"), NOTHING),
    **dict.fromkeys(("reduce_on_plateau", "scale_by_acprop", "scale_by_ademamix"), NOTHING),
    **dict.fromkeys(("scale_by_adopt", "scale_by_cocob", "scale_by_galore"), NOTHING),
    **dict.fromkeys(("scale_by_simplified_ademamix", "schedule_free_adamw"), NOTHING),
    **dict.fromkeys(("schedule_free_sgd",), NOTHING),
    "differentially_private_aggregate": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "key": 0},
    "dpsgd": RATE | {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0},
    "mechanize": {"base_optimizer": SGD},
    "sam": {"optimizer": SGD, "adv_optimizer": ADVERSARY},
    "scale_by_muon": {"weight_dimension_numbers": everywhere(optax.contrib.MuonDimensionNumbers())},
    "schedule_free": RATE | {"base_optimizer": SGD},
    "split_real_and_imaginary": INNER,
}
KNOWN = {optax: OPTAX, optax.contrib: CONTRIB}
# What is not an optimiser by itself, and how it is one.
WITHIN = {
    "measure_with_ema": lambda measure: optax.chain(SGD, optax.monitor({"norm": measure})),
    "scale_by_muon": lambda of_matrices: optax.masked(of_matrices, is_matrix),
    "inject_hyperparams": lambda made: made(),
    "inject_stateful_hyperparams": lambda made: made(),
}
STILL = {"set_to_zero", "freeze"}
REFUSED = {
    "differentially_private_aggregate": r"bp\.clipped_grad gives their clipped sum",
    "dpsgd": r"bp\.clipped_grad gives their clipped sum",
}


def factories(module):
    """The public functions that make a transformation of gradients."""
    for name, made in vars(module).items():
        function = inspect.isfunction(made) or isinstance(made, functools.partial)
        if name == "MultiSteps":  # a class
            yield name
        elif function and not name.startswith("_"):
            returns = inspect.signature(made).return_annotation
            said = made.__doc__ if returns is inspect.Signature.empty else str(returns)
            if "GradientTransformation" in (said or ""):
                yield name


def made(module, name):
    given = KNOWN[module][name]
    factory = getattr(module, name)
    optimizer = factory(*given) if isinstance(given, tuple) else factory(**given)
    return WITHIN.get(name, lambda it: it)(optimizer)


def fit(optimizer, **given):
    return bp.fit(MODEL, LOSS, PARAMS, [(X, Y)], optimizer, **{"steps": 3} | given)


def changed(run):
    before, after = jax.tree.leaves(PARAMS), jax.tree.leaves(run.params)
    assert all(np.isfinite(leaf).all() for leaf in after)
    assert np.isfinite(run.history.loss).all()
    return any(not np.array_equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("module", KNOWN, ids=lambda module: module.__name__)
def test_every_optimizer_is_listed(module):
    assert set(factories(module)) == set(KNOWN[module])


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, known in KNOWN.items() for name in known if name not in REFUSED],
    ids=lambda part: getattr(part, "__name__", part),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:optax", "ignore:Specifying a key")
def test_every_optimizer_trains(module, name):
    assert changed(fit(made(module, name))) == (name not in STILL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:optax")
@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_other_gradients_is_refused_by_name(name):
    for optimizer in (made(optax.contrib, name), optax.chain(made(optax.contrib, name), SGD)):
        with pytest.raises(bp.ModelError, match=f"optimizer: takes .* got .*{REFUSED[name]}"):
            fit(optimizer)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def test_lookahead_is_that_of_optax():
    optimizer = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    gradient = bp.grad(MODEL, LOSS)
    both = optax.LookaheadParams.init_synced(PARAMS)
    state = optimizer.init(both)
    for _ in range(5):
        updates, state = optimizer.update(gradient(both.fast, X, Y), state, both)
        both = optax.apply_updates(both, updates)
    run = fit(optimizer, steps=5)
    assert_close((run.params, run.opt_state.slow), (both.fast, both.slow))


@pytest.mark.parametrize("opaque", [False, True])
def test_sharpness_aware_steps_are_those_of_optax(opaque):
    optimizer = optax.contrib.sam(optax.sgd(0.1), ADVERSARY, opaque_mode=opaque)
    gradient = bp.grad(MODEL, LOSS)
    params, state = PARAMS, optimizer.init(PARAMS)
    how = {"grad_fn": lambda params, _: gradient(params, X, Y)} if opaque else {}
    for _ in range(4):
        updates, state = optimizer.update(gradient(params, X, Y), state, params, **how)
        params = optax.apply_updates(params, updates)
    assert_close(fit(optimizer, steps=4).params, params)


@pytest.mark.parametrize("name", ["lookahead", "sam"])
def test_what_must_be_the_whole_optimizer_says_so(name):
    module = optax if name == "lookahead" else optax.contrib
    with pytest.raises(bp.ModelError, match=f"takes {name} as the whole optimiser, got it inside"):
        fit(optax.chain(optax.clip(1.0), made(module, name)))


def test_what_to_evaluate_of_a_schedule_free_run_is_said():
    optimizer = made(optax.contrib, "schedule_free_sgd")
    with pytest.warns(UserWarning, match=r"schedule_free_eval_params\(run\.opt_state, run\.params"):
        run = fit(optimizer, evaluation=[(X, Y)])
    averaged = optax.contrib.schedule_free_eval_params(run.opt_state, run.params)
    assert changed(dataclasses.replace(run, params=averaged))
