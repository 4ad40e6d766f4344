"""Writing with a decoder: each id costs one step, because keys and values before it are kept.

Axes: n texts, t new positions, s all positions, g heads of keys and values, r queries' heads for
each, d features of a head.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from decoder import Sizes
from jax import Array, lax

import functional_bp as bp

Tree = Any


class Cache(NamedTuple):
    """Keys and values of every layer, ``(layers, n, s, g, d)``, and how many s are filled."""

    keys: Array
    values: Array
    filled: Array | int


class Reading(NamedTuple):
    """Of new ids: their logits ``(n, t, vocabulary)``, what is kept now, and the attention p of
    every layer and head, ``(layers, n, heads, t, s)``."""

    logits: Array
    cache: Cache
    attention: Array


def empty(sizes: Sizes, params: Tree, n: int) -> Cache:
    """For ``n`` texts of as many positions as the decoder has."""
    d = sizes.features // sizes.heads
    shape = sizes.layers, n, sizes.positions, sizes.kv_heads or sizes.heads, d
    zeros = jnp.zeros(shape, params[0]["weight"].dtype)
    return Cache(zeros, zeros, 0)


def read(sizes: Sizes, params: Tree, ids: Array, cache: Cache) -> Reading:
    """The decoder on ids ``(n, t)`` that follow those of a cache, which holds them afterwards.

    There must be place for them: ``cache.filled`` + t positions at most.
    """
    if ids.shape[1] > sizes.positions:
        raise bp.ModelError(f"read: takes up to {sizes.positions} ids, got {ids.shape[1]}")
    embedding, learned, _, blocks, norm = params
    at = cache.filled + jnp.arange(ids.shape[1])
    a = embedding["weight"][ids]
    a = a if sizes.rotary is not None else a + learned["weight"][at]

    def block(a: Array, of_layer: Tree) -> tuple[Array, Tree]:
        (((of_norm, of_heads, _), _), ((of_norm_2, up, _, down, _), _)), keys, values = of_layer
        x = bp.layer_norm().apply(of_norm, a)
        o, *kept = _attended(sizes, of_heads, x, at, keys, values)
        a = a + o
        x = bp.layer_norm().apply(of_norm_2, a)
        x = _dense(down, bp.gelu_tanh.apply((), _dense(up, x)))
        return a + x, kept

    a, (keys, values, p) = lax.scan(block, a, (blocks, cache.keys, cache.values))
    logits = bp.layer_norm().apply(norm, a) @ embedding["weight"].T
    return Reading(logits, Cache(keys, values, cache.filled + ids.shape[1]), p)


def _attended(
    sizes: Sizes, params: Tree, x: Array, at: Array, keys: Array, values: Array
) -> tuple[Array, Array, Array, Array]:
    """What attention gives at positions ``at``; keys, values with the new ones; p."""
    n, t, _ = x.shape
    g, d = keys.shape[-2:]
    q, k, v = (_dense(params[name], x).reshape(n, t, -1, d) for name in ("query", "key", "value"))
    if sizes.rotary is not None:
        q, k = _rotated(q, sizes.rotary, at), _rotated(k, sizes.rotary, at)
    keys = lax.dynamic_update_slice_in_dim(keys, k, at[0], 1)
    values = lax.dynamic_update_slice_in_dim(values, v, at[0], 1)
    q = q.reshape(n, t, g, -1, d)
    e = jnp.einsum("ntgrd,nsgd->ngrts", q, keys) / math.sqrt(d)
    seen = jnp.arange(keys.shape[1]) <= at[:, None]
    p = jax.nn.softmax(jnp.where(seen, e, -jnp.inf))
    o = jnp.einsum("ngrts,nsgd->ntgrd", p, values).reshape(n, t, -1)
    return _dense(params["output"], o), keys, values, p.reshape(n, -1, *p.shape[-2:])


def _rotated(x: Array, base: float, at: Array) -> Array:
    """At position t the pair (x_i, x_{i + d/2}) turned by t base^{−2i/d}; x is ``(n, t, g, d)``."""
    half = x.shape[-1] // 2
    rate = jnp.asarray(base, x.dtype) ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = at.astype(x.dtype)[:, None, None] * rate
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _dense(params: Tree, x: Array) -> Array:
    return bp.dense(params["bias"].shape[0]).apply(params, x)


def chosen(logits: Array, top_k: int | None = None, top_p: float = 1.0) -> Array:
    """Logits ``(…, vocabulary)``, −∞ for the ids that are never drawn.

    First the ``top_k`` likeliest stay. Of these, as a distribution of their own, the fewest stay
    that together have a probability of at least ``top_p``. Of equal ones the first go in front.
    (Fan et al. 2018; Holtzman et al. 2020, nucleus sampling.)
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    falling = jnp.take_along_axis(logits, order, -1)
    if top_k is not None:
        falling = jnp.where(jnp.arange(falling.shape[-1]) < top_k, falling, -jnp.inf)
    p = jax.nn.softmax(falling)
    likelier = jnp.cumsum(p, -1) - p  # the probability of all in front
    if top_p < 1:
        falling = jnp.where(likelier < top_p, falling, -jnp.inf)
    return jnp.take_along_axis(falling, rank, -1)


