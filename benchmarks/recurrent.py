"""Recurrent networks: half the squared error of all outputs, gradients of all parameters, float32

A row is time, examples, features, units. *peak* is one large matrix product, again and again, with
as many operations as the row's own products have: 1 ÷ its ratio is the share of the machine's
peak that we reach. `torch` runs as it stands, on the CPU, with gradients of its parameters alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

from .compare import Candidate, Row

Tree = Any
SHAPES = (
    (100, 32, 128, 256),
    (256, 16, 256, 512),
    (200, 20, 650, 650),
    (64, 128, 256, 256),
    (1000, 8, 32, 64),
    (50, 1, 64, 128),
)
loss = bp.losses.squared_error


def rows() -> Iterable[Row]:
    for shape in SHAPES:
        yield _row("LSTM", bp.lstm, shape, lstm_step)
    for shape in SHAPES[:1] + SHAPES[4:]:
        yield _row("GRU", bp.gru, shape, gru_step)
    yield Row(
        "LSTM, compile time, without running",
        [
            _compiled(f"ours, {steps:,} steps", bp.lstm(64), (steps, 8, 32))
            for steps in (100, 1_000, 10_000)
        ],
        run=False,
    )
    yield Row(
        "LSTM, memory, last output of 10,000 steps, 8 examples, 64 units",
        [
            _compiled(f"{name}, {steps:,} steps", model, (steps, 8, 32), **method)
            for steps in (10_000, 2_500)
            for name, model, method in (
                ("ours", bp.lstm(64, output="last"), {}),
                ("ours, checkpoint", bp.lstm(64, output="last", checkpoint=True), {}),
                ("usual: autodiff", bp.lstm(64, output="last"), {"method": "autodiff"}),
            )
        ],
        run=False,
    )


def _row(name: str, make: Callable[[int], bp.Layer], shape: tuple, step: Callable) -> Row:
    steps, examples, features, hidden = shape
    layer = make(hidden)

    @functools.cache
    def inputs() -> tuple[Tree, Array, Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (examples, steps, features))
        y = jax.random.normal(keys[1], (examples, steps, hidden))
        return layer.init(keys[2], x[0]), x, y

    return Row(
        f"{name} {steps}, {examples}, {features}, {hidden}",
        [
            Candidate("ours", lambda: (bp.value_and_grad(layer, loss), inputs())),
            Candidate("usual: scan", lambda: (_autodiff(plain, step), inputs())),
            Candidate(
                "strongest: scan, x products first", lambda: (_autodiff(hoisted, step), inputs())
            ),
            Candidate("flax", lambda: _flax(name, hidden, *inputs()[1:]), same=False),
            Candidate("equinox", lambda: _equinox(name, hidden, *inputs()[1:]), same=False),
            Candidate("torch", lambda: _torch(name, hidden, *inputs()[1:]), jit=False, same=False),
            Candidate("peak", lambda: _peak(shape, 4 if name == "LSTM" else 3), same=False),
        ],
    )


def _cost(outputs: Array, y: Array) -> Array:
    return 0.5 * ((outputs - y) ** 2).sum((1, 2)).mean()


# ---- what an expert would differentiate --------------------------------------------------------


def lstm_step(params: Tree, state: Tree, p: Array) -> Tree:
    h, c = state
    i, f, g, o = jnp.split(p + h @ params["weight_h"].T, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(params: Tree, state: Tree, p: Array) -> Tree:
    h, _ = state
    p_r, p_z, p_n = jnp.split(p, 3, axis=-1)
    q_r, q_z, q_n = jnp.split(h @ params["weight_h"].T, 3, axis=-1)
    r, z = jax.nn.sigmoid(p_r + q_r), jax.nn.sigmoid(p_z + q_z)
    n = jnp.tanh(p_n + r * (q_n + params["bias_n"]))
    return (1 - z) * n + z * h, ()


def _scan(params: Tree, step: Callable, of_steps: Array, project: Callable) -> Array:
    zeros = jnp.zeros((of_steps.shape[1], params["weight_h"].shape[1]))
    state = (zeros, () if "bias_n" in params else zeros)

    def one(state: Tree, at_t: Array) -> tuple[Tree, Array]:
        state = step(params, state, project(at_t))
        return state, state[0]

    return jnp.moveaxis(lax.scan(one, state, of_steps)[1], 0, 1)


def plain(params: Tree, x: Array, step: Callable) -> Array:
    def project(x: Array) -> Array:
        return x @ params["weight_x"].T + params["bias"]

    return _scan(params, step, jnp.moveaxis(x, 1, 0), project)


def hoisted(params: Tree, x: Array, step: Callable) -> Array:
    p = jnp.moveaxis(x, 1, 0) @ params["weight_x"].T + params["bias"]
    return _scan(params, step, p, lambda p: p)


def _autodiff(form: Callable, step: Callable) -> Callable:
    return jax.value_and_grad(lambda params, x, y: _cost(form(params, x, step), y))


# ---- libraries ---------------------------------------------------------------------------------


def _flax(name: str, hidden: int, x: Array, y: Array) -> tuple[Callable, tuple]:
    from flax import linen

    cell = linen.OptimizedLSTMCell if name == "LSTM" else linen.GRUCell
    model = linen.RNN(cell(hidden))
    params = model.init(jax.random.key(0), x)
    return jax.value_and_grad(lambda p, x, y: _cost(model.apply(p, x), y)), (params, x, y)


def _equinox(name: str, hidden: int, x: Array, y: Array) -> tuple[Callable, tuple]:
    import equinox

    make = equinox.nn.LSTMCell if name == "LSTM" else equinox.nn.GRUCell
    cell = make(x.shape[-1], hidden, key=jax.random.key(0))

    def outputs(cell: Any, xs: Array) -> Array:
        def step(state: Tree, x: Array) -> tuple[Tree, Array]:
            state = cell(x, state)
            return state, state[0] if name == "LSTM" else state

        zeros = jnp.zeros(hidden)
        return lax.scan(step, (zeros, zeros) if name == "LSTM" else zeros, xs)[1]

    def cost(cell: Any, x: Array, y: Array) -> Array:
        return _cost(jax.vmap(lambda xs: outputs(cell, xs))(x), y)

    return jax.value_and_grad(cost), (cell, x, y)


def _torch(name: str, hidden: int, x: Array, y: Array) -> tuple[Callable, tuple]:
    import numpy as np
    import torch

    layer = getattr(torch.nn, name)(x.shape[-1], hidden, batch_first=True)
    x, y = (torch.tensor(np.asarray(array)) for array in (x, y))

    def value_and_grad() -> list:
        layer.zero_grad(set_to_none=True)
        cost = 0.5 * ((layer(x)[0] - y) ** 2).sum((1, 2)).mean()
        cost.backward()
        return [cost.item()]

    return value_and_grad, ()


def _peak(shape: tuple, gates: int) -> tuple[Callable, tuple]:
    steps, examples, features, hidden = shape
    # Forward and the weights' gradients meet features and units; δ back through time, units.
    return peak_of(2 * steps * examples * gates * hidden * (2 * features + 3 * hidden))


def peak_of(operations: int) -> tuple[Callable, tuple]:
    """Products of square matrices with so many operations, as large ones as may be."""
    size = next(m for m in (1024, 512, 256, 128) if operations >= 8 * m**3 or m == 128)
    times = max(1, round(operations / (2 * size**3)))
    a = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5

    def products(a: Array) -> Array:
        return lax.fori_loop(0, times, lambda _, b: a @ b, a)

    return products, (a,)


def _compiled(name: str, model: bp.Layer, shape: tuple, **method: str) -> Candidate:
    def make() -> tuple[Callable, tuple]:
        steps, examples, features = shape
        x = jax.ShapeDtypeStruct((examples, steps, features), jnp.float32)
        one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), one))
        y = jax.eval_shape(model.apply, params, x)
        return bp.value_and_grad(model, loss, **method), (params, x, y)

    return Candidate(name, make)
