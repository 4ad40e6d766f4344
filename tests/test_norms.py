"""Norms: PyTorch's, alone and in training; each example's gradient; what batch norm mixes."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definitions import VECTORS, batch, check_equal, each_grad

import functional_bp as bp

KEY = jax.random.key(0)
squared_error = bp.losses.squared_error


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# ---- PyTorch ----------------------------------------------------------------------------------

ARRAYS = np.load(pathlib.Path(__file__).parent / "reference" / "norms.npz")
NORMS = {
    "layer_norm": bp.layer_norm(),
    "layer_norm of vectors, without bias": bp.layer_norm(epsilon=1e-2, bias=False),
    "rms_norm": bp.rms_norm(),
    "group_norm": bp.group_norm(2),
    "group_norm of images": bp.group_norm(3),
    "instance_norm": bp.instance_norm(),
    "instance_norm of images": bp.instance_norm(),
    "batch_norm": bp.batch_norm(),
    "batch_norm at positions": bp.batch_norm(),
}
NETWORK = bp.chain(bp.dense(4), bp.batch_norm(), bp.tanh, bp.dense(2))
TRAININGS = ["training", "training at positions"]
RATE = 0.1


def pytorchs(name):
    return {k.split("/")[1]: v for k, v in ARRAYS.items() if k.split("/")[0] == name}


@pytest.mark.parametrize("name", NORMS)
def test_a_norms_outputs_and_gradients_equal_pytorchs(name):
    layer, arrays = NORMS[name], pytorchs(name)
    params = layer.init(KEY, arrays["x"][0])
    learned = [k for k in params if k not in ("mean", "var")]
    params |= {k: arrays[k] for k in learned}

    def ours(params, x, dy):
        y, residuals = layer.forward(params, x)
        dx, gradient = layer.backward(params, residuals, dy, bp.contractions.total)
        return {"y": y, "dx": dx} | {f"d_{k}": gradient[k] for k in learned}

    found = jax.jit(ours)(params, arrays["x"], arrays["dy"])
    given = {"x", "dy", *learned}
    check_equal(found, {k: v for k, v in arrays.items() if k not in given}, 1e-12)


def network_of_pytorch(arrays, step):
    """Our parameters, from PyTorch's after so many steps."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    norm = {ours: arrays[f"1.{theirs}"][step] for ours, theirs in names.items()}
    first, last = ({k: arrays[f"{i}.{k}"][step] for k in ("weight", "bias")} for i in (0, 3))
    return first, norm, (), last


def batches_of_pytorch(arrays):
    """The last one is smaller."""
    return [(arrays[f"x{step}"], arrays[f"y{step}"]) for step in range(5)]


def check_training(arrays, found):
    """Parameters and running averages after each step, and outputs at inference in the end."""
    assert len(found) == 5
    for step, params in enumerate(found, 1):
        check_equal({step: params}, {step: network_of_pytorch(arrays, step)}, 1e-12)
    outputs = NETWORK.apply(found[-1], jnp.asarray(arrays["more x"]))
    check_equal({"outputs": outputs}, {"outputs": arrays["outputs"]}, 1e-12)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("method", ["manual", "autodiff"])
def test_batch_norm_in_a_plain_loop_trains_as_in_pytorch(name, method):
    arrays = pytorchs(name)
    params = network_of_pytorch(arrays, 0)
    is_state = NETWORK.is_state(params)
    cost_and_grads = bp.value_and_grad(NETWORK, squared_error, method=method, renew=True)
    optimizer = optax.sgd(RATE)
    opt_state = optimizer.init(bp.trainable(params, is_state))

    @jax.jit
    def step(params, opt_state, x, y):
        (cost, params), grads = cost_and_grads(params, x, y)
        trained = bp.trainable(params, is_state)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return bp.merged(optax.apply_updates(trained, updates), params), opt_state, cost

    found = []
    for x, y in batches_of_pytorch(arrays):
        params, opt_state, _ = step(params, opt_state, x, y)
        found.append(params)
    check_training(arrays, found)


@pytest.mark.parametrize("name", TRAININGS)
def test_batch_norm_in_fit_trains_as_in_pytorch(name):
    """The smaller batch is not filled up with other examples."""
    arrays, found = pytorchs(name), []
    bp.fit(
        NETWORK,
        squared_error,
        jax.tree.map(jnp.asarray, network_of_pytorch(arrays, 0)),
        batches_of_pytorch(arrays),
        optax.sgd(RATE),
        epochs=1,
        every=1,
        callbacks=[lambda run: found.append(jax.tree.map(np.array, run.params))],
    )
    check_training(arrays, found)


# ---- each example's gradient ------------------------------------------------------------------

EACH = {
    "norms of an example": bp.chain(
        bp.dense(4), bp.layer_norm(), bp.dense(4), bp.rms_norm(), bp.group_norm(2), bp.dense(2)
    ),
    "batch norm at inference": NETWORK.inference(),
}


