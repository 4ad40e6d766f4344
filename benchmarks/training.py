"""Training small networks

scikit-learn's handwritten digits, 64-256-128-10, relu, Adam, batches of 32; and the network of
Nielsen's book, 784-30-10, sigmoid, batches of 10 of images made of noise. The bare loop is the
compiled step over the same batches and nothing else. NumPy goes through each batch as the book's
network.py does, example by example, and as one would to be fast, in matrices. A step of K-FAC, as
it comes, is measured over the 20 from one inversion to the next, beside as many of Adam: of the
digits' network and of that of ``benchmarks.mlp``, batches of 128, without a learning rate and with
one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functional_bp as bp

from . import mlp
from .compare import Candidate, Row

Tree = Any
Inputs = tuple[Tree, Any, int]  # parameters, batches, epochs
BATCH, IMAGES, RATE, KFAC_BATCH = 32, 10_000, 3.0, 128


class Training(NamedTuple):
    """What is trained."""

    model: bp.Layer
    loss: Any
    optimizer: optax.GradientTransformation


DIGITS = Training(
    bp.chain(bp.dense(256), bp.relu, bp.dense(128), bp.relu, bp.dense(10)),
    bp.losses.softmax_cross_entropy,
    optax.adam(1e-3),
)
NIELSEN = Training(
    bp.chain(bp.dense(30), bp.sigmoid, bp.dense(10), bp.sigmoid),
    bp.losses.squared_error,
    optax.sgd(RATE),
)


def rows() -> Iterable[Row]:
    for epochs in (1, 10):
        title = f"{epochs} epoch{'s' * (epochs > 1)} of digits"
        yield Row(title, _ours(DIGITS, functools.partial(_digits, epochs)))
    by_numpy = [
        Candidate(name, lambda update=update: (_in_numpy(update), _nielsen()), jit=False)
        for name, update in (
            ("usual: NumPy, example by example", update_mini_batch),
            ("strongest NumPy: in matrices", update_in_matrices),
        )
    ]
    title = f"{IMAGES // 10:,} steps of Nielsen's 784-30-10"
    yield Row(title, [*_ours(NIELSEN, _nielsen), *by_numpy])
    for name, network, pixels in (
        ("digits", DIGITS.model, 64),
        ("784-512-512-512-10", mlp.model, 784),
    ):
        steps = functools.partial(_steps, network, pixels)
        yield Row(
            f"20 steps of K-FAC, {name}, batch {KFAC_BATCH}",
            [
                Candidate("ours: K-FAC", functools.partial(steps, bp.kfac)),
                Candidate("ours, a learning rate", functools.partial(steps, by_rate), same=False),
                Candidate(
                    "Adam", functools.partial(steps, lambda *_, **__: DIGITS.optimizer), same=False
                ),
            ],
        )


def by_rate(*of: Any, **given: Any) -> Any:
    return bp.kfac(*of, learning_rate=0.1, momentum=0.9, **given)


def _steps(network: bp.Layer, pixels: int, kind: Any) -> tuple[Any, tuple[Tree, ...]]:
    """20 steps on one batch, after 20 others, so that one of them inverts."""
    x = jax.random.normal(jax.random.key(0), (KFAC_BATCH, pixels))
    y = jnp.arange(KFAC_BATCH) % 10
    gradient = bp.grad(network, DIGITS.loss)
    chosen = optax.with_extra_args_support(kind(network, DIGITS.loss, batch=(x, y)))

    def steps(params: Tree, state: Tree, x: jax.Array, y: jax.Array) -> tuple[Tree, Tree]:
        def step(carried: Tree, key: jax.Array) -> tuple[Tree, None]:
            params, state = carried
            updates, state = chosen.update(gradient(params, x, y), state, params, x=x, y=y, key=key)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(1), 20))[0]

    params = network.init(jax.random.key(2), x[0])
    return steps, (*jax.jit(steps)(params, chosen.init(params), x, y), x, y)


def _ours(training: Training, inputs: Callable[[], Inputs]) -> list[Candidate]:
    by_fit = Candidate("ours: bp.fit", lambda: (_by_fit(training), inputs()), jit=False)
    name = "a bare loop of the compiled step"
    return [by_fit, Candidate(name, lambda: (_bare_loop(training), inputs()), jit=False)]


def _digits(epochs: int) -> Inputs:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    whole = len(x) // BATCH * BATCH
    x, y = (x[:whole] / 16).astype(np.float32), y[:whole].astype(np.int32)
    params = DIGITS.model.init(jax.random.key(0), x[0])
    return params, bp.minibatches(x, y, BATCH, seed=0), epochs


def _nielsen() -> Inputs:
    random = np.random.default_rng(0)
    x = random.uniform(size=(IMAGES, 784)).astype(np.float32)
    y = np.eye(10, dtype=np.float32)[random.integers(10, size=IMAGES)]
    params = NIELSEN.model.init(jax.random.key(0), x[0])
    return params, bp.minibatches(x, y, 10, seed=0), 1


def _by_fit(training: Training) -> Callable[..., Tree]:
    model, loss, optimizer = training

    def fit(params: Tree, batches: Any, epochs: int) -> Tree:
        return bp.fit(model, loss, params, batches, optimizer, epochs=epochs, progress=False).params

    return fit


def _bare_loop(training: Training) -> Callable[..., Tree]:
    model, loss, optimizer = training
    step_gradient = bp.value_and_grad(model, loss)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Tree, x: jax.Array, y: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        cost, gradient = step_gradient(params, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, cost

    def loop(params: Tree, batches: Any, epochs: int) -> Tree:
        params = jax.tree.map(jnp.copy, params)
        state = optimizer.init(params)
        for epoch in range(epochs):
            for x, y in batches(epoch):
                params, state, _ = step(params, state, x, y)
        return params

    return loop


def _in_numpy(update: Callable[..., None]) -> Callable[..., Tree]:
    """Trains Nielsen's network by ``update(weights, biases, x, y)``, which changes them."""

    def loop(params: Tree, batches: Any, epochs: int) -> Tree:
        dense = params[0], params[2]
        weights, biases = ([np.array(p[name]) for p in dense] for name in ("weight", "bias"))
        for epoch in range(epochs):
            for x, y in batches(epoch):
                update(weights, biases, x, y)
        first, last = ({"weight": w, "bias": b} for w, b in zip(weights, biases))
        return first, (), last, ()

    return loop


