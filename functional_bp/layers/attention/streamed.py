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
features of a head, m the queries of a block for all r heads, one head's after another's. A block of
scores is ``(n, g, k, m)``, sᵀ: of its seven products, those with p and ∂C/∂s then take these as
they lie, and only k and v are turned, once for each block.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...factors.factored import accumulator
from .masks import Mask

# Queries and keys of a block: as many, from LEAST to MOST, as make its scores at most twice as many
# as the numbers in q, so that memory is linear in the length. A CPU gives a large product to all
# its cores and a small one to one, but the scores of many heads (of all examples together) fit in
# no cache, and their blocks stay at FEW. On a GPU, where each step of a loop waits for its kernels
# to be launched, MOST.
LEAST, FEW, MOST = 64, 128, 512
HEADS = 16
LOW = -1e30  # below every score; twice that is finite, too


def forward(q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    """o ``(n, g, r, q, d)`` and λ ``(n, g, r, q)``, of q ``(n, g, r, q, d)`` and k, v
    ``(n, g, k, d)``."""
    block, (q, k, v) = _in_blocks(mask, q / math.sqrt(q.shape[-1]), k, v)
    mask, dtype, v = mask.filled(block), accumulator(q), jnp.swapaxes(v, 2, 3)
    n, g, r, _, d = q.shape
    scores = functools.partial(_scores, mask, r, block)

    def of_queries(i: Array | int) -> tuple[Array, Array]:
        q_i = _rows(q, i, block)

        def step(j: Array | int, carried: tuple[Array, ...]) -> tuple[Array, ...]:
            highest, total, sums = carried
            s = scores(_block(k, j, block), q_i, i, j)
            new = jnp.maximum(highest, s.max(2, keepdims=True))
            p = jnp.exp(s - new)  # 0 where a key does not count: new is LOW at least
            shrunk = jnp.exp(highest - new)
            more = _product("ngdk,ngkm->ngdm", _block(v, j, block, -1), p.astype(v.dtype))
            return new, total * shrunk + p.sum(2, keepdims=True), sums * shrunk + more

        low = jnp.full((n, g, 1, r * block), LOW, dtype)
        none = low, jnp.zeros_like(low), jnp.zeros((n, g, d, r * block), dtype)
        highest, total, sums = _loop(*mask.keys_of(i, block), step, none)
        seen = jnp.where(total > 0, total, 1)
        return (sums / seen).astype(v.dtype), highest + jnp.log(seen)

    o, log_sum = _each(of_queries, q.shape[-2] // block)
    return _joined(o, r, mask.queries), _joined(log_sum, r, mask.queries)[..., 0]


def backward(
    q: Array, k: Array, v: Array, o: Array, log_sum: Array, do: Array, mask: Mask
) -> tuple[Array, Array, Array, Array | None]:
    """∂C/∂ q, k and v, given ∂C/∂o; and ∂C/∂ the mask's bias, if it has one."""
    scale = 1 / math.sqrt(q.shape[-1])
    D = _product("ngrqd,ngrqd->ngrq", o, do)
    block, (q, k, v, do, log_sum, D) = _in_blocks(
        mask, q * scale, k, v, do, log_sum[..., None], D[..., None]
    )
    mask, dtype = mask.filled(block), accumulator(q)
    n, g, r, queries, d = q.shape
    scores = functools.partial(_scores, mask, r, block)

    def of_keys(carried: Any, j: Array | int) -> tuple[Any, tuple[Array, Array]]:
        k_j, v_j = _block(k, j, block), _block(v, j, block)

        def step(i: Array | int, carried: Any) -> Any:
            dk, dv, (dq, d_bias) = carried
            q_i, do_i, log_sum_i, D_i = (_rows(a, i, block) for a in (q, do, log_sum, D))
            p = jnp.exp(scores(k_j, q_i, i, j) - jnp.swapaxes(log_sum_i, 2, 3))
            ds = p * (_product("ngkd,ngmd->ngkm", v_j, do_i) - jnp.swapaxes(D_i, 2, 3))
            if d_bias is not None:
                d_bias = _put(d_bias, ds.reshape(n, g, -1, r, block), i * block, j * block)
            p, ds = p.astype(v.dtype), ds.astype(q.dtype)
            dv = dv + _product("ngkm,ngmd->ngkd", p, do_i)
            dk = dk + _product("ngkm,ngmd->ngkd", ds, q_i)
            more = _product("ngkd,ngkm->ngdm", k_j, ds).reshape(n, g, d, r, block)
            more = _block(dq, i, block, -1) + more
            dq = lax.dynamic_update_slice_in_dim(dq, more, i * block, -1)
            return dk, dv, (dq, d_bias)

        none = jnp.zeros(k_j.shape, dtype), jnp.zeros(v_j.shape, dtype), carried
        dk, dv, carried = _loop(*mask.queries_of(j, block), step, none)
        return carried, (dk, dv)

    d_bias = None if mask.bias is None else jnp.zeros(mask.bias.shape, dtype)
    carried, count = (jnp.zeros((n, g, d, r, queries), dtype), d_bias), k.shape[-2] // block
    if count == 1:
        (dq, d_bias), (dk, dv) = of_keys(carried, 0)
    else:
        (dq, d_bias), (dk, dv) = lax.scan(of_keys, carried, jnp.arange(count))
        dk, dv = (jnp.moveaxis(a, 0, 2).reshape(k.shape) for a in (dk, dv))
    dq = jnp.moveaxis(dq, 2, -1)[..., : mask.queries, :]
    dk, dv = dk[..., : mask.keys, :], dv[..., : mask.keys, :]
    if mask.bias is not None and d_bias is not None:
        d_bias = d_bias[..., : mask.queries, : mask.keys].astype(mask.bias.dtype)
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


def _put(d_bias: Array, ds: Array, i: Array | int, j: Array | int) -> Array:
    """∂C/∂bias with what it is for one block: the sum over the heads that have it together."""
    shared = [axis for axis in (0, 1, 2) if d_bias.shape[axis] == 1]
    ds = jnp.moveaxis(ds, 2, -1).sum(shared, keepdims=True)
    return lax.dynamic_update_slice(d_bias, ds, (0, 0, 0, i, j))


def _in_blocks(mask: Mask, q: Array, *arrays: Array) -> tuple[int, list[Array]]:
    """The size of a block, and the arrays filled up with zeros to whole blocks."""
    *heads, length, d = q.shape
    block = max(LEAST, min(MOST, 1 << math.isqrt(2 * length * d).bit_length() - 1))
    if jax.default_backend() != "cpu":
        block = MOST
    elif math.prod(heads) > HEADS:
        block = min(block, FEW)
    block = min(block, max(mask.queries, mask.keys))
    return block, [_filled(a, block) for a in (q, *arrays)]


def _filled(a: Array, block: int) -> Array:
    missing = -a.shape[-2] % block
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, missing), (0, 0)]) if missing else a