@pytest.mark.parametrize("name", EACH)
def test_each_examples_gradient_is_its_own(name):
    """Gradients, their norms and their clipped mean, with None at running averages."""
    model, bound = EACH[name], 6.0
    data = batch(model, (3, 5), VECTORS, n=6, seed=0)
    is_state = model.is_state(data[0])

    def ours(*data):
        def norms(per):
            return bp.per_example_grad_norms(model, squared_error, per=per)(*data)

        return {
            "each": bp.per_example_grads(model, squared_error)(*data),
            "norms": norms("model"),
            "norms of parameters": norms("parameter"),
            "clipped": bp.clipped_grad(model, squared_error, bound, per="parameter")(*data),
        }

    def defined(*data):
        each = bp.trainable(each_grad(model, squared_error, *data), is_state)
        norms = jax.tree.map(lambda g: jnp.sqrt((g**2).sum(range(1, g.ndim))), each)
        of_parameters = jnp.stack(jax.tree.leaves(norms))
        bound_of_each = bound / math.sqrt(len(of_parameters))

        def clipped(g, norm):
            return jnp.einsum("n...,n->...", g, jnp.minimum(1, bound_of_each / norm)) / len(g)

        return {
            "each": each,
            "norms": jnp.linalg.norm(of_parameters, axis=0),
            "norms of parameters": norms,
            "clipped": jax.tree.map(clipped, each, norms),
        }, (of_parameters > bound_of_each).mean()

    found, (wanted, share) = jax.jit(ours)(*data), jax.jit(defined)(*data)
    assert 0.2 < share < 0.8  # some are clipped, and some are not
    check_equal(found, wanted)
    for what in ("each", "norms of parameters", "clipped"):
        assert jax.tree.structure(found[what]) == jax.tree.structure(wanted[what])


# ---- what batch norm mixes --------------------------------------------------------------------

OF_EXAMPLES = {
    "per_example_grads": bp.per_example_grads,
    "per_example_grad_norms": bp.per_example_grad_norms,
    "clipped_grad": lambda model, loss: bp.clipped_grad(model, loss, 1.0),
    "grad_second_moment": bp.grad_second_moment,
    "grad_variance": bp.grad_variance,
    "grad_noise_scale": bp.grad_noise_scale,
    "grad_diversity": bp.grad_diversity,
    "grad_gram": bp.grad_gram,
    "grad_dots": bp.grad_dots,
    "ggnvp": bp.ggnvp,
    "ggn_diagonal": bp.ggn_diagonal,
    "kronecker_factors": bp.kronecker_factors,
    "grad in microbatches": lambda model, loss: bp.grad(model, loss, microbatch=2),
}


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_what_takes_examples_apart_refuses_batch_norm_in_training(name):
    message = f"{re.escape(NETWORK.name)}: mixes the examples of a batch"
    with pytest.raises(bp.ModelError, match=f"^{message}"):
        OF_EXAMPLES[name](NETWORK, squared_error)


def test_only_batch_norm_in_training_mixes_examples():
    assert NETWORK.mixes_examples and not NETWORK.inference().mixes_examples
    assert {k for k in NORMS if NORMS[k].mixes_examples} == {
        "batch_norm",
        "batch_norm at positions",
    }


def test_batch_norm_of_one_example_takes_its_positions_or_raises():
    params = NETWORK.init(KEY, jnp.ones(3))
    step = bp.grad(NETWORK, squared_error)
    with pytest.raises(
        bp.ModelError, match=r"^chain\[1\] batch_norm\(\): takes more than one number .*, got 1"
    ):
        step(params, jnp.ones((1, 3)), jnp.ones((1, 2)))
    jax.eval_shape(step, params, jnp.ones((1, 2, 3)), jnp.ones((1, 2, 2)))
    assert NETWORK.apply(params, jnp.ones((1, 3))).shape == (1, 2)


def test_examples_of_weight_0_are_in_batch_norms_means():
    """The target of the last example, of weight 0, is nothing to the gradient; its input is in the
    means that the other examples are normalised with, and in the running averages."""
    params, x, y = batch(NETWORK, (3,), VECTORS, n=4, seed=0)
    weights = jnp.array([1.0, 1, 1, 0])

    @jax.jit
    def step(x, y):
        cost_and_grads = bp.value_and_grad(NETWORK, squared_error, renew=True)
        (cost, renewed), grads = cost_and_grads(params, x, y, weights=weights)
        return {"cost": cost, "gradient": grads, "running": renewed}

    def defined(scale):
        first, norm, _, last = params
        z = x @ first["weight"].T + first["bias"]
        x_hat = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        a = jnp.tanh(scale * x_hat + norm["bias"]) @ last["weight"].T + last["bias"]
        return 0.5 * ((a - y)[:3] ** 2).sum() / 3

    found, moved = step(x, y), step(x.at[3].add(1), y)
    cost, of_scale = jax.value_and_grad(defined)(params[1]["scale"])
    of_norm = {"cost": found["cost"], "scale": found["gradient"][1]["scale"]}
    check_equal(of_norm, {"cost": cost, "scale": of_scale}, 1e-12)
    check_equal(step(x, y.at[3].add(1)), found, 1e-12)
    for what, name in (("gradient", "scale"), ("running", "mean"), ("running", "var")):
        assert (found[what][1][name] != moved[what][1][name]).all()


