"""One key for a batch: each layer, example and microbatch draws noise of its own from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import check_equal

import functional_bp as bp

KEY = jax.random.key(0)
HALF = bp.dropout(0.5)


@pytest.mark.parametrize(
    "model",
    [
        bp.chain(HALF, HALF),
        bp.repeat(HALF, 2),
        bp.repeat(bp.repeat(HALF, 2), 1),
        bp.chain(bp.parallel(HALF, HALF), bp.multiply),
        bp.tied(bp.chain(HALF, HALF), {}),
        bp.chain(bp.at("x", HALF), bp.at("x", HALF), bp.entry("x")),
    ],
    ids=str,
)
def test_a_number_survives_two_layers_of_dropout_with_probability_one_quarter(model):
    """Not one half, as it would if both drew the same."""
    ones = jnp.ones((64, 64))
    x = {"x": ones} if "entry" in model.name else ones
    params = model.init(KEY, jax.tree.map(lambda leaf: leaf[0], x))
    # The standard error of a share of 4096 is 0.007.
    assert (model.apply(params, x, KEY) != 0).mean() == pytest.approx(0.25, abs=0.04)


def test_a_layer_and_its_shortcut_draw_apart():
    y = bp.residual(HALF, HALF).apply(((), ()), jnp.ones((64, 64)), KEY)
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.04)


def test_two_directions_draw_apart():
    """The output of one gates that of the other, so that what either drops is 0."""
    n = 64
    one_way = bp.chain(HALF, bp.rnn(n, activation="relu"))
    model = bp.chain(bp.bidirectional(one_way, one_way), bp.reglu)
    to_itself = {"weight_x": jnp.eye(n), "weight_h": jnp.zeros((n, n)), "bias": jnp.zeros(n)}
    params = (((((), to_itself),) * 2), ())
    assert (model.apply(params, jnp.ones((n, 1, n))) != 0).all()
    y = model.apply(params, jnp.ones((n, 1, n)), KEY)
    assert (y != 0).mean() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("size", [1, 3])
def test_microbatches_draw_apart_and_every_quantity_from_the_same_draw(size):
    """Seven equal examples, whose gradients tell what was dropped."""
    model, loss, n = bp.chain(HALF, bp.dense(1, bias=False)), bp.losses.squared_error, 7
    params = ((), {"weight": jnp.ones((1, 64))})
    data = params, jnp.ones((n, 64)), -jnp.ones((n, 1))

    def quantities(*data):
        def of(quantity, **options):
            return quantity(model, loss, microbatch=size, **options)(*data, key=KEY)

        return {
            "each": of(bp.per_example_grads),
            "norms": of(bp.per_example_grad_norms),
            "clipped": of(bp.clipped_grad, max_norm=1e9),
            "second moment": of(bp.grad_second_moment),
            "by hand": of(bp.grad),
            "by autodiff": of(bp.grad, method="autodiff"),
        }

    found = jax.jit(quantities)(*data)
    each = found["each"][1]["weight"][:, 0]
    assert len(np.unique(each != 0, axis=0)) == n
    mean = ((), {"weight": each.mean(0)[None]})
    wanted = {
        "each": found["each"],
        "norms": jnp.linalg.norm(each, axis=1),
        "clipped": mean,
        "second moment": ((), {"weight": (each**2).mean(0)[None]}),
        "by hand": mean,
        "by autodiff": mean,
    }
    check_equal(found, wanted, within=1e-6)
