"""A layer and a loss are values: a copy is the same one, and a pickle the call that made it."""

import copy
import dataclasses
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


PICKLED = {name: value for name, value in VALUES.items() if name != "a loss of one's own"}


@pytest.mark.parametrize("value", PICKLED)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_the_call_that_made_it(value, protocol):
    value = VALUES[value]
    loaded = pickle.loads(pickle.dumps([value], protocol))[0]
    assert type(loaded) is type(value)
    assert (loaded.name, loaded.equations, loaded.doc) == (value.name, value.equations, value.doc)
    assert pickle.loads(pickle.dumps(bp.relu, protocol)) is bp.relu
    assert pickle.loads(pickle.dumps(bp.losses.hinge, protocol)) is bp.losses.hinge


def test_a_model_that_was_pickled_computes_the_same():
    model = VALUES["a model"]
    x = jnp.ones((2, 4, 2))
    params = model.init(jax.random.key(0), x[0])
    there = pickle.loads(pickle.dumps(model))
    assert (there.apply(params, x) == model.apply(params, x)).all()


def square(z):
    return z * z


def double(z):
    return 2 * z


def test_what_was_changed_does_not_pickle_as_what_it_was():
    """A layer with another backward is not the one that its call makes."""
    changed = dataclasses.replace(bp.dense(3), backward=double)
    assert changed.made_by is None
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        pickle.dumps(changed)


def test_ones_own_pickle_where_their_functions_do():
    mine = bp.activation(square, double)
    there = pickle.loads(pickle.dumps(mine))
    bp.testing.check_layer(there, jnp.ones(3))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(VALUES["a loss of one's own"])
