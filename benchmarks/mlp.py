"""A multilayer perceptron, 784-512-512-512-10

relu, softmax cross-entropy, float32. The other candidates are plain JAX, written without this
package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import functional_bp as bp

from .compare import Candidate, Row

Tree = Any
SIZES = (784, 512, 512, 512, 10)
MAX_NORM = 1.0

model = bp.chain(
    *(layer for size in SIZES[1:-1] for layer in (bp.dense(size), bp.relu)), bp.dense(SIZES[-1])
)
loss = bp.losses.softmax_cross_entropy


def rows() -> Iterable[Row]:
    manual = bp.value_and_grad(model, loss)
    usual = jax.value_and_grad(mean_cost)
    of_optax = jax.value_and_grad(mean_of(optax.softmax_cross_entropy_with_integer_labels))
    for batch in (1, 32, 128, 1024):
        yield Row(
            f"loss and gradient, batch {batch}",
            [
                ours(batch, manual),
                plain(batch, "usual: jax.value_and_grad, optax's loss", of_optax),
                plain(batch, "usual: jax.value_and_grad, log-sum-exp", usual),
            ],
        )
    for name, (losses, network, target) in OTHERS.items():
        for batch in (10,) if network is nielsen else (1, 32, 128, 1024):
            yield Row(f"{name}, batch {batch}", list(pair(network, target, losses, batch)))
    yield Row(
        "control: the same step twice, batch 128",
        [ours(128, manual), ours(128, manual, "ours again")],
    )
    yield Row(
        "eager loss and gradient, batch 1",
        [
            ours(1, manual, jit=False),
            ours(
                1,
                bp.value_and_grad(model, loss, method="autodiff"),
                "the same model by autodiff",
                jit=False,
            ),
            plain(1, "usual: jax.value_and_grad", usual, jit=False),
        ],
    )
    for batch in (128, 512):
        yield Row(
            f"per-example norms, batch {batch}",
            [
                ours(batch, bp.per_example_grad_norms(model, loss)),
                ours(batch, manual, "a plain manual step", same=False),
                plain(batch, "usual: vmap(jax.grad)", norms_by_vmap),
                plain(batch, "strongest: perturbations of every z", norms_by_perturbations),
            ],
        )
        yield Row(
            f"clipped gradient, batch {batch}",
            [
                ours(batch, bp.clipped_grad(model, loss, MAX_NORM)),
                ours(
                    batch,
                    bp.clipped_grad(model, loss, MAX_NORM, recursions=1),
                    "ours, one recursion, δ and a kept",
                ),
                ours(batch, manual, "a plain manual step", same=False),
                plain(batch, "a plain autodiff step", usual, same=False),
                plain(batch, "usual: vmap(jax.grad)", clipped_by_vmap),
                plain(
                    batch, "strongest: perturbations, δ and a kept", clipped_by_kept_perturbations
                ),
                plain(batch, "strongest: perturbation norms, reweighted", clipped_by_perturbations),
                plain(batch, "strongest: vmap norms, reweighted", clipped_by_vmap_norms),
            ],
        )


def inputs(batch: int) -> tuple[Tree, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, SIZES[0]))
    y = jax.random.randint(keys[1], (batch,), 0, SIZES[-1])
    return model.init(keys[2], x[0]), x, y


def ours(batch, function, name="ours", **options) -> Candidate:
    return Candidate(name, lambda: (function, inputs(batch)), **options)


def plain(batch, name, function, **options) -> Candidate:
    def make():
        params, x, y = inputs(batch)
        return function, ([p for p in params if p], x, y)

    return Candidate(name, make, **options)


# The network in plain JAX, and what one would write on it.


def logits(params: Tree, x: Array, sigma=jax.nn.relu) -> Array:
    *hidden, last = params
    for p in hidden:
        x = sigma(x @ p["weight"].T + p["bias"])
    return x @ last["weight"].T + last["bias"]


def costs_of(a: Array, y: Array) -> Array:
    return jax.nn.logsumexp(a, axis=-1) - jnp.take_along_axis(a, y[..., None], axis=-1)[..., 0]


def mean_cost(params: Tree, x: Array, y: Array) -> Array:
    return costs_of(logits(params, x), y).mean()


def mean_of(cost, sigma=jax.nn.relu):
    return lambda params, x, y: cost(logits(params, x, sigma), y).mean()


def half_squared(a: Array, y: Array) -> Array:
    return 0.5 * ((jax.nn.sigmoid(a) - y) ** 2).sum(-1)


def sigmoid_cross_entropy(a: Array, y: Array) -> Array:
    return optax.sigmoid_binary_cross_entropy(a, y).sum(-1)


def probabilities(key, batch):
    return jax.nn.softmax(jax.random.normal(key, (batch, SIZES[-1])))


nielsen = bp.chain(bp.dense(30), bp.sigmoid, bp.dense(10), bp.sigmoid)
OTHERS = {
    "softmax of probabilities": (
        (bp.losses.softmax_cross_entropy, mean_of(optax.softmax_cross_entropy)),
        model,
        probabilities,
    ),
    "sigmoid cross-entropy": (
        (bp.losses.sigmoid_cross_entropy, mean_of(sigmoid_cross_entropy)),
        model,
        probabilities,
    ),
    "Nielsen's 784-30-10, sigmoid, squared error": (
        (bp.losses.squared_error, mean_of(half_squared, jax.nn.sigmoid)),
        nielsen,
        probabilities,
    ),
}


def pair(network, target, losses, batch) -> Iterable[Candidate]:
    """A loss and gradient by hand, and by autodiff of plain jnp code with optax's loss."""
    of_ours, of_theirs = losses
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (batch, SIZES[0])), target(keys[1], batch)
    params = network.init(keys[2], x[0])
    manual = bp.value_and_grad(network, of_ours)
    yield Candidate("ours", lambda: (manual, (params, x, y)))
    theirs = jax.value_and_grad(of_theirs)
    yield Candidate("usual: jax.value_and_grad", lambda: (theirs, ([p for p in params if p], x, y)))


