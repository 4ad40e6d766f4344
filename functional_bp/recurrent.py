"""Recurrent cells: the equations of one step, and of δ back through it.

Each cell is a few functions that read like its equations; ``bp.through_time`` makes a layer of it.
Shapes of one step: x_t ``(d,)``; h, c, every gate and every δ ``(h,)``; p_t = W_x x_t + b ``(k,)``,
the input's part of all pre-activations at once. The vectors of a batch are columns, ``(h, n)``.
σ is the sigmoid and ⊙ the element-wise product. A δ with the name of a gate is the derivative of
C by the gate's pre-activation; ∂s_t is short for ∂C/∂s_t. What stands in brackets does not wait
for δ: ``local`` makes it for many steps at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, choice, described, random_key, whole
from .contractions import keep
from .dense import lecun_normal
from .factors import Outer, Summed
from .layer import Layer, a_layer, place
from .shapes import Sizes
from .through_time import (
    Cell,
    Recurrent,
    State,
    as_tree,
    product,
    through_time,
)

Tree = Any
sigmoid, tanh = lax.logistic, lax.tanh


def _weights(key: Array, gates: int, hidden: int, features: int, dtype: Any) -> Tree:
    """``weight_x (gates·h, d)``, normal with variance 1/d; ``weight_h (gates·h, h)``, orthogonal
    for each gate (Saxe et al. 2014); ``bias (gates·h,)``, zero."""
    key_x, key_h = jax.random.split(key)
    orthogonal = jax.nn.initializers.orthogonal()
    at_least_float32 = jnp.promote_types(dtype, jnp.float32)  # QR knows no smaller numbers
    weight_h = jax.vmap(lambda k: orthogonal(k, (hidden, hidden), at_least_float32))(
        jax.random.split(key_h, gates)
    )
    return {
        "weight_x": lecun_normal(key_x, (gates * hidden, features), dtype),
        "weight_h": weight_h.reshape(gates * hidden, hidden).astype(dtype),
        "bias": jnp.zeros(gates * hidden, dtype),
    }


def _factors(delta: Array, x: Array, h_before: Array) -> Tree:
    """∂W_x = Σ_t δ_t x_tᵀ, ∂W_h = Σ_t δ_t h_{t−1}ᵀ (BP4), ∂b = Σ_t δ_t (BP3)."""
    return {
        "weight_x": Outer(delta, x),
        "weight_h": Outer(delta, h_before),
        "bias": Summed(delta),
    }


def rnn(hidden: int, *, activation: str = "tanh", **options: Any) -> Layer:
    """A plain recurrent layer (Elman 1990).

    Forward:

        z_t = W_x x_t + b + W_h h_{t−1}
        h_t = f(z_t)

    Backward, f′ as a function of h_t:

        δ_t = ∂h_t ⊙ f′(z_t)
        ∂h_{t−1} = W_hᵀ δ_t

    (Werbos 1990, "Backpropagation through time".)

    Parameters: ``weight_x (h, d)``, ``weight_h (h, h)``, ``bias (h,)``. State: ``{"h"}``.

    Args:
      hidden: h, the number of units.
      activation: f, ``"tanh"`` or ``"relu"``.
      options: those of ``bp.through_time``.

    Raises:
      ValueError: for an unknown activation.
    """
    whole("rnn: hidden", hidden)
    choice("rnn: activation", activation, ("tanh", "relu"))

    def init(key: Array, features: int, dtype: Any) -> Tree:
        return _weights(key, 1, hidden, features, dtype)

    def forward(params: Tree, state: State, p: Array) -> tuple[State, Tree]:
        z = p + product(params["weight_h"], state["h"])
        h = tanh(z) if activation == "tanh" else jnp.maximum(z, 0)
        return {"h": h}, h

    def local(h: Array) -> Array:
        return 1 - h * h if activation == "tanh" else (h > 0).astype(h.dtype)

    def backward(transposed: Tree, df: Array, dstate: State) -> tuple[State, Array]:
        delta = dstate["h"] * df
        return {"h": product(transposed["weight_h"], delta)}, delta

    said = {} if activation == "tanh" else {"activation": activation}
    cell = Cell("rnn", hidden, ("h",), init, forward, local, backward, _factors, said)
    return through_time(cell, **options)


def lstm(hidden: int, **options: Any) -> Layer:
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000).

    Forward:

        z_t = W_x x_t + b + W_h h_{t−1}, the rows of i, f, g, o one below the other
        i = σ(z^i)   f = σ(z^f)   g = tanh(z^g)   o = σ(z^o)
        c_t = f ⊙ c_{t−1} + i ⊙ g
        h_t = o ⊙ tanh c_t

    Backward:

        ∂c_t ← ∂c_t + ∂h_t ⊙ [o ⊙ (1 − tanh² c_t)]
        δ^i = ∂c_t ⊙ [g        ⊙ i (1 − i)]
        δ^f = ∂c_t ⊙ [c_{t−1}  ⊙ f (1 − f)]
        δ^g = ∂c_t ⊙ [i        ⊙ (1 − g²)]
        δ^o = ∂h_t ⊙ [tanh c_t ⊙ o (1 − o)]
        ∂c_{t−1} = ∂c_t ⊙ f
        ∂h_{t−1} = W_hᵀ δ_t

    ∂c goes back through nothing but a product with f: where f ≈ 1 it neither vanishes nor grows.

    Parameters: ``weight_x (4h, d)``, ``weight_h (4h, h)``, ``bias (4h,)``, gates i, f, g, o
    (cuDNN's order). The bias starts at 0, of f at 1 (Gers et al. 2000, Józefowicz et al. 2015).
    State: ``{"h", "c"}``.

    Args:
      hidden: h, the number of units.
      options: those of ``bp.through_time``.
    """

    whole("lstm: hidden", hidden)

    def init(key: Array, features: int, dtype: Any) -> Tree:
        params = _weights(key, 4, hidden, features, dtype)
        return params | {"bias": params["bias"].at[hidden : 2 * hidden].set(1)}

    def forward(params: Tree, state: State, p: Array) -> tuple[State, Tree]:
        h, c_before = state["h"], state["c"]
        z = p + product(params["weight_h"], h)
        z_i, z_f, z_g, z_o = jnp.split(z, 4)
        i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
        c = f * c_before + i * g
        return {"h": o * tanh(c), "c": c}, (i, f, g, o, c_before)

    def local(saved: Tree) -> Tree:
        i, f, g, o, c_before = saved
        tanh_c = tanh(f * c_before + i * g)
        dc_dh = o * (1 - tanh_c * tanh_c)
        di = g * i * (1 - i)
        df = c_before * f * (1 - f)
        dg = i * (1 - g * g)
        do = tanh_c * o * (1 - o)
        return dc_dh, (di, df, dg, do), f

    def backward(transposed: Tree, local: Tree, dstate: State) -> tuple[State, Array]:
        dc_dh, (di, df, dg, do), f = local
        dh = dstate["h"]
        dc = dstate["c"] + dh * dc_dh
        delta = jnp.concatenate([dc * di, dc * df, dc * dg, dh * do])
        return {"h": product(transposed["weight_h"], delta), "c": dc * f}, delta

    cell = Cell("lstm", hidden, ("h", "c"), init, forward, local, backward, _factors)
    return through_time(cell, **options)


