"""Attention (Vaswani et al. 2017) as a layer: its projections, heads and positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...checks import ModelError, abstract, described, flag, function, number, whole
from ...contractions import keep
from ...docstrings import explained
from ...layer import Layer
from ...rules import rule
from ..dense import Initializer, dense, lecun_normal
from . import streamed
from .masks import Mask
from .positions import alibi_slopes, rotated

Tree = Any


@explained(
    forward="""
        q_t = W_q x_t + b_q      (each head)
        k_s = W_k x_s + b_k,  v_s = W_v x_s + b_v      (s in the context, where there is one)
        p_{ts} = softmax over s of e_{ts},  e_{ts} = q_t · k_s / √(d)
        o_t = Σ_s p_{ts} v_s
        y_t = W_o o_t + b_o      (o of all heads, one below the other)""",
    backward="""
        ∂C/∂o_t = W_oᵀ ∂C/∂y_t
        ∂C/∂v_s = Σ_t p_{ts} ∂C/∂o_t
        ∂C/∂e_{ts} = p_{ts} (∂C/∂o_t · v_s − ∂C/∂o_t · o_t)
        ∂C/∂q_t = Σ_s ∂C/∂e_{ts} k_s / √(d),  ∂C/∂k_s = Σ_t ∂C/∂e_{ts} q_t / √(d)
        ∂C/∂x_t = W_qᵀ ∂C/∂q_t + W_kᵀ ∂C/∂k_t + W_vᵀ ∂C/∂v_t
        ∂C/∂W_q = Σ_t ∂C/∂q_t x_tᵀ,  and so for W_k, W_v and W_o      (BP4)
        ∂C/∂b_q = Σ_t ∂C/∂q_t,  and so for b_k, b_v and b_o      (BP3)""",
)
def attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    causal: bool = True,
    window: int | None = None,
    rotary: float | None = None,
    alibi: bool = False,
    size: int | None = None,
    bias: bool = True,
    weight_init: Initializer = lecun_normal,
) -> Layer:
    """Attention of a sequence to itself, or to another one, in memory linear in its length.

    p is made block by block, and again on the way back from Σ_s e^{e_ts}, of which the logarithm is
    kept: a matrix of all positions is never there, and blocks that nobody may see are not computed.
    (Vaswani et al. 2017; Dao et al. 2022.)

    The input is ``(t, features)``, or a dict of

        x               (t, features)
        length          an integer: the positions from there on are padding, which nobody sees
        context         (s, features'), what is attended to in place of x
        context_length  of it
        mask            bools (t, s): which of the s positions, by column, each of the t may see
        bias            (t, s) or (heads, t, s): is added to e, and has a gradient; −∞ is not seen

    of which all but ``x`` may be left out; the output is an array for an array, else the dict with
    the output in place of ``x``. Where no position counts, o is 0.

    Parameters: ``query``, ``key``, ``value`` and ``output``, each as ``bp.dense``'s.

    Args:
      heads: the number of heads.
      kv_heads: of keys and values; fewer than ``heads`` serve several heads each (grouped-query,
        and with 1 multi-query attention). None for as many.
      causal: whether a position sees none after it.
      window: how many positions it sees at most, its own the last (or, not causal, so many on
        either side); None for all.
      rotary: the base of rotary positions, such as 10,000; None for none.
      alibi: whether scores fall linearly with distance.
      size: d, the features of a head; features / heads if not given.
      bias: whether the projections have biases.
      weight_init: of the projections, as ``bp.dense``'s.

    Raises:
      ModelError: for heads that do not divide, a window below 1, and where the input or the
        parameters do not fit.

    Example:
      >>> layer = bp.attention(2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((5, 4)))
      >>> layer.apply(params, jnp.ones((3, 5, 4))).shape
      (3, 5, 4)
    """
    whole("attention: heads", heads)
    groups = whole("attention: kv_heads", heads if kv_heads is None else kv_heads)
    if heads % groups:
        raise ModelError(f"attention: kv_heads: takes a divisor of {heads} heads, got {groups}")
    flag("attention: causal", causal)
    flag("attention: alibi", alibi)
    flag("attention: bias", bias)
    function("attention: weight_init", weight_init)
    if window is not None:
        whole("attention: window", window)
    if rotary is not None:
        number("attention: rotary", rotary, above=1)
    if size is not None:
        whole("attention: size", size)
    of = _Attention(heads, groups, causal, window, rotary, alibi, size, bias, weight_init)
    given = {"kv_heads": kv_heads, "window": window, "rotary": rotary, "size": size}
    said = [f"{name}={value}" for name, value in given.items() if value is not None]
    said += [f"causal={causal}"] * (not causal) + ["alibi=True"] * alibi
    said += ["bias=False"] * (not bias)
    return rule(
        of.init,
        of.forward,
        of.backward,
        name=f"attention({', '.join([str(heads), *said])})",
        check=of.check,
        reference=of.reference,
        batched=True,
    )


@dataclass(frozen=True)
class _Attention:
    heads: int
    groups: int
    causal: bool
    window: int | None
    rotary: float | None
    alibi: bool
    size: int | None
    bias: bool
    weight_init: Initializer

    def projections(self, features: int) -> dict[str, Layer]:
        d = self.features_of_head(features)
        sizes = {"query": self.heads * d, "key": self.groups * d, "value": self.groups * d}
        how: Any = {"bias": self.bias, "weight_init": self.weight_init}
        return {n: dense(s, **how) for n, s in (sizes | {"output": features}).items()}

    def features_of_head(self, features: int) -> int:
        return features // self.heads if self.size is None else self.size

    def check(self, params: Tree, x: Tree) -> None:
        inputs = _as_tree(x)
        for name in ("x", "context"):
            a = inputs.get(name)
            if a is not None and (getattr(a, "ndim", 0) != 2 or not _floating(a)):
                raise ModelError(f"takes {name} of shape (t, features), got {described(a)}")
        self._check_pairs(inputs)
        features = inputs["x"].shape[-1]
        if self.size is None and features % self.heads:
            raise ModelError(f"takes features that {self.heads} heads divide, got {features}")
        if self.rotary is not None and self.features_of_head(features) % 2:
            raise ModelError(
                "takes heads of an even size for rotary positions, got "
                f"{self.features_of_head(features)}"
            )
        if "context" in inputs and self.causal:
            raise ModelError("takes no context where it is causal; say causal=False")
        names = {"query", "key", "value", "output"}
        if params is not None and (not isinstance(params, dict) or set(params) != names):
            raise ModelError(f"takes parameters {sorted(names)}, got {described(params)}")

    def _check_pairs(self, inputs: Tree) -> None:
        """What there is for every pair of positions."""
        pairs = len(inputs["x"]), len(inputs.get("context", inputs["x"]))
        mask, bias = inputs.get("mask"), inputs.get("bias")
        if mask is not None and (mask.shape != pairs or mask.dtype != bool):
            raise ModelError(f"takes a mask of bools {pairs}, got {described(mask)}")
        shapes = pairs, (self.heads, *pairs)
        if bias is not None and (bias.shape not in shapes or not _floating(bias)):
            raise ModelError(f"takes a bias of {shapes[0]} or {shapes[1]}, got {described(bias)}")
        for name, count in zip(("length", "context_length"), pairs):
            length = inputs.get(name)
            if length is not None and not (
                getattr(length, "shape", None) == () and jnp.issubdtype(length.dtype, jnp.integer)
            ):
                raise ModelError(
                    f"takes {name} as an integer up to {count}, got {described(length)}"
                )

    def init(self, key: Array, x: Tree) -> Tree:
        inputs = _as_tree(x)
        self.check(None, inputs)
        x_, context = inputs["x"], inputs.get("context", inputs["x"])
        features = x_.shape[-1]
        layers = self.projections(features)
        together = abstract((self.heads * self.features_of_head(features),), x_.dtype)
        of = {"query": x_, "key": context, "value": context, "output": together}
        keys = jax.random.split(key, len(of))
        return {n: layers[n].init(k, of[n]) for n, k in zip(of, keys)}

    def forward(self, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        inputs = _as_tree(x)
        layers = self.projections(inputs["x"].shape[-1])
        q, k, v = self._projected(layers, params, inputs)
        o, log_sum = streamed.forward(q, k, v, self._mask(inputs))
        y, together = layers["output"].forward(params["output"], _together(o))
        return _as_input(x, y), (inputs, q, k, v, o, log_sum, together)

    def backward(self, params: Tree, residuals: Tree, dy: Tree) -> tuple[Tree, Tree]:
        inputs, q, k, v, o, log_sum, together = residuals
        layers = self.projections(inputs["x"].shape[-1])
        factors = {}

        def back(name: str, taken: Array, delta: Array) -> Array:
            d_in, factors[name] = layers[name].backward(params[name], taken, delta, keep)
            return d_in

        do = self._heads(back("output", together, _as_tree(dy)["x"]), o.shape)
        dq, dk, dv, d_bias = streamed.backward(q, k, v, o, log_sum, do, self._mask(inputs))
        if self.rotary is not None:
            dq, dk = (rotated(d, self.rotary, back=True) for d in (dq, dk))
        x, context = inputs["x"], inputs.get("context", inputs["x"])
        dx = back("query", x, _together(dq))
        d_context = back("key", context, _side_by_side(dk)) + back(
            "value", context, _side_by_side(dv)
        )
        dx = _input_deltas(inputs, dy, dx, d_context)
        if d_bias is not None:
            dx["bias"] = dy["bias"] + d_bias.reshape(inputs["bias"].shape)
        return dx, factors

    def _projected(self, layers: Any, params: Tree, inputs: Tree) -> tuple[Array, Array, Array]:
        """q ``(n, g, r, t, d)``, k and v ``(n, g, s, d)``, with their positions in them."""
        x, context = inputs["x"], inputs.get("context", inputs["x"])
        d = self.features_of_head(x.shape[-1])
        n, t, s = x.shape[0], x.shape[1], context.shape[1]
        q, k, v = (
            layers[name].forward(params[name], of)[0]
            for name, of in (("query", x), ("key", context), ("value", context))
        )
        q = self._heads(q, (n, self.groups, self.heads // self.groups, t, d))
        k, v = (jnp.swapaxes(a.reshape(n, s, self.groups, d), 1, 2) for a in (k, v))
        if self.rotary is not None:
            q, k = rotated(q, self.rotary), rotated(k, self.rotary)
        return q, k, v

    @staticmethod
    def _heads(a: Array, shape: tuple[int, ...]) -> Array:
        """``(n, t, g r d)`` to ``(n, g, r, t, d)``."""
        n, g, r, t, d = shape
        return jnp.moveaxis(a.reshape(n, t, g, r, d), 1, 3)

    def _mask(self, inputs: Tree) -> Mask:
        x, context = inputs["x"], inputs.get("context", inputs["x"])
        lengths = inputs.get("context_length" if "context" in inputs else "length")
        slopes = None
        if self.alibi:
            slopes = alibi_slopes(self.heads).reshape(self.groups, -1).astype(x.dtype)
        mask = Mask(self.causal, self.window, x.shape[1], context.shape[1], lengths, slopes)
        bias, allowed = inputs.get("bias"), inputs.get("mask")
        if bias is not None:
            of_heads = (self.groups, self.heads // self.groups) if bias.ndim == 4 else (1, 1)
            mask = mask._replace(bias=bias.reshape(len(x), *of_heads, *bias.shape[-2:]))
        return mask if allowed is None else mask._replace(allowed=allowed[:, None, None])

    def reference(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """The textbook formula, with a matrix of all queries and keys."""
        inputs = _as_tree(x)
        layers = self.projections(inputs["x"].shape[-1])
        q, k, v = self._projected(layers, params, inputs)
        s = jnp.einsum("ngkd,ngrqd->ngkrq", k, q) / math.sqrt(q.shape[-1])
        s, counts = self._mask(inputs).scored(s, 0, 0)
        seen = counts.any(2, keepdims=True)
        p = jax.nn.softmax(jnp.where(counts, s, jnp.where(seen, -jnp.inf, 0)), axis=2)
        o = jnp.einsum("ngkrq,ngkd->ngrqd", jnp.where(seen, p, 0), v)
        return _as_input(x, layers["output"].forward(params["output"], _together(o))[0])


def _as_tree(x: Tree) -> Tree:
    return x if isinstance(x, dict) else {"x": x}


def _as_input(x: Tree, y: Array) -> Tree:
    return {**x, "x": y} if isinstance(x, dict) else y


def _input_deltas(inputs: Tree, dy: Tree, dx: Array, d_context: Array) -> Tree:
    """∂C/∂ the input: to itself, both meet in x; a context also has what comes from above."""
    if "context" not in inputs:
        dx = dx + d_context
        return {**dy, "x": dx} if isinstance(dy, dict) else dx
    return {**dy, "x": dx, "context": dy["context"] + d_context}


def _together(a: Array) -> Array:
    """``(n, g, r, t, d)`` to ``(n, t, g r d)``: all heads side by side."""
    n, _, _, t, _ = a.shape
    return jnp.moveaxis(a, 3, 1).reshape(n, t, -1)


def _side_by_side(a: Array) -> Array:
    """``(n, g, s, d)`` to ``(n, s, g d)``."""
    n, _, s, _ = a.shape
    return jnp.swapaxes(a, 1, 2).reshape(n, s, -1)


def _floating(a: Any) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))
