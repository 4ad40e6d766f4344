"""Recurrent cells: the equations of one step, and of δ back through it.

Each cell is a few functions that read like its equations; ``bp.through_time`` makes a layer of it.
Shapes of one step: x_t ``(d,)``; h, c, every gate and every δ ``(h,)``; p_t = W_x x_t + b ``(k,)``,
the input's part of all pre-activations at once. The vectors of a batch are columns, ``(h, n)``.
σ is the sigmoid and ⊙ the element-wise product. A δ with the name of a gate is the derivative of
C by the gate's pre-activation. What stands in brackets does not wait
for δ: ``local`` makes it for many steps at once.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...checks import choice, whole
from ...docstrings import explained
from ...factors.factored import Outer, Summed
from ...layer import Layer
from ..dense import lecun_normal
from .cell import Cell, State, product
from .through_time import Output, through_time

Tree = Any
Activation = Literal["tanh", "relu"]
sigmoid, tanh = lax.logistic, lax.tanh

TO_WEIGHTS = """
        ∂C/∂x_t = W_xᵀ δ_t
        ∂C/∂W_x = Σ_t δ_t x_tᵀ,  ∂C/∂W_h = Σ_t δ_t h_{t−1}ᵀ      (BP4)
        ∂C/∂b = Σ_t δ_t      (BP3)"""


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


@explained(
    forward="""
        z_t = W_x x_t + b + W_h h_{t−1}
        h_t = f(z_t),  f = tanh or relu""",
    backward="""
        ∂C/∂h_t ← ∂C/∂h_t + W_hᵀ δ_{t+1}
        δ_t = ∂C/∂h_t ⊙ f′(z_t)"""
    + TO_WEIGHTS,
    y="h",
)
def rnn(
    hidden: int,
    *,
    activation: Activation = "tanh",
    output: Output = "sequence",
    reverse: bool = False,
    trained_state: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> Layer:
    """A plain recurrent layer (Elman 1990).

    (Werbos 1990, "Backpropagation through time".)

    Parameters: ``weight_x (h, d)``, ``weight_h (h, h)``, ``bias (h,)``. State: ``{"h"}``.

    Args:
      hidden: h, the number of units.
      activation: f, ``"tanh"`` or ``"relu"``.
      output, reverse, trained_state, truncate, checkpoint: as in ``bp.through_time``.

    Raises:
      ModelError: for an unknown activation.

    Example:
      >>> layer = bp.rnn(4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((10, 3)))  # (time, features)
      >>> layer.apply(params, jnp.ones((2, 10, 3))).shape
      (2, 10, 4)
    """
    whole("rnn: hidden", hidden)
    choice("rnn: activation", activation, Activation)

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
    return through_time(
        cell,
        output=output,
        reverse=reverse,
        trained_state=trained_state,
        truncate=truncate,
        checkpoint=checkpoint,
    )


@explained(
    forward="""
        z_t = W_x x_t + b + W_h h_{t−1}      (the rows of i, f, g, o one below the other)
        i = σ(z^i)   f = σ(z^f)   g = tanh(z^g)   o = σ(z^o)
        c_t = f ⊙ c_{t−1} + i ⊙ g
        h_t = o ⊙ tanh c_t""",
    backward="""
        ∂C/∂h_t ← ∂C/∂h_t + W_hᵀ δ_{t+1}
        ∂C/∂c_t = ∂C/∂c_{t+1} ⊙ f_{t+1} + ∂C/∂h_t ⊙ [o ⊙ (1 − tanh² c_t)]
        δ^i = ∂C/∂c_t ⊙ [g        ⊙ i (1 − i)]
        δ^f = ∂C/∂c_t ⊙ [c_{t−1}  ⊙ f (1 − f)]
        δ^g = ∂C/∂c_t ⊙ [i        ⊙ (1 − g²)]
        δ^o = ∂C/∂h_t ⊙ [tanh c_t ⊙ o (1 − o)]
        δ_t = [δ^i, δ^f, δ^g, δ^o]"""
    + TO_WEIGHTS,
    y="h",
)
def lstm(
    hidden: int,
    *,
    output: Output = "sequence",
    reverse: bool = False,
    trained_state: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> Layer:
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000).

    ∂c goes back through nothing but a product with f: where f ≈ 1 it neither vanishes nor grows.

    Parameters: ``weight_x (4h, d)``, ``weight_h (4h, h)``, ``bias (4h,)``, gates i, f, g, o
    (cuDNN's order). The bias starts at 0, of f at 1 (Gers et al. 2000, Józefowicz et al. 2015).
    State: ``{"h", "c"}``.

    Args:
      hidden: h, the number of units.
      output, reverse, trained_state, truncate, checkpoint: as in ``bp.through_time``.

    Example:
      >>> layer = bp.lstm(4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((10, 3)))  # (time, features)
      >>> layer.apply(params, jnp.ones((2, 10, 3))).shape
      (2, 10, 4)
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
    return through_time(
        cell,
        output=output,
        reverse=reverse,
        trained_state=trained_state,
        truncate=truncate,
        checkpoint=checkpoint,
    )


@explained(
    forward="""
        p_t = W_x x_t + b,  q_t = W_h h_{t−1}      (the rows of r, z, n one below the other)
        r = σ(p^r + q^r)   z = σ(p^z + q^z)
        m = q^n + b_n
        n = tanh(p^n + r ⊙ m)
        h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}""",
    backward="""
        ∂C/∂h_t ← ∂C/∂h_t + ∂C/∂h_{t+1} ⊙ z_{t+1} + W_hᵀ ε_{t+1}
        δ^n = ∂C/∂h_t ⊙ [(1 − z) ⊙ (1 − n²)]           ε^n = δ^n ⊙ r
        δ^z = ∂C/∂h_t ⊙ [(h_{t−1} − n) ⊙ z (1 − z)]    ε^z = δ^z
        δ^r = δ^n ⊙ [m ⊙ r (1 − r)]                    ε^r = δ^r
        δ_t = [δ^r, δ^z, δ^n],  ε_t = [ε^r, ε^z, ε^n]
        ∂C/∂x_t = W_xᵀ δ_t
        ∂C/∂W_x = Σ_t δ_t x_tᵀ,  ∂C/∂W_h = Σ_t ε_t h_{t−1}ᵀ      (BP4)
        ∂C/∂b = Σ_t δ_t,  ∂C/∂b_n = Σ_t ε^n_t      (BP3)""",
    y="h",
)
def gru(
    hidden: int,
    *,
    output: Output = "sequence",
    reverse: bool = False,
    trained_state: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> Layer:
    """Gated recurrent unit (Cho et al. 2014), r applied after the recurrent product.

    δ = ∂C/∂p and ε = ∂C/∂q differ in the rows of n alone.

    Parameters: ``weight_x (3h, d)``, ``weight_h (3h, h)``, ``bias (3h,)``, gates r, z, n, and
    ``bias_n (h,)`` (cuDNN's equations without their redundant biases). State: ``{"h"}``.

    Args:
      hidden: h, the number of units.
      output, reverse, trained_state, truncate, checkpoint: as in ``bp.through_time``.

    Example:
      >>> layer = bp.gru(4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((10, 3)))  # (time, features)
      >>> layer.apply(params, jnp.ones((2, 10, 3))).shape
      (2, 10, 4)
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
        # (Stacked, not concatenated: of four batches of one in float64 under vmap, XLA's CPU
        # compiler in jaxlib 0.10.2 reads what is concatenated here from the wrong places.)
        delta, epsilon = (
            jnp.stack([delta_r, delta_z, of_n]).reshape(-1, dh.shape[-1])
            for of_n in (delta_n, delta_n * r)
        )
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
    return through_time(
        cell,
        output=output,
        reverse=reverse,
        trained_state=trained_state,
        truncate=truncate,
        checkpoint=checkpoint,
    )