@pytest.mark.parametrize("method", ["manual", "autodiff"])
def test_renewing_changes_running_averages_alone(method):
    """And only where it is asked for: without, cost and gradient are the same."""
    params, x, y = batch(NETWORK, (3,), VECTORS, n=4, seed=0)
    plain, renewing = (
        bp.value_and_grad(NETWORK, squared_error, method=method, renew=renew)
        for renew in (False, True)
    )
    cost, gradient = jax.jit(plain)(params, x, y)
    (same_cost, renewed), same = jax.jit(renewing)(params, x, y)
    check_equal({0: (same_cost, same)}, {0: (cost, gradient)}, 1e-12)
    assert gradient[1]["mean"] is None and gradient[1]["var"] is None
    changed = jax.tree.map(lambda p, new: bool((p != new).any()), params, renewed)
    assert changed == NETWORK.is_state(params)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_is_the_share_of_the_new(momentum):
    model = bp.batch_norm(momentum=momentum)
    x = jnp.array([[1.0, -4], [2, 0], [6, 10]])
    params = model.init(KEY, x[0]) | {"mean": jnp.array([5.0, 7]), "var": jnp.array([2.0, 3])}
    step = bp.value_and_grad(model, squared_error, renew=True)
    (_, renewed), _ = step(params, x, x)
    for name, now in {"mean": [3, 2], "var": [7, 52]}.items():
        wanted = (1 - momentum) * params[name] + momentum * np.array(now)
        np.testing.assert_allclose(renewed[name], wanted, rtol=1e-14)


# ---- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (bp.layer_norm(), (2, 1), r"layer_norm\(\): takes more than one number .*, got 1"),
        (bp.group_norm(3), (2, 4), r"group_norm\(3\): takes features that divide among 3 groups"),
        (bp.group_norm(4), (4,), r"group_norm\(4\): takes more than one number .*, got 1"),
        (bp.instance_norm(), (1, 4), r"instance_norm\(\): takes more than one number .*, got 1"),
        (bp.instance_norm(), (4,), r"instance_norm\(\): takes more than one number .*, got 1"),
    ],
    ids=[
        "one feature",
        "features that do not divide",
        "groups of one number",
        "one position",
        "no positions",
    ],
)
def test_too_few_numbers_are_named_with_the_layers_place(layer, shape, message):
    ones = jnp.ones(shape[-1])
    params = {"scale": ones, "bias": ones}
    with pytest.raises(bp.ModelError, match=f"^{message}"):
        layer.apply(params, jnp.ones((2, *shape)))
    with pytest.raises(bp.ModelError, match=rf"^chain\[1\] {message}"):
        bp.chain(bp.tanh, layer).apply(((), params), jnp.ones((2, *shape)))


# ---- numbers ----------------------------------------------------------------------------------


def test_bfloat16_has_running_averages_in_float32():
    """They are of the numbers as they are: rounded to bfloat16 they would be 0.4 % off."""
    model = bp.batch_norm(momentum=1.0)
    x = (3 + jax.random.normal(KEY, (64, 4))).astype(jnp.bfloat16)
    params = model.init(KEY, x[0])
    (_, renewed), gradient = bp.value_and_grad(model, squared_error, renew=True)(params, x, x)
    dtypes = {"scale": "bfloat16", "bias": "bfloat16", "mean": "float32", "var": "float32"}
    for tree in (params, renewed):
        assert {name: leaf.dtype for name, leaf in tree.items()} == dtypes
    assert {gradient["scale"].dtype, gradient["bias"].dtype} == {jnp.dtype("bfloat16")}
    assert model.forward(params, x)[0].dtype == model.apply(params, x).dtype == jnp.bfloat16
    numbers = np.asarray(x, "float64")
    np.testing.assert_allclose(renewed["mean"], numbers.mean(0), rtol=1e-6)
    np.testing.assert_allclose(renewed["var"], numbers.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [bp.layer_norm(), bp.group_norm(2), bp.instance_norm(), bp.batch_norm(momentum=1.0)],
    ids=str,
)
def test_numbers_far_from_0_are_normalised_in_float32(layer):
    """Their mean is 1e4 and their deviation 1, so that in float32, which has 7 digits, mean x² −
    (mean x)² is noise. What a float32 near 1e4 can be off, 5e-4, is the most of the error."""
    x = (1e4 + jax.random.normal(KEY, (16, 8, 64))).astype(jnp.float32)
    dy = jax.random.normal(jax.random.key(1), x.shape, jnp.float32)

    def ours(params, x, dy):
        y, residuals = layer.forward(params, x)
        dx, _ = layer.backward(params, residuals, dy)
        return {"y": y, "dx": dx, "renewed": layer.renew(params, residuals)}

    given = layer.init(KEY, x[0]), x, dy
    found = jax.jit(ours)(*given)
    wanted = jax.jit(ours)(*jax.tree.map(lambda leaf: leaf.astype("float64"), given))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    check_equal(found, wanted, 1e-2)
