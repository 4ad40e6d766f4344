"""Second moments, Gram matrices, Kronecker factors and clipping, beside other libraries

The network of ``benchmarks.mlp``, batch 128, float32. ``python -m benchmarks.quantities PATH``
draws how each grows with the batch and the width.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import functional_bp as bp

from . import mlp
from .compare import Candidate, Row, compare
from .mlp import MAX_NORM, loss, model

Tree = Any
BATCH = 128


def rows() -> Iterable[Row]:
    step = bp.value_and_grad(model, loss)

    def ours(function, name="ours", **options):
        return mlp.ours(BATCH, function, name, **options)

    def plain(name, function, **options):
        return mlp.plain(BATCH, name, function, **options)

    manual = ours(step, "a plain manual step", same=False)
    yield Row(
        f"second moment, batch {BATCH}",
        [
            ours(bp.grad_second_moment(model, loss)),
            manual,
            plain("usual: vmap(jax.grad)", moment_by_vmap),
            plain("strongest: perturbations of every z", moment_by_perturbations),
        ],
    )
    yield Row(
        f"Gram matrix, batch {BATCH}",
        [
            ours(bp.grad_gram(model, loss)),
            manual,
            plain("usual: vmap(jax.grad)", gram_by_vmap),
            plain("strongest: perturbations of every z", gram_by_perturbations),
        ],
    )
    yield Row(
        f"Kronecker factors, empirical, batch {BATCH}",
        [
            ours(_factors_of_weights),
            manual,
            plain("strongest: perturbations of every z", factors_by_perturbations),
            Candidate("kfac-jax", _by_kfac_jax, jit=False, same=False, clock=_asked),
        ],
    )
    yield Row(
        f"clipped gradient and other libraries, batch {BATCH}",
        [
            ours(bp.clipped_grad(model, loss, MAX_NORM)),
            manual,
            Candidate("jax-privacy: clipped_grad", _by_jax_privacy),
            Candidate("Opacus: ghost clipping", _by_opacus, jit=False, same=False),
        ],
    )
    yield Row(
        f"per-example norms and other libraries, batch {BATCH}",
        [
            ours(bp.per_example_grad_norms(model, loss)),
            Candidate("BackPACK: BatchL2Grad", _by_backpack("BatchL2Grad"), jit=False, same=False),
        ],
    )
    yield Row(
        f"per-example gradients and other libraries, batch {BATCH}",
        [
            ours(bp.per_example_grads(model, loss)),
            plain("usual: vmap(jax.grad)", jax.vmap(mlp.grad_of_one, (None, 0, 0))),
            Candidate("BackPACK: BatchGrad", _by_backpack("BatchGrad"), jit=False, same=False),
        ],
    )


# In plain JAX.


def moment_by_vmap(params: Tree, x: Array, y: Array) -> Tree:
    grads = jax.vmap(mlp.grad_of_one, (None, 0, 0))(params, x, y)
    return jax.tree.map(lambda g: (g**2).mean(0), grads)


def moment_by_perturbations(params: Tree, x: Array, y: Array) -> Tree:
    n = x.shape[0]
    return [
        {"weight": (d**2).T @ a**2 / n, "bias": (d**2).mean(0)} for d, a in mlp.deltas(params, x, y)
    ]


def gram_by_vmap(params: Tree, x: Array, y: Array) -> Array:
    grads = jax.vmap(mlp.grad_of_one, (None, 0, 0))(params, x, y)
    flat = [g.reshape(g.shape[0], -1) for g in jax.tree.leaves(grads)]
    return sum(g @ g.T for g in flat)


def gram_by_perturbations(params: Tree, x: Array, y: Array) -> Array:
    return sum((d @ d.T) * (1 + a @ a.T) for d, a in mlp.deltas(params, x, y))


def factors_by_perturbations(params: Tree, x: Array, y: Array) -> Tree:
    n = x.shape[0]
    return [(a.T @ a / n, d.T @ d / n) for d, a in mlp.deltas(params, x, y)]


def _factors_of_weights(params: Tree, x: Array, y: Array) -> Tree:
    factors = bp.kronecker_factors(model, loss)(params, x, y)
    return [tuple(p["weight"]) for p in factors if p]


# Other libraries.


def _by_jax_privacy() -> tuple:
    from jax_privacy.clipping import clipped_grad

    params, x, y = mlp.inputs(BATCH)

    def cost(params, x, y):
        return mlp.mean_cost(params, x, y)

    fn = clipped_grad(cost, l2_clip_norm=MAX_NORM, batch_argnums=(1, 2), normalize_by=BATCH)
    return fn, ([p for p in params if p], x, y)


def _by_kfac_jax() -> tuple:
    """A function that has the factors made by another process, and says how long that took."""
    python = os.environ.get("KFAC_JAX_PYTHON")
    if python is None:
        raise ImportError("KFAC_JAX_PYTHON names no Python that has it; see kfac_jax_peer.py")
    script = Path(__file__).with_name("kfac_jax_peer.py")
    process = subprocess.Popen(
        [python, script, str(BATCH), *map(str, mlp.SIZES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.stdout.readline().strip() != "ready":
        raise ImportError(f"{python} did not run {script.name}")
    atexit.register(process.kill)

    def update() -> np.ndarray:
        process.stdin.write("\n")
        process.stdin.flush()
        return np.array(float(process.stdout.readline()))

    return update, ()


def _asked(function: Callable[[], np.ndarray], arguments: tuple) -> float:
    return float(function(*arguments))


def _torch_model() -> tuple:
    import torch

    torch.manual_seed(0)
    layers: list = []
    for fan_in, fan_out in zip(mlp.SIZES[:-2], mlp.SIZES[1:-1]):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    layers.append(torch.nn.Linear(*mlp.SIZES[-2:]))
    _, x, y = mlp.inputs(BATCH)
    return (
        torch.nn.Sequential(*layers),
        torch.tensor(np.asarray(x)),
        torch.tensor(np.asarray(y), dtype=torch.long),
    )


def _by_opacus() -> tuple:
    return ghost_clipping(*_torch_model())


def ghost_clipping(network: Any, x: Any, y: Any) -> tuple:
    """Opacus's clipped gradient of a PyTorch network, by two backward passes."""
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    network = GradSampleModuleFastGradientClipping(
        network, max_grad_norm=MAX_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(network.parameters(), 0.1),
        noise_multiplier=0.0,
        max_grad_norm=MAX_NORM,
        expected_batch_size=len(x),
    )
    criterion = torch.nn.CrossEntropyLoss()
    cost = DPLossFastGradientClipping(network, optimizer, criterion)

    def step():
        network.zero_grad()
        cost(network(x), y).backward()
        return ()

    return step, ()