def gru(hidden: int, **options: Any) -> Layer:
    """Gated recurrent unit (Cho et al. 2014), r applied after the recurrent product.

    Forward, p_t = W_x x_t + b and q_t = W_h h_{t−1}, the rows of r, z, n one below the other:

        r = σ(p^r + q^r)   z = σ(p^z + q^z)
        m = q^n + b_n
        n = tanh(p^n + r ⊙ m)
        h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}

    Backward, δ = ∂C/∂p and ε = ∂C/∂q, which differ in the rows of n alone:

        δ^n = ∂h_t ⊙ [(1 − z) ⊙ (1 − n²)]           ε^n = δ^n ⊙ r
        δ^z = ∂h_t ⊙ [(h_{t−1} − n) ⊙ z (1 − z)]    ε^z = δ^z
        δ^r = δ^n ⊙ [m ⊙ r (1 − r)]                 ε^r = δ^r
        ∂h_{t−1} = ∂h_t ⊙ z + W_hᵀ ε
        ∂W_x = Σ_t δ_t x_tᵀ   ∂W_h = Σ_t ε_t h_{t−1}ᵀ   ∂b = Σ_t δ_t   ∂b_n = Σ_t ε^n_t

    Parameters: ``weight_x (3h, d)``, ``weight_h (3h, h)``, ``bias (3h,)``, gates r, z, n, and
    ``bias_n (h,)`` (cuDNN's equations without their redundant biases). State: ``{"h"}``.

    Args:
      hidden: h, the number of units.
      options: those of ``bp.through_time``.
    """

    whole("gru: hidden", hidden)

    def init(key: Array, features: int, dtype: Any) -> Tree:
        params = _weights(key, 3, hidden, features, dtype)
        return params | {"bias_n": jnp.zeros(hidden, dtype)}

    def forward(params: Tree, state: State, p: Array) -> tuple[State, Tree]:
        h = state["h"]
        p_r, p_z, p_n = jnp.split(p, 3)
        q_r, q_z, q_n = jnp.split(product(params["weight_h"], h), 3)
        r, z = sigmoid(p_r + q_r), sigmoid(p_z + q_z)
        m = q_n + params["bias_n"][:, None]
        n = tanh(p_n + r * m)
        return {"h": (1 - z) * n + z * h}, (r, z, n, m, h)

    def local(saved: Tree) -> Tree:
        r, z, n, m, h_before = saved
        dn = (1 - z) * (1 - n * n)
        dz = (h_before - n) * z * (1 - z)
        dr = m * r * (1 - r)
        return dn, dz, dr, r, z

    def backward(transposed: Tree, local: Tree, dstate: State) -> tuple[State, Tree]:
        dn, dz, dr, r, z = local
        dh = dstate["h"]
        delta_n, delta_z = dh * dn, dh * dz
        delta_r = delta_n * dr
        delta = jnp.concatenate([delta_r, delta_z, delta_n])
        epsilon = jnp.concatenate([delta_r, delta_z, delta_n * r])
        return {"h": dh * z + product(transposed["weight_h"], epsilon)}, (delta, epsilon)

    def factors(deltas: Tree, x: Array, h_before: Array) -> Tree:
        delta, epsilon = deltas
        return {
            "weight_x": Outer(delta, x),
            "weight_h": Outer(epsilon, h_before),
            "bias": Summed(delta),
            "bias_n": Summed(epsilon[..., 2 * hidden :]),
        }

    cell = Cell("gru", hidden, ("h",), init, forward, local, backward, factors)
    return through_time(cell, **options)


