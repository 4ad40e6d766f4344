"""Deep networks: 256-wide relu layers, batch 256

A head of ten classes, softmax cross-entropy, float32. As `chain`, the autodiff candidate is a
Python loop; as `repeat`, a `lax.scan`, over the same parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array, lax

import functional_bp as bp

from .compare import Candidate, Row
from .mlp import costs_of

Tree = Any
WIDTH, BATCH, CLASSES = 256, 256, 10

loss = bp.losses.softmax_cross_entropy


def rows() -> Iterable[Row]:
    for depth in (64, 256):
        for form, model, plain in (
            ("chain", _chain(depth), cost_of_loop),
            ("repeat", _repeat(depth), cost_of_scan),
        ):
            inputs = functools.partial(_inputs, model)
            yield Row(
                f"{depth} layers, {form}",
                [
                    _candidate("ours", bp.value_and_grad(model, loss), inputs),
                    _candidate("usual: jax.value_and_grad", jax.value_and_grad(plain), inputs),
                ],
            )
    yield Row(
        "compile time, without running",
        [
            _candidate(f"ours, {name}", bp.value_and_grad(model, loss), _shapes_of(model))
            for name, model in (
                ("repeat of 64", _repeat(64)),
                ("repeat of 256", _repeat(256)),
                ("repeat of 1,024", _repeat(1024)),
                ("chain of 64", _chain(64)),
                ("chain of 256", _chain(256)),
            )
        ],
        run=False,
    )


def _block() -> bp.Layer:
    return bp.chain(bp.dense(WIDTH), bp.relu)


def _chain(depth: int) -> bp.Layer:
    return bp.chain(*[_block() for _ in range(depth)], bp.dense(CLASSES))


def _repeat(depth: int) -> bp.Layer:
    return bp.chain(bp.repeat(_block(), depth), bp.dense(CLASSES))


def _candidate(name: str, function: Callable, inputs: Callable) -> Candidate:
    return Candidate(name, lambda: (function, inputs()))


def _inputs(model: bp.Layer) -> tuple[Tree, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, WIDTH))
    y = jax.random.randint(keys[1], (BATCH,), 0, CLASSES)
    return model.init(keys[2], x[0]), x, y


def _shapes_of(model: bp.Layer) -> Callable:
    return lambda: jax.eval_shape(lambda: _inputs(model))


def _dense(p: Tree, a: Array) -> Array:
    return a @ p["weight"].T + p["bias"]


def cost_of_loop(params: Tree, x: Array, y: Array) -> Array:
    *blocks, head = params
    for dense, _ in blocks:
        x = jax.nn.relu(_dense(dense, x))
    return costs_of(_dense(head, x), y).mean()


def cost_of_scan(params: Tree, x: Array, y: Array) -> Array:
    (blocks, _), head = params
    x, _ = lax.scan(lambda a, p: (jax.nn.relu(_dense(p, a)), None), x, blocks)
    return costs_of(_dense(head, x), y).mean()
