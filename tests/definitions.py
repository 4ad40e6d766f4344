"""Models, and each quantity by its definition: autodiff of one example at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

import functional_bp as bp

N = 6
WEIGHTS = (2.0, 0.0, 1.0, 1.0, 3.0, 1.0)
IDS, VECTORS = "class ids", "vectors"
LOSSES = {IDS: bp.losses.softmax_cross_entropy, VECTORS: bp.losses.squared_error}


def _block(features):
    return bp.chain(bp.dense(features), bp.tanh)


MODELS = {
    "mixed": (
        bp.chain(
            bp.flatten,
            bp.residual(_block(5), bp.dense(5, bias=False)),
            bp.dense(4),
            bp.gelu,
            bp.dense(3),
        ),
        (2, 2),
        IDS,
    ),
    # Norms and Gram matrices go by products of Grams in the first layer, by gₙ in the second.
    "positions": (bp.chain(bp.dense(10), bp.tanh, bp.dense(2)), (2, 12), VECTORS),
    "nested repeat": (
        bp.chain(bp.residual(bp.repeat(bp.repeat(_block(3), 2), 2)), bp.dense(2)),
        (5, 3),
        IDS,
    ),
    "tied": (
        bp.tied(
            bp.chain(bp.dense(3), bp.tanh, bp.dense(3), bp.flatten, bp.dense(2)),
            {(2, "weight"): (0, "weight"), (2, "bias"): (0, "bias")},
        ),
        (4, 3),
        VECTORS,
    ),
    "tied stacks": (
        bp.tied(
            bp.chain(bp.repeat(_block(3), 2), bp.repeat(_block(3), 2)),
            {(1, 0, "weight"): (0, 0, "weight")},
        ),
        (3,),
        VECTORS,
    ),
}


def batch(model, shape, target, n, seed):
    """Parameters with biases that are not 0, inputs and targets of ``n`` examples."""

    def make(key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (n, *shape))
        params = model.init(keys[1], x[0])
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(keys[2], p.shape), params)
        a = jax.eval_shape(lambda: model.apply(params, x))
        if target == IDS:
            return params, x, jax.random.randint(keys[3], a.shape[:-1], 0, a.shape[-1])
        return params, x, jax.random.normal(keys[3], a.shape)

    return jax.jit(make)(jax.random.key(seed))


def cases(in_microbatches):
    """Every model whole, and one in microbatches, ``(name, microbatch)``. What shows in another
    model too is proven once more where everything is."""
    seldom = {"nested repeat", "tied", in_microbatches[0]}
    return [
        *(
            pytest.param(name, None, marks=pytest.mark.exhaustive if name in seldom else ())
            for name in MODELS
        ),
        in_microbatches,
    ]


@functools.cache
def case(name, seed=0, n=N):
    """``(model, loss, params, x, y)`` in float64."""
    model, shape, target = MODELS[name]
    with jax.enable_x64(True):
        return model, LOSSES[target], *batch(model, shape, target, n, seed)


def output(model, params, x):
    """The output for one example."""
    return model.apply(params, jax.tree.map(lambda leaf: leaf[None], x))[0]


def cost(model, loss, params, x, y):
    """C for one example."""
    return loss.value(output(model, params, x), y)


def each_grad(model, loss, params, x, y):
    """gₙ by ``vmap(jax.grad)``."""
    gradient = jax.grad(lambda p, x, y: cost(model, loss, p, x, y))
    return jax.vmap(gradient, (None, 0, 0))(params, x, y)


def flat_each(model, loss, params, x, y):
    """gₙ as one row ``(n, parameters)``."""
    leaves = jax.tree.leaves(each_grad(model, loss, params, x, y))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)


def outputs_jacobian(model, params, x):
    """∂aₙ/∂θ, ``(n, outputs, parameters)``, by ``jax.jacrev``."""
    jacobian = jax.vmap(jax.jacrev(lambda p, x: output(model, p, x).ravel()), (None, 0))(params, x)
    return jnp.concatenate(
        [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)], 2
    )


def outputs_hessian(model, loss, params, x, y):
    """∇²C by the outputs, ``(n, outputs, outputs)``, by ``jax.hessian``."""
    a = model.apply(params, x)
    size = math.prod(a.shape[1:])
    hessian = jax.vmap(jax.hessian(loss.value))(a, y)
    return hessian.reshape(-1, size, size)


def direction(params):
    """A vector of the parameters' tree."""
    return jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size) + p.ndim).reshape(p.shape), params)


def check_equal(given, wanted, within=1e-10):
    """Raises unless two dicts of trees agree, leaf by leaf, to ``within`` of a leaf's largest."""
    assert set(given) == set(wanted)
    for what in given:
        pairs = zip(jax.tree.leaves(given[what]), jax.tree.leaves(wanted[what]), strict=True)
        for i, (a, b) in enumerate(pairs):
            assert a.shape == b.shape, (what, i)
            largest = jnp.maximum(jnp.abs(b).max(), 1e-300)
            assert jnp.abs(a - b).max() <= within * largest, (what, i)


def first_order(model, loss, v, params, x, y, **options):
    """What is asked of the first derivatives of a model and its loss, or of a cost and None."""

    def of(quantity, *more, **how):
        return quantity(model, loss, **options, **how)(params, x, y, *more)

    return {
        "gradient": of(bp.grad),
        "each": of(bp.per_example_grads),
        "norms": of(bp.per_example_grad_norms),
        "Gram": of(bp.grad_gram),
        "dots": of(bp.grad_dots, v),
        "second moment": of(bp.grad_second_moment),
        "clipped": of(bp.clipped_grad, max_norm=0.5),
    }


def first_order_by_vmap(cost, v, trained, x, y):
    """The same of ``cost(trained, x, y)``, by its gradients one by one."""
    each = jax.vmap(jax.grad(cost), (None, 0, 0))(trained, x, y)
    n = len(jax.tree.leaves(x)[0])
    flat = jnp.concatenate([g.reshape(n, -1) for g in jax.tree.leaves(each)], 1)
    norms = jnp.sqrt((flat**2).sum(1))
    shrunk = jnp.minimum(1, 0.5 / norms)
    return {
        "gradient": jax.tree.map(lambda g: g.mean(0), each),
        "each": each,
        "norms": norms,
        "Gram": flat @ flat.T,
        "dots": flat @ jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(v)]),
        "second moment": jax.tree.map(lambda g: (g**2).mean(0), each),
        "clipped": jax.tree.map(lambda g: jnp.einsum("n...,n->...", g, shrunk) / n, each),
    }