def bidirectional(forward: Layer, backward: Layer | None = None) -> Layer:
    """Two recurrent layers over the same sequence, one from each end.

        y_t = [→h_t, ←h_t];  ∂C/∂x_t = the sum of ∂C/∂x_t through both

    (Schuster & Paliwal 1997, "Bidirectional recurrent neural networks".)

    Args:
      forward: a recurrent layer, ``bp.lstm(64)``.
      backward: the one that runs from the last valid step to the first; ``forward``'s own kind,
        with parameters of its own, if not given.

    The input and the output are those of the two layers; of ``state``, ``forward`` takes the
    first and ``backward`` the second. Parameters are the tuple ``(forward's, backward's)``.

    Raises:
      ModelError: if ``forward`` is not a recurrent layer and ``backward`` is not given.
    """
    a_layer("bidirectional: forward", forward)
    if backward is not None:
        a_layer("bidirectional: backward", backward)
    else:
        if not isinstance(forward, Recurrent):
            raise ModelError(f"bidirectional: takes a recurrent layer, got {forward!r}")
        backward = forward.mirrored()
    layers = (forward, backward)
    name = f"bidirectional({forward.name}, {backward.name})"

    def inputs(x: Tree) -> list[Tree]:
        if "state" not in as_tree(x):
            return [x, x]
        if len(x["state"]) < 2:
            raise ModelError(f"state: takes a state for each direction, got {len(x['state'])}")
        return [{**x, "state": x["state"][i : i + 1]} for i in range(2)]

    def init(key: Array, x: Tree) -> Tree:
        with place(f"{name}:"):
            random_key("key", key, or_none=False)
            pairs = zip(layers, jax.random.split(key), inputs(x))
            return tuple(layer.init(k, x) for layer, k, x in pairs)

    def run(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        with place(f"{name}:"):
            if not isinstance(params, tuple) or len(params) != 2:
                raise ModelError(
                    "takes parameters as the tuple (forward's, backward's), got "
                    f"{described(params)}; are they another model's?"
                )
            keys = (None, None) if key is None else jax.random.split(key)
            runs = [layer.forward(*args) for layer, *args in zip(layers, params, inputs(x), keys)]
        ys, residuals = zip(*runs)
        hs = [as_tree(y)["x"] for y in ys]
        y: Tree = jnp.concatenate(hs, axis=-1)
        if isinstance(x, dict):
            y = {**x, "x": y}
        if isinstance(x, dict) and "state" in x:
            y["state"] = (*x["state"][2:], *(y_["state"][0] for y_ in ys))
        return y, (residuals, Sizes(tuple(h.shape[-1] for h in hs)))

    def run_back(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        residuals, hidden = residuals
        dhs = lax.split(as_tree(dy)["x"], hidden.sizes, as_tree(dy)["x"].ndim - 1)
        dys: list[Tree] = list(dhs)
        if isinstance(dy, dict):
            dys = [{**dy, "x": dh} for dh in dhs]
        if isinstance(dy, dict) and "state" in dy:
            dys = [{**d, "state": (of_final,)} for d, of_final in zip(dys, dy["state"][-2:])]
        runs = [
            layer.backward(params[i], residuals[i], dys[i], contract[i])
            for i, layer in enumerate(layers)
        ]
        (dx, dx_), results = zip(*runs)
        if not isinstance(dy, dict):
            return dx + dx_, results
        both = {**dx, "x": dx["x"] + dx_["x"]}
        if "state" in dy:
            both["state"] = (*dx["state"], *dx_["state"], *dy["state"][:-2])
        return both, results

    return Layer(
        name=name,
        init=init,
        forward=run,
        backward=run_back,
        lift=lambda: bidirectional(forward.batched, backward.batched),
        parts=layers,
        rebuild=bidirectional,
        mixes_examples=any(layer.mixes_examples for layer in layers),
    )