def update_mini_batch(weights: list, biases: list, x: np.ndarray, y: np.ndarray) -> None:
    """As in chapter 1 of Nielsen's book: the gradients of single examples, added."""
    nabla_w, nabla_b = ([np.zeros_like(p) for p in these] for these in (weights, biases))
    for one, target in zip(x, y):
        delta_w, delta_b = backprop(weights, biases, one, target)
        nabla_w = [n + d for n, d in zip(nabla_w, delta_w)]
        nabla_b = [n + d for n, d in zip(nabla_b, delta_b)]
    weights[:] = [w - RATE / len(x) * n for w, n in zip(weights, nabla_w)]
    biases[:] = [b - RATE / len(x) * n for b, n in zip(biases, nabla_b)]


def backprop(weights: list, biases: list, x: np.ndarray, y: np.ndarray) -> tuple[list, list]:
    """BP1 to BP4 of one example."""
    activations, zs = [x], []
    for w, b in zip(weights, biases):
        zs.append(w @ activations[-1] + b)
        activations.append(sigmoid(zs[-1]))
    delta = (activations[-1] - y) * sigmoid_prime(zs[-1])
    below = weights[1].T @ delta * sigmoid_prime(zs[0])
    return [np.outer(below, x), np.outer(delta, activations[1])], [below, delta]


def update_in_matrices(weights: list, biases: list, x: np.ndarray, y: np.ndarray) -> None:
    """The same, the mini-batch as one matrix, and in place."""
    hidden = sigmoid(x @ weights[0].T + biases[0])
    a = sigmoid(hidden @ weights[1].T + biases[1])
    delta = (a - y) * a * (1 - a)
    below = delta @ weights[1] * hidden * (1 - hidden)
    for layer, d, given in ((0, below, x), (1, delta, hidden)):
        weights[layer] -= RATE / len(x) * (d.T @ given)
        biases[layer] -= RATE / len(x) * d.sum(0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def sigmoid_prime(z: np.ndarray) -> np.ndarray:
    return sigmoid(z) * (1 - sigmoid(z))
