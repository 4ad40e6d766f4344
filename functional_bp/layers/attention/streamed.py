"""Attention of arrays, block by block: no matrix of all queries and keys is ever there.

    s = q kᵀ / √d,  p = softmax over the keys that count,  o = p v
    λ = log Σ_k e^s                                     kept, one number for each query

    D = Σ_d ∂C/∂o ⊙ o = Σ_k ∂C/∂p ⊙ p
    p = e^{s − λ}                                       made anew, block by block
    ∂C/∂v = pᵀ ∂C/∂o,   ∂C/∂s = p ⊙ (∂C/∂o vᵀ − D)
    ∂C/∂q = ∂C/∂s k / √d,   ∂C/∂k = ∂C/∂sᵀ q / √d,   ∂C/∂bias = ∂C/∂s

(The softmax's derivative: ∂C/∂s_j = p_j (∂C/∂p_j − Σ_k p_k ∂C/∂p_k). Dao et al. 2022, Milakov &
Gimelshein 2018.) Blocks that the mask excludes are not computed. A query that sees no key gives 0.

Axes: n examples, g groups of heads that share keys, r heads of a group, q queries, k keys, d
features of a head.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...factors.factored import accumulator
from .masks import Mask

BLOCK = 128  # of queries and keys on a CPU, and half of it where there are many heads
HEADS = 16  # of all examples together, from which on the scores of a block do not fit in a cache
ELSEWHERE = 512  # on a GPU, where each step of a loop waits for its kernels to be launched
LOW = -1e30  # below every score; twice that is finite, too


def forward(q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    """o ``(n, g, r, q, d)`` and λ ``(n, g, r, q)``, of q ``(n, g, r, q, d)`` and k, v
    ``(n, g, k, d)``."""
    block, (q, k, v) = _in_blocks(mask, q / math.sqrt(q.shape[-1]), k, v)
    mask, dtype = mask.filled(block), accumulator(q)

    def of_queries(i: Array | int) -> tuple[Array, Array]:
        q_i = _block(q, i, block)

        def step(j: Array | int, carried: tuple[Array, ...]) -> tuple[Array, ...]:
            highest, total, sums = carried
            s, counts = mask.scored(_scores(q_i, _block(k, j, block)), i * block, j * block)
            s = jnp.where(counts, s, 2 * LOW)
            new = jnp.maximum(highest, s.max(-1))
            p = jnp.exp(s - new[..., None])  # 0 where a key does not count: new is LOW at least
            shrunk = jnp.exp(highest - new)
            more = _product("ngrqk,ngkd->ngrqd", p.astype(v.dtype), _block(v, j, block))
            return new, total * shrunk + p.sum(-1), sums * shrunk[..., None] + more

        shape = q_i.shape[:-1]
        none = jnp.full(shape, LOW, dtype), jnp.zeros(shape, dtype), jnp.zeros(q_i.shape, dtype)
        highest, total, sums = _loop(*mask.keys_of(i, block), step, none)
        seen = jnp.where(total > 0, total, 1)
        return (sums / seen[..., None]).astype(v.dtype), highest + jnp.log(seen)

    o, log_sum = _each(of_queries, q.shape[-2] // block)
    return _joined(o, mask.queries), _joined(log_sum[..., None], mask.queries)[..., 0]


def backward(
    q: Array, k: Array, v: Array, o: Array, log_sum: Array, do: Array, mask: Mask
) -> tuple[Array, Array, Array, Array | None]:
    """∂C/∂ q, k and v, given ∂C/∂o; and ∂C/∂ the mask's bias, if it has one."""
    scale = 1 / math.sqrt(q.shape[-1])
    D = (o.astype(log_sum.dtype) * do).sum(-1)
    block, (q, k, v, do, log_sum, D) = _in_blocks(
        mask, q * scale, k, v, do, log_sum[..., None], D[..., None]
    )
    mask, dtype = mask.filled(block), accumulator(q)

    def of_keys(carried: Any, j: Array | int) -> tuple[Any, tuple[Array, Array]]:
        k_j, v_j = _block(k, j, block), _block(v, j, block)

        def step(i: Array | int, carried: Any) -> Any:
            dk, dv, (dq, d_bias) = carried
            q_i, do_i = _block(q, i, block), _block(do, i, block)
            s, counts = mask.scored(_scores(q_i, k_j), i * block, j * block)
            p = jnp.exp(jnp.where(counts, s - _block(log_sum, i, block), 2 * LOW))
            dp = _product("ngrqd,ngkd->ngrqk", do_i, v_j)
            ds = p * (dp - _block(D, i, block))
            if d_bias is not None:
                d_bias = _put(d_bias, ds, i * block, j * block)
            p, ds = p.astype(v.dtype), ds.astype(q.dtype)
            dv = dv + _product("ngrqk,ngrqd->ngkd", p, do_i)
            dk = dk + _product("ngrqk,ngrqd->ngkd", ds, q_i)
            dq_i = _block(dq, i, block) + _product("ngrqk,ngkd->ngrqd", ds, k_j)
            dq = lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, -2)
            return dk, dv, (dq, d_bias)

        none = jnp.zeros(k_j.shape, dtype), jnp.zeros(v_j.shape, dtype), carried
        dk, dv, carried = _loop(*mask.queries_of(j, block), step, none)
        return carried, (dk, dv)

    d_bias = None if mask.bias is None else jnp.zeros(mask.bias.shape, dtype)
    carried, count = (jnp.zeros(q.shape, dtype), d_bias), k.shape[-2] // block
    if count == 1:
        (dq, d_bias), (dk, dv) = of_keys(carried, 0)
    else:
        (dq, d_bias), (dk, dv) = lax.scan(of_keys, carried, jnp.arange(count))
        dk, dv = _joined(dk, mask.keys), _joined(dv, mask.keys)
    dq, dk, dv = dq[..., : mask.queries, :], dk[..., : mask.keys, :], dv[..., : mask.keys, :]
    if mask.bias is not None and d_bias is not None:
        d_bias = d_bias[..., : mask.queries, : mask.keys].astype(mask.bias.dtype)
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


