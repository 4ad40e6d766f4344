"""kfac-jax's Kronecker factors of the network of ``benchmarks.mlp``, in a process of its own.

kfac-jax 0.0.8 runs on jax 0.8.3, which is not ours: this file is run by the Python of another
environment and imports nothing of this package. For every line that it reads it updates the factors
once and answers with the seconds that took.

    python -m venv DIR && DIR/bin/pip install jax==0.8.3 jaxlib==0.8.3 kfac-jax==0.0.8
    KFAC_JAX_PYTHON=DIR/bin/python python -m benchmarks quantities
"""

import sys
import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import kfac_jax


def main(batch: int, sizes: list[int]) -> None:
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        (jax.random.normal(key, (fan_in, fan_out)) / fan_in**0.5, jnp.zeros(fan_out))
        for key, (fan_in, fan_out) in zip(keys, pairwise(sizes))
    ]
    data = jax.random.normal(keys[-1], (batch, sizes[0])), jnp.arange(batch) % sizes[-1]

    def cost(params, data):
        a, y = data
        for layer, (W, b) in enumerate(params):
            z = kfac_jax.register_dense(a @ W + b, a, W, b)
            a = jax.nn.relu(z) if layer < len(params) - 1 else z
        kfac_jax.register_softmax_cross_entropy_loss(a, targets=y)
        return -jnp.take_along_axis(jax.nn.log_softmax(a), y[:, None], 1).mean()

    estimator = kfac_jax.BlockDiagonalCurvature(func=cost)
    state = estimator.init(jax.random.key(0), (params, data), None, None)

    @jax.jit
    def update(state, params, data):
        key = jax.random.key(0)
        return estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 0.0, batch, key, (params, data), "fisher_empirical"
        )

    jax.block_until_ready(update(state, params, data))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(update(state, params, data))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