def _block(a: Array, i: Array | int, block: int, axis: int = -2) -> Array:
    return a if a.shape[axis] == block else lax.dynamic_slice_in_dim(a, i * block, block, axis)


def _rows(a: Array, i: Array | int, block: int) -> Array:
    """A block of ``(n, g, r, queries, d)``, the queries of a group's heads one below the other."""
    n, g, _, _, d = a.shape
    return _block(a, i, block).reshape(n, g, -1, d)


def _scores(mask: Mask, r: int, block: int, k: Array, q: Array, i, j) -> Array:  # type: ignore[no-untyped-def]
    """Of the keys of block j and the queries of block i, very low where a key does not count."""
    s = _product("ngkd,ngmd->ngkm", k, q)
    added, counts = mask.scored(s.reshape(*s.shape[:3], r, block), i * block, j * block)
    return jnp.where(counts, added, 2 * LOW).reshape(s.shape)


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


def _joined(blocks: Array, r: int, queries: int) -> Array:
    """``(blocks, n, g, d, r block)`` to ``(n, g, r, queries, d)``."""
    count, n, g, d, m = blocks.shape
    rows = jnp.transpose(blocks.reshape(count, n, g, d, r, m // r), (1, 2, 4, 0, 5, 3))
    return rows.reshape(n, g, r, -1, d)[..., :queries, :]
