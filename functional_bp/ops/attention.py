"""Attention as a function of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, flag, whole
from ..layers.attention import streamed
from ..layers.attention.masks import Mask
from ..layers.attention.positions import alibi_slopes
from .checks import bools, floating, integers

Tree = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    lengths: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi: bool = False,
) -> Array:
    """Attention in memory linear in the lengths, in ``jax.nn.dot_product_attention``'s layout.

    Forward:

        p_{ts} = softmax over s of q_t · k_s / √d + bias_{ts},  over the s that t may see
        o_t = Σ_s p_{ts} v_s      (each head)

    Backward:

        ∂C/∂v_s = Σ_t p_{ts} ∂C/∂o_t
        ∂C/∂e_{ts} = p_{ts} (∂C/∂o_t · v_s − ∂C/∂o_t · o_t)
        ∂C/∂q_t = Σ_s ∂C/∂e_{ts} k_s / √d,  ∂C/∂k_s = Σ_t ∂C/∂e_{ts} q_t / √d
        ∂C/∂bias_{ts} = ∂C/∂e_{ts}      (summed over those who share it)

    p is made block by block, and again on the way back, as in ``bp.attention``. A query that sees
    no key gives 0. (Vaswani et al. 2017; Dao et al. 2022.) There is a backward pass, and no forward
    mode (``jax.jvp``).

    Args:
      query: ``(…, t, heads, d)``, any leading axes.
      key, value: ``(…, s, kv_heads, d)``; fewer heads than the query's serve several each, as many
        as divide them.
      causal: whether a position sees none after it.
      window: how many positions it sees at most, its own the last (or, not causal, so many on
        either side); None for all.
      lengths: ``(…,)``, how many keys count; None for all.
      mask: bools, which keys a query sees: what broadcasts to ``(…, heads, t, s)``; None for all.
      bias: numbers added to the scores, −∞ where a key is not seen: ``(t, s)``, ``(heads, t, s)``
        or ``(…, heads, t, s)``, any axis before t also 1; None for 0.
      alibi: whether scores fall linearly with distance. (Press et al. 2022.)

    Returns:
      o, ``(…, t, heads, d)``.

    Raises:
      ModelError: for shapes that do not fit and a window below 1.

    Example:
      >>> q, kv = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 1, 8))
      >>> bp.ops.attention(q, kv, kv).shape
      (2, 5, 4, 8)
    """
    op = "ops.attention"
    query, key, value = (
        floating(f"{op}: {name}", a)
        for name, a in (("query", query), ("key", key), ("value", value))
    )
    flag(f"{op}: causal", causal)
    flag(f"{op}: alibi", alibi)
    if window is not None:
        whole(f"{op}: window", window)
    _check(op, query, key, value)
    lead = query.shape[:-3]
    if lengths is not None:
        lengths = integers(f"{op}: lengths", lengths)
        if lengths.shape not in ((), lead):
            raise ModelError(f"{op}: lengths: takes {lead}, got {lengths.shape}")
        lengths = jnp.broadcast_to(lengths, lead).reshape(-1)
    shape = (*lead, query.shape[-2], query.shape[-3], key.shape[-3])
    if mask is not None:
        mask = _of_pairs(f"{op}: mask", bools(f"{op}: mask", mask), shape, whole=False)
    if bias is not None:
        bias = _of_pairs(f"{op}: bias", floating(f"{op}: bias", bias), shape, whole=True)
    dtype = jnp.result_type(query, key, value)
    q, k, v = (a.astype(dtype).reshape(-1, *a.shape[-3:]) for a in (query, key, value))
    return _function(causal, window, alibi)(q, k, v, lengths, mask, bias).reshape(query.shape)


def _check(op: str, query: Array, key: Array, value: Array) -> None:
    if query.ndim < 3:
        raise ModelError(f"{op}: query: takes (…, t, heads, d), got {query.shape}")
    lead, (heads, d) = query.shape[:-3], query.shape[-2:]
    fits = key.ndim == query.ndim and (*key.shape[:-3], key.shape[-1]) == (*lead, d)
    if not fits or 0 in key.shape or heads % key.shape[-2]:
        raise ModelError(
            f"{op}: key: takes {(*lead, 's', 'kv_heads', d)} for a query {query.shape}, kv_heads a "
            f"divisor of {heads}, got {key.shape}"
        )
    if value.shape != key.shape:
        raise ModelError(f"{op}: value: takes the key's {key.shape}, got {value.shape}")


def _of_pairs(what: str, a: Array, shape: tuple[int, ...], *, whole: bool) -> Array:
    """What there is for each pair of positions, ``(n or 1, heads or 1, t, s)``; t and s may be 1
    too unless it must be ``whole``."""
    rank, last = len(shape), shape[-2:]
    sizes = (*(1,) * (rank - a.ndim), *a.shape)
    fits = 2 <= a.ndim <= rank and (not whole or a.shape[-2:] == last)
    if not fits or any(size not in (1, wanted) for size, wanted in zip(sizes, shape)):
        those = f"{last} of {shape}, others or 1" if whole else f"{shape}, any axis or 1"
        raise ModelError(f"{what}: takes {those}, got {a.shape}")
    if any(size > 1 for size in sizes[:-3]):
        sizes = (*shape[:-3], *sizes[-3:])
    return jnp.broadcast_to(a, sizes).reshape(-1, *sizes[-3:])


@functools.cache
def _function(causal: bool, window: int | None, alibi: bool) -> Callable[..., Array]:
    """Of q ``(n, t, heads, d)``, k and v ``(n, s, groups, d)``, and what is given for pairs."""

    def all_of(q: Array, k: Array, lengths: Array | None, *pairs: Array | None) -> Mask:
        heads, groups = q.shape[-2], k.shape[-2]
        slopes = alibi_slopes(heads).reshape(groups, -1).astype(q.dtype) if alibi else None
        mask, bias = (a if a is None else of_groups(a, groups) for a in pairs)
        return Mask(causal, window, q.shape[1], k.shape[1], lengths, slopes, bias, mask)

    def of_groups(a: Array, groups: int) -> Array:
        """``(n, heads or 1, t, s)`` to ``(n, g or 1, r or 1, t, s)``."""
        n, heads, *pairs = a.shape
        return a.reshape(n, *((1, 1) if heads == 1 else (groups, heads // groups)), *pairs)

    def in_groups(q: Array, groups: int) -> Array:
        """``(n, t, heads, d)`` to ``(n, g, r, t, d)``."""
        n, t, heads, d = q.shape
        return jnp.moveaxis(q.reshape(n, t, groups, heads // groups, d), 1, 3)

    def in_heads(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """And k and v to ``(n, g, s, d)``."""
        return in_groups(q, k.shape[-2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def out_of_groups(a: Array) -> Array:
        n, g, r, t, d = a.shape
        return jnp.moveaxis(a, 3, 1).reshape(n, t, g * r, d)

    @jax.custom_vjp
    def function(q: Array, k: Array, v: Array, *given: Array | None) -> Array:
        return forward(q, k, v, *given)[0]

    def forward(q: Array, k: Array, v: Array, *given: Array | None) -> tuple[Array, Tree]:
        o, log_sum = streamed.forward(*in_heads(q, k, v), all_of(q, k, *given))
        return out_of_groups(o), (q, k, v, given, o, log_sum)

    def backward(kept: Tree, dy: Array) -> tuple[Array | None, ...]:
        q, k, v, given, o, log_sum = kept
        of_heads, do = in_heads(q, k, v), in_groups(dy, k.shape[-2])
        dq, dk, dv, d_bias = streamed.backward(*of_heads, o, log_sum, do, all_of(q, k, *given))
        if d_bias is not None:
            d_bias = d_bias.reshape(given[-1].shape)
        dk, dv = (jnp.swapaxes(d, 1, 2) for d in (dk, dv))
        return out_of_groups(dq), dk, dv, None, None, d_bias

    function.defvjp(forward, backward)

    def called(q: Array, k: Array, v: Array, *given: Array | None) -> Array:
        return function(q, k, v, *given)

    called.__name__ = called.__qualname__ = "functional_bp.attention"
    return jax.jit(called)