def grad_of_one(params: Tree, x: Array, y: Array) -> Tree:
    return jax.grad(lambda p: costs_of(logits(p, x), y))(params)


def _norms(grads: Tree) -> Array:
    return jnp.sqrt(sum((g**2).sum(range(1, g.ndim)) for g in jax.tree.leaves(grads)))


def norms_by_vmap(params: Tree, x: Array, y: Array) -> Array:
    return _norms(jax.vmap(grad_of_one, (None, 0, 0))(params, x, y))


def clipped_by_vmap(params: Tree, x: Array, y: Array) -> Tree:
    grads = jax.vmap(grad_of_one, (None, 0, 0))(params, x, y)
    clip = _clip(_norms(grads))
    return jax.tree.map(lambda g: jnp.tensordot(clip, g, 1), grads)


def _clip(norms: Array) -> Array:
    return jnp.minimum(1, MAX_NORM / norms) / norms.size


def deltas(params: Tree, x: Array, y: Array) -> list[tuple[Array, Array]]:
    """δ of every layer, for every example, and the activation below it: δ is the gradient by a
    zero that is added to z."""

    def total_cost(zeros: list[Array]) -> tuple[Array, list[Array]]:
        a = [x]
        for p, zero in zip(params[:-1], zeros):
            a.append(jax.nn.relu(a[-1] @ p["weight"].T + p["bias"] + zero))
        z = a[-1] @ params[-1]["weight"].T + params[-1]["bias"] + zeros[-1]
        return costs_of(z, y).sum(), a

    zeros = [jnp.zeros((x.shape[0], *p["bias"].shape)) for p in params]
    return list(zip(*jax.grad(total_cost, has_aux=True)(zeros)))


def _norms_of_factors(factors: list[tuple[Array, Array]]) -> Array:
    return jnp.sqrt(sum((d**2).sum(1) * (1 + (a**2).sum(1)) for d, a in factors))


def norms_by_perturbations(params: Tree, x: Array, y: Array) -> Array:
    return _norms_of_factors(deltas(params, x, y))


def clipped_by_kept_perturbations(params: Tree, x: Array, y: Array) -> Tree:
    factors = deltas(params, x, y)
    clip = _clip(_norms_of_factors(factors))
    return [{"weight": (clip[:, None] * d).T @ a, "bias": clip @ d} for d, a in factors]


def _reweighted(params: Tree, x: Array, y: Array, clip: Array) -> Tree:
    return jax.grad(lambda p: clip @ costs_of(logits(p, x), y))(params)


def clipped_by_perturbations(params: Tree, x: Array, y: Array) -> Tree:
    return _reweighted(params, x, y, _clip(norms_by_perturbations(params, x, y)))


def clipped_by_vmap_norms(params: Tree, x: Array, y: Array) -> Tree:
    return _reweighted(params, x, y, _clip(norms_by_vmap(params, x, y)))
