"""Recurrent layers as functions of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError
from ..contractions import Contraction
from ..factors.factored import Factored
from ..layer import Layer
from ..layers.recurrence import cells
from ..traced.named import Named
from .checks import floating, shaped

Tree = Any


def lstm(
    x: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array,
    h0: Array | None = None,
    c0: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Long short-term memory: ``bp.lstm``'s own recursion, forward and back.

    Forward:

        z_t = W_x x_t + b + W_h h_{t−1}      (the rows of i, f, g, o one below the other)
        i = σ(z^i)   f = σ(z^f)   g = tanh(z^g)   o = σ(z^o)
        c_t = f ⊙ c_{t−1} + i ⊙ g
        h_t = o ⊙ tanh c_t

    Backward: as ``bp.lstm``'s.

    (Hochreiter & Schmidhuber 1997; Gers et al. 2000.) There is a backward pass, and no forward mode
    (``jax.jvp``). A batch is better given on leading axes than by ``vmap``, under which the
    gradients of the weights are made for each example and then added.

    Args:
      x: ``(…, t, d)``, any leading axes.
      weight_x, weight_h, bias: ``(4 h, d)``, ``(4 h, h)`` and ``(4 h,)``.
      h0, c0: the state before the first step, ``(…, h)``; None for zeros.

    Returns:
      All h_t, ``(…, t, h)``, and the last h and c, ``(…, h)``.

    Raises:
      ModelError: for shapes that do not fit.

    Example:
      >>> x, bias = jnp.ones((2, 5, 3)), jnp.zeros(16)
      >>> h, (last, c) = bp.ops.lstm(x, jnp.ones((16, 3)), jnp.ones((16, 4)), bias)
      >>> h.shape, c.shape
      ((2, 5, 4), (2, 4))
    """
    h, (last, c) = _run("lstm", 4, x, weight_x, weight_h, (bias,), {"h0": h0, "c0": c0})
    return h, (last, c)


def gru(
    x: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array,
    bias_n: Array,
    h0: Array | None = None,
) -> tuple[Array, Array]:
    """A gated recurrent unit: ``bp.gru``'s own recursion, forward and back.

    Forward:

        p_t = W_x x_t + b,  q_t = W_h h_{t−1}      (the rows of r, z, n one below the other)
        r = σ(p^r + q^r)   z = σ(p^z + q^z)
        n = tanh(p^n + r ⊙ (q^n + b_n))
        h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}

    Backward: as ``bp.gru``'s.

    (Cho et al. 2014.) There is a backward pass, and no forward mode (``jax.jvp``). A batch is
    better given on leading axes than by ``vmap``.

    Args:
      x: ``(…, t, d)``, any leading axes.
      weight_x, weight_h, bias, bias_n: ``(3 h, d)``, ``(3 h, h)``, ``(3 h,)`` and ``(h,)``.
      h0: the state before the first step, ``(…, h)``; None for zeros.

    Returns:
      All h_t, ``(…, t, h)``, and the last one, ``(…, h)``.

    Raises:
      ModelError: for shapes that do not fit.

    Example:
      >>> x, bias, bias_n = jnp.ones((2, 5, 3)), jnp.zeros(12), jnp.zeros(4)
      >>> h, last = bp.ops.gru(x, jnp.ones((12, 3)), jnp.ones((12, 4)), bias, bias_n)
      >>> h.shape, last.shape
      ((2, 5, 4), (2, 4))
    """
    h, (last,) = _run("gru", 3, x, weight_x, weight_h, (bias, bias_n), {"h0": h0})
    return h, last


def rnn(
    x: Array, weight_x: Array, weight_h: Array, bias: Array, h0: Array | None = None
) -> tuple[Array, Array]:
    """A plain recurrent layer: ``bp.rnn``'s own recursion, forward and back.

    Forward:

        h_t = tanh(W_x x_t + b + W_h h_{t−1})

    Backward: as ``bp.rnn``'s.

    (Elman 1990; Werbos 1990.) There is a backward pass, and no forward mode (``jax.jvp``). A batch
    is better given on leading axes than by ``vmap``.

    Args:
      x: ``(…, t, d)``, any leading axes.
      weight_x, weight_h, bias: ``(h, d)``, ``(h, h)`` and ``(h,)``.
      h0: the state before the first step, ``(…, h)``; None for zeros.

    Returns:
      All h_t, ``(…, t, h)``, and the last one, ``(…, h)``.

    Raises:
      ModelError: for shapes that do not fit.

    Example:
      >>> x, bias = jnp.ones((2, 5, 3)), jnp.zeros(4)
      >>> h, last = bp.ops.rnn(x, jnp.ones((4, 3)), jnp.ones((4, 4)), bias)
      >>> h.shape, last.shape
      ((2, 5, 4), (2, 4))
    """
    h, (last,) = _run("rnn", 1, x, weight_x, weight_h, (bias,), {"h0": h0})
    return h, last


_STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}
_WEIGHTS = {
    "lstm": ("weight_x", "weight_h", "bias"),
    "gru": ("weight_x", "weight_h", "bias", "bias_n"),
    "rnn": ("weight_x", "weight_h", "bias"),
}


def _run(
    name: str,
    gates: int,
    x: Array,
    weight_x: Array,
    weight_h: Array,
    biases: tuple[Array, ...],
    states: dict[str, Array | None],
) -> tuple[Array, list[Array]]:
    """Checks the arrays, with all leading axes as one."""
    op = f"ops.{name}"
    x = floating(f"{op}: x", x)
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ModelError(f"{op}: x: takes (…, t, features), at least one step, got {x.shape}")
    weights = dict(zip(_WEIGHTS[name], (weight_x, weight_h, *biases)))
    weights = {w: floating(f"{op}: {w}", a) for w, a in weights.items()}
    if weights["weight_h"].ndim != 2:
        raise ModelError(
            f"{op}: weight_h: takes ({gates} units, units), got {weights['weight_h'].shape}"
        )
    units, features = weights["weight_h"].shape[1], x.shape[-1]
    rows, lead = gates * units, x.shape[:-2]
    wanted = {"weight_h": (rows, units), "weight_x": (rows, features), "bias": (rows,)}
    wanted |= {"bias_n": (units,)} if "bias_n" in weights else {}
    for w, shape in wanted.items():
        shaped(f"{op}: {w}", weights[w], shape)
    dtype = jnp.result_type(x, *weights.values())
    begin = []
    for s, a in states.items():
        a = jnp.zeros((*lead, units), dtype) if a is None else floating(f"{op}: {s}", a)
        shaped(f"{op}: {s}", a, (*lead, units))
        begin.append(a.astype(dtype).reshape(-1, units))
    sequences = x.astype(dtype).reshape(-1, *x.shape[-2:])
    h, *last = _rule(name).one(sequences, *weights.values(), *begin)
    return h.reshape(*x.shape[:-1], units), [a.reshape(*lead, units) for a in last]


@functools.cache
def _rule(name: str) -> Named:
    """The layer's rule; an example is a few sequences, ``(m, t, …)``."""
    names, parts = _WEIGHTS[name], _STATES[name]
    count = len(names)

    def layer(params: Tree) -> Layer:
        made = {"lstm": cells.lstm, "gru": cells.gru, "rnn": cells.rnn}[name]
        return made(params["weight_h"].shape[1])

    def joined(a: Array) -> Array:
        return a.reshape(-1, *a.shape[2:])

    def taken(operands: tuple[Array, ...]) -> tuple[Tree, Tree]:
        x, *rest = operands
        state = dict(zip(parts, map(joined, rest[count:])))
        return dict(zip(names, rest[:count])), {"x": joined(x), "state": (state,)}

    def forward(*operands: Array) -> tuple[list[Array], Tree]:
        params, inputs = taken(operands)
        y, residuals = layer(params).forward(params, inputs)
        lead = operands[0].shape[:2]
        outputs = [y["x"], *(y["state"][-1][part] for part in parts)]
        return [a.reshape(*lead, *a.shape[1:]) for a in outputs], residuals

    def backward(
        operands: tuple[Array, ...], residuals: Tree, dy: list[Array], contract: Contraction
    ) -> list[Any]:
        params, _ = taken(operands)
        dh, *d_last = map(joined, dy)
        deltas = {"x": dh, "state": (dict(zip(parts, d_last)),)}
        dx, results = layer(params).backward(params, residuals, deltas, contract)
        lead = operands[0].shape[:2]

        def split(a: Array) -> Array:
            return a.reshape(*lead, *a.shape[1:])

        if isinstance(results["bias"], Factored):
            results = jax.tree.map(split, results)
        state = dx["state"][0]
        return [split(dx["x"]), *(results[n] for n in names), *(split(state[p]) for p in parts)]

    shared = tuple(range(1, 1 + count))
    of_weights = [2 if n.startswith("weight") else 1 for n in names]
    ranks = (3, *of_weights, *(2 for _ in parts))
    return Named(f"functional_bp.{name}", forward, backward, shared, ranks)
