"""Training digits

scikit-learn's handwritten digits, 64-256-128-10, relu, Adam, batches of 32. The bare loop is the
compiled step over the same batches and nothing else. A step of K-FAC, as it comes, is measured over
the 20 from one inversion to the next, beside as many of Adam: of this network and of that of
``benchmarks.mlp``, batches of 128, without a learning rate and with one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functional_bp as bp

from . import mlp
from .compare import Candidate, Row

Tree = Any
BATCH, KFAC_BATCH = 32, 128

model = bp.chain(bp.dense(256), bp.relu, bp.dense(128), bp.relu, bp.dense(10))
loss = bp.losses.softmax_cross_entropy
optimizer = optax.adam(1e-3)


def rows() -> Iterable[Row]:
    for epochs in (1, 10):
        yield Row(
            f"{epochs} epoch{'s' * (epochs > 1)} of digits",
            [
                Candidate("ours: bp.fit", lambda n=epochs: (by_fit, _inputs(n)), jit=False),
                Candidate(
                    "a bare loop of the compiled step", lambda n=epochs: _bare_loop(n), jit=False
                ),
            ],
        )
    for name, network, pixels in (("digits", model, 64), ("784-512-512-512-10", mlp.model, 784)):
        steps = functools.partial(_steps, network, pixels)
        yield Row(
            f"20 steps of K-FAC, {name}, batch {KFAC_BATCH}",
            [
                Candidate("ours: K-FAC", functools.partial(steps, bp.kfac)),
                Candidate("ours, a learning rate", functools.partial(steps, by_rate), same=False),
                Candidate("Adam", functools.partial(steps, lambda *_, **__: optimizer), same=False),
            ],
        )


def by_rate(*of: Any, **given: Any) -> Any:
    return bp.kfac(*of, learning_rate=0.1, momentum=0.9, **given)


def _steps(network: bp.Layer, pixels: int, kind: Any) -> tuple[Any, tuple[Tree, ...]]:
    """20 steps on one batch, after 20 others, so that one of them inverts."""
    x = jax.random.normal(jax.random.key(0), (KFAC_BATCH, pixels))
    y = jnp.arange(KFAC_BATCH) % 10
    gradient = bp.grad(network, loss)
    chosen = optax.with_extra_args_support(kind(network, loss, batch=(x, y)))

    def steps(params: Tree, state: Tree, x: jax.Array, y: jax.Array) -> tuple[Tree, Tree]:
        def step(carried: Tree, key: jax.Array) -> tuple[Tree, None]:
            params, state = carried
            updates, state = chosen.update(gradient(params, x, y), state, params, x=x, y=y, key=key)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(1), 20))[0]

    params = network.init(jax.random.key(2), x[0])
    return steps, (*jax.jit(steps)(params, chosen.init(params), x, y), x, y)


def _inputs(epochs: int) -> tuple[Tree, Any, int]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    whole = len(x) // BATCH * BATCH
    x, y = (x[:whole] / 16).astype(np.float32), y[:whole].astype(np.int32)
    return model.init(jax.random.key(0), x[0]), bp.minibatches(x, y, BATCH, seed=0), epochs


def by_fit(params: Tree, batches: Any, epochs: int) -> Tree:
    return bp.fit(model, loss, params, batches, optimizer, epochs=epochs).params


def _bare_loop(epochs: int) -> tuple[Any, tuple[Tree, Any, int]]:
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

    return loop, _inputs(epochs)