@functools.partial(jax.jit, static_argnames=("sizes", "count", "top_k", "top_p"))
def _continued(
    sizes: Sizes,
    params: Tree,
    ids: Array,
    key: Array,
    temperature: float,
    *,
    count: int,
    top_k: int | None,
    top_p: float,
) -> Array:
    """``count`` ids ``(n, count)`` after ids ``(n, t)``, which are read at once."""

    def draw(logits: Array, i: Array | int) -> Array:
        kept = chosen(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, i), kept).astype(ids.dtype)

    def step(carried: tuple[Cache, Array], i: Array) -> tuple[tuple[Cache, Array], Array]:
        cache, last = carried
        reading = read(sizes, params, last[:, None], cache)
        new = draw(reading.logits[:, -1], i)
        return (reading.cache, new), new

    reading = read(sizes, params, ids, empty(sizes, params, ids.shape[0]))
    first = draw(reading.logits[:, -1], 0)
    cache = reading.cache._replace(filled=jnp.asarray(reading.cache.filled))
    _, rest = lax.scan(step, (cache, first), jnp.arange(1, count))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def write(
    sizes: Sizes,
    params: Tree,
    ids: Array | np.ndarray,
    count: int,
    key: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> np.ndarray:
    """``count`` ids ``(n, count)`` after ids ``(n, t)``, each drawn given those before it.

        k_t ~ softmax(logits / temperature), of ``chosen`` ones; ``top_k=1`` takes the likeliest

    Where all positions are filled, the later half of them is read anew as if nothing was before,
    and writing goes on from there: each id is drawn given half as many before it at least.
    """
    ids = jnp.asarray(ids)[:, -sizes.positions :]
    written: list[np.ndarray] = []
    while (done := sum(part.shape[1] for part in written)) < count:
        if written:
            ids = jnp.concatenate([ids, written[-1]], 1)[:, -((sizes.positions + 1) // 2) :]
        part = _continued(
            sizes,
            params,
            ids,
            jax.random.fold_in(key, done),
            temperature,
            count=min(count - done, sizes.positions - ids.shape[1] + 1),
            top_k=top_k,
            top_p=top_p,
        )
        written.append(np.asarray(part))
    return np.concatenate(written, axis=1)


def attention(sizes: Sizes, params: Tree, ids: Array | np.ndarray) -> Array:
    """p of every layer and head, ``(layers, heads, t, t)``, of one text ``(t,)``."""
    reading = read(sizes, params, jnp.asarray(ids)[None], empty(sizes, params, 1))
    return reading.attention[:, 0, :, :, : len(ids)]
