"""Norms: a residual block with each of them, 16 × 64 positions, 256 features

The other candidates are plain JAX, written without this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

from .compare import Candidate, Row

Tree = Any
BATCH, POSITIONS, FEATURES = 16, 64, 256
NORMS = {"layer norm": bp.layer_norm(), "RMS norm": bp.rms_norm(), "batch norm": bp.batch_norm()}


def rows() -> Iterable[Row]:
    for name, norm in NORMS.items():
        model = bp.chain(bp.dense(FEATURES, bias=False), norm, bp.relu, bp.dense(FEATURES))
        yield Row(
            f"{name}, loss and gradient",
            [
                ours(model, bp.value_and_grad(model, bp.losses.squared_error)),
                plain(model, name, "usual: jax.value_and_grad", jax.value_and_grad),
            ],
        )
        if not model.mixes_examples:
            norms = bp.per_example_grad_norms(model, bp.losses.squared_error)
            yield Row(
                f"{name}, per-example norms",
                [
                    ours(model, norms),
                    ours(model, bp.value_and_grad(model, bp.losses.squared_error), "a plain step"),
                    plain(model, name, "usual: vmap(jax.grad)", norms_by_vmap),
                ],
            )


def inputs(model: bp.Layer) -> tuple[Tree, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(k, (BATCH, POSITIONS, FEATURES)) for k in keys[:2])
    return model.init(keys[2], x[0]), x, y


def ours(model, function, name="ours") -> Candidate:
    return Candidate(name, lambda: (function, inputs(model)), same=name == "ours")


def plain(model, norm, name, derivative) -> Candidate:
    def make():
        params, x, y = inputs(model)
        trained = bp.trainable(params, model.is_state(params))
        return derivative(lambda p, x, y: mean_cost(norm, p, x, y)), (trained, x, y)

    return Candidate(name, make)


def mean_cost(norm: str, params: Tree, x: Array, y: Array) -> Array:
    first, of_norm, _, last = params
    z = normalised(norm, of_norm, x @ first["weight"].T)
    a = jax.nn.relu(z) @ last["weight"].T + last["bias"]
    return 0.5 * ((a - y) ** 2).sum((1, 2)).mean()


def normalised(norm: str, params: Tree, z: Array) -> Array:
    if norm == "RMS norm":
        return z * lax.rsqrt((z**2).mean(-1, keepdims=True) + 1e-5) * params["scale"]
    axes = (0, 1) if norm == "batch norm" else -1
    mean, variance = z.mean(axes, keepdims=True), z.var(axes, keepdims=True)
    return (z - mean) * lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]


def norms_by_vmap(cost):
    def of_one(params: Tree, x: Array, y: Array) -> Array:
        grads = jax.grad(lambda p: cost(p, x[None], y[None]))(params)
        return jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))

    return jax.vmap(of_one, (None, 0, 0))