def _by_backpack(extension: str):
    def make() -> tuple:
        import torch
        from backpack import backpack, extend, extensions

        network, x, y = _torch_model()
        network, cost = extend(network), extend(torch.nn.CrossEntropyLoss())

        def step():
            network.zero_grad()
            with backpack(getattr(extensions, extension)()):
                cost(network(x), y).backward()
            return ()

        return step, ()

    return make


def growth(path: str) -> None:
    """Draws times against the batch, at width 512, and against the width, at batch 128."""
    import matplotlib.pyplot as plt

    batches, widths = (32, 128, 512, 2048), (128, 512, 2048)
    sweeps = {
        "examples in the batch, width 512": [(n, (n, 512)) for n in batches],
        "width, 128 examples": [(w, (128, w)) for w in widths],
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    figure.suptitle("784-w-w-10, relu, float32")
    for axis, (label, points) in zip(axes, sweeps.items()):
        times: dict[str, list] = {}
        for at, sizes in points:
            for name, milliseconds in _times(*sizes).items():
                times.setdefault(name, []).append((at, milliseconds))
                print(f"{label} {at}: {name} {milliseconds:.2f} ms", flush=True)
        for name, series in times.items():
            axis.loglog(*zip(*series), marker="o", ls="--" if "vmap" in name else "-", label=name)
        axis.set_xlabel(label)
        sizes = [at for at, _ in points]
        axis.set_xticks(sizes, labels=map(str, sizes))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def _times(n: int, width: int) -> dict[str, float]:
    """Milliseconds of each quantity; ``vmap`` where its gradients fit in 4 GiB."""
    network = bp.chain(bp.dense(width), bp.relu, bp.dense(width), bp.relu, bp.dense(10))

    def inputs():
        x = jax.random.normal(jax.random.key(0), (n, mlp.SIZES[0]))
        y = jnp.arange(n) % 10
        return network.init(jax.random.key(1), x[0]), x, y

    def plain():
        params, x, y = inputs()
        return mlp.norms_by_vmap, ([p for p in params if p], x, y)

    def of(name, function):
        return Candidate(name, lambda: (function, inputs()), same=False)

    candidates = [
        of("gradient", bp.value_and_grad(network, loss)),
        of("norms", bp.per_example_grad_norms(network, loss)),
        of("clipped gradient", bp.clipped_grad(network, loss, MAX_NORM)),
        of("second moment", bp.grad_second_moment(network, loss)),
        of("Gram matrix", bp.grad_gram(network, loss)),
        of("Kronecker factors", bp.kronecker_factors(network, loss)),
    ]
    if n * width * (mlp.SIZES[0] + width) * 4 < 4 * 2**30:
        candidates.append(Candidate("norms by vmap(jax.grad)", plain, same=False))
    results, _ = compare(Row("growth", candidates), budget=4, turns=(3, 100))
    return {result.name: 1e3 * result.seconds for result in results}


if __name__ == "__main__":
    growth(sys.argv[1])