def _put(d_bias: Array, ds: Array, i: Array | int, j: Array | int) -> Array:
    """∂C/∂bias with what it is for one block: the sum over the heads that have it together."""
    shared = [axis for axis in (1, 2) if d_bias.shape[axis] == 1]
    ds = ds.sum(shared, keepdims=True)
    return lax.dynamic_update_slice(d_bias, ds, (0, 0, 0, i, j))


def _in_blocks(mask: Mask, *arrays: Array) -> tuple[int, list[Array]]:
    """The size of a block, and the arrays filled up with zeros to whole blocks."""
    block = BLOCK // 2 if math.prod(arrays[0].shape[:-2]) > HEADS else BLOCK
    if jax.default_backend() != "cpu":
        block = ELSEWHERE
    block = min(block, max(mask.queries, mask.keys))
    return block, [_filled(a, block) for a in arrays]


def _filled(a: Array, block: int) -> Array:
    missing = -a.shape[-2] % block
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, missing), (0, 0)]) if missing else a


def _block(a: Array, i: Array | int, block: int) -> Array:
    return a if a.shape[-2] == block else lax.dynamic_slice_in_dim(a, i * block, block, -2)


def _scores(q: Array, k: Array) -> Array:
    return _product("ngrqd,ngkd->ngrqk", q, k)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=accumulator(a, b))


def _loop(first: Array | int, end: Array | int, step, carried):  # type: ignore[no-untyped-def]
    """A loop whose bounds the mask gives; one step alone needs none."""
    if isinstance(first, int) and isinstance(end, int) and end - first == 1:
        return step(first, carried)
    return lax.fori_loop(first, end, step, carried)


def _each(of_block, count: int):  # type: ignore[no-untyped-def]
    """What there is for each block, the blocks on a new first axis."""
    if count == 1:
        return tuple(a[None] for a in of_block(0))
    return lax.map(of_block, jnp.arange(count))


def _joined(blocks: Array, length: int) -> Array:
    """``(blocks, …, block, d)`` to ``(…, length, d)``."""
    rows = jnp.moveaxis(blocks, 0, -3)
    return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])[..., :length, :]
