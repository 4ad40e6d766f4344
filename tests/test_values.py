"""A layer and a loss are values: a copy is the same one, and a pickle is refused with a way out."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_bp as bp

VALUES = {
    "a layer": bp.dense(3),
    "a layer of the package": bp.relu,
    "a model": bp.chain(bp.lstm(3), bp.repeat(bp.residual(bp.dense(3)), 2), bp.tanh),
    "a loss": bp.losses.squared_error,
    "a loss with an argument": bp.losses.huber(0.5),
    "a loss of one's own": bp.losses.loss(lambda a, y: a.sum(), lambda a, y: jnp.ones_like(a)),
}


@pytest.mark.parametrize("value", VALUES)
def test_a_copy_is_the_same(value):
    value = VALUES[value]
    assert copy.copy(value) is value
    assert copy.deepcopy(value) is value
    assert copy.deepcopy({"inside": [value]})["inside"][0] is value


def test_what_holds_a_model_is_copied_around_it():
    model = VALUES["a model"]
    params = model.init(jax.random.key(0), jnp.ones((4, 2)))
    held = {"model": model, "params": jax.tree.map(np.asarray, params)}
    copied = copy.deepcopy(held)
    assert copied["model"] is model
    assert copied["params"][0]["bias"] is not held["params"][0]["bias"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_with_what_to_do(value, protocol):
    value = VALUES[value]
    with pytest.raises(TypeError) as error:
        pickle.dumps([value], protocol)
    assert str(error.value) == (
        f"{value.name}: is made of functions, which do not pickle; keep the code that makes it, "
        "and save the parameters with bp.save_params"
    )
