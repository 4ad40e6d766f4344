"""Training digits

scikit-learn's handwritten digits, 64-256-128-10, relu, Adam, batches of 32. The bare loop is the
compiled step over the same batches and nothing else.
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

from .compare import Candidate, Row

Tree = Any
BATCH = 32

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
