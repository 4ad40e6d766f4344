"""GPTs for comparison: by hand, the same in plain JAX, and in Flax, Equinox and PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

Tree = Any
CHUNK = 128  # queries of attention, positions of a loss


class Sizes(NamedTuple):
    """Of a GPT and a batch."""

    layers: int
    width: int
    length: int
    vocabulary: int
    examples: int
    heads: int

    def __str__(self) -> str:
        return ", ".join(f"{n:,}" for n in self[:5])

    @property
    def operations(self) -> int:
        """In matrix products, forward and back, each once; of attention half the positions."""
        weights = self.layers * 12 * self.width**2 + self.vocabulary * self.width
        scores = self.layers * self.width * self.length
        return 6 * self.examples * self.length * (weights + scores)


def block(sizes: Sizes) -> bp.Layer:
    mlp = bp.chain(bp.layer_norm(), bp.dense(4 * sizes.width), bp.gelu_tanh, bp.dense(sizes.width))
    attention = bp.chain(bp.layer_norm(), bp.attention(sizes.heads, bias=False))
    return bp.chain(bp.residual(attention), bp.residual(mlp))


def by_hand(sizes: Sizes) -> tuple[bp.Layer, bp.losses.Loss]:
    model = bp.chain(
        bp.embedding(sizes.vocabulary, sizes.width, weight_init=jax.nn.initializers.normal(0.02)),
        bp.positions(sizes.length),
        bp.repeat(block(sizes), sizes.layers),
        bp.layer_norm(),
    )
    loss = bp.losses.linear_softmax_cross_entropy(sizes.vocabulary)
    return model, bp.tied(loss, {(1, "weight"): (0, 0, "weight")})


def inputs(sizes: Sizes) -> tuple[Tree, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.examples, sizes.length)
    x, y = (jax.random.randint(key, shape, 0, sizes.vocabulary) for key in keys[:2])
    model, loss = by_hand(sizes)
    return jax.jit(lambda key: bp.init(model, loss, key, x[0], y[0]))(keys[2]), x, y


# ---- the same in plain JAX


def of_arrays(q: Array, k: Array, v: Array) -> Array:
    t = q.shape[1]
    s = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, -1), v)


def of_jax(q: Array, k: Array, v: Array, **how: str) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **how)  # type: ignore[arg-type]


def in_chunks(q: Array, k: Array, v: Array, checkpoint: bool = True) -> Array:
    """For some queries at a time, whose softmax is whole."""
    b, t, heads, d = q.shape

    def of_chunk(i: Array) -> Array:
        some = lax.dynamic_slice_in_dim(q, i * CHUNK, CHUNK, 1)
        s = jnp.einsum("bthd,bshd->bhts", some, k) / math.sqrt(d)
        seen = jnp.arange(t)[None, :] <= (i * CHUNK + jnp.arange(CHUNK))[:, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
        return jnp.einsum("bhts,bshd->bthd", p, v)

    of_chunk = jax.checkpoint(of_chunk) if checkpoint else of_chunk
    o = lax.map(of_chunk, jnp.arange(t // CHUNK))
    return jnp.moveaxis(o, 0, 1).reshape(b, t, heads, d)


def _norm(params: Tree, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    r = lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * r * params["scale"] + params["bias"]


def _dense(params: Tree, x: Array) -> Array:
    return x @ params["weight"].T + params["bias"]


def block_of_arrays(sizes: Sizes, attention: Callable, params: Tree, x: Array) -> Array:
    ((norm, heads), _), ((norm_, up, _, down), _) = params
    b, t, width = x.shape

    def of_heads(name: str) -> Array:
        return (a @ heads[name]["weight"].T).reshape(b, t, sizes.heads, -1)

    a = _norm(norm, x)
    o = attention(*map(of_heads, ("query", "key", "value"))).reshape(b, t, width)
    x = x + o @ heads["output"]["weight"].T
    return x + _dense(down, jax.nn.gelu(_dense(up, _norm(norm_, x)), approximate=True))


def loss_of_logits(weight: Array, h: Array, y: Array) -> Array:
    z = h @ weight.T
    wanted = jnp.take_along_axis(z, y[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(z.astype(jnp.float32), -1) - wanted).mean()


def loss_in_chunks(weight: Array, h: Array, y: Array) -> Array:
    @jax.checkpoint
    def of_chunk(of: tuple[Array, Array]) -> Array:
        return loss_of_logits(weight, *of)

    h, y = h.reshape(-1, CHUNK, h.shape[-1]), y.reshape(-1, CHUNK)
    return lax.map(of_chunk, (h, y)).mean()


def usual(
    sizes: Sizes,
    *,
    attention: Callable = of_arrays,
    cost: Callable = loss_of_logits,
    checkpoint: bool = False,
) -> Callable[..., Array]:
    of_one = functools.partial(block_of_arrays, sizes, attention)
    of_one = jax.checkpoint(of_one) if checkpoint else of_one

    def of_batch(params: Tree, x: Array, y: Array) -> Array:
        (table, positions, blocks, norm), _ = params
        h = table["weight"][x] + positions["weight"][: x.shape[1]]
        h, _ = lax.scan(lambda h, params: (of_one(params, h), None), h, blocks)
        return cost(table["weight"], _norm(norm, h), y)

    return of_batch


def chunked(sizes: Sizes, *, checkpoint: bool) -> Callable[..., Array]:
    return usual(sizes, attention=in_chunks, cost=loss_in_chunks, checkpoint=checkpoint)


# ---- libraries


def flax(sizes: Sizes, x: Array, y: Array, by_ops: bool = False) -> tuple[Callable, tuple]:
    """As most people write it, or with its attention, gelu and loss from ``bp.ops``."""
    from flax import linen

    def attention(q: Array, k: Array, v: Array, **_: Any) -> Array:
        return bp.ops.attention(q, k, v)

    class Block(linen.Module):
        @linen.compact
        def __call__(self, h: Array, _: Any) -> tuple[Array, None]:
            a = linen.LayerNorm()(h)
            mask = None if by_ops else linen.make_causal_mask(x)
            how: dict[str, Any] = {"attention_fn": attention} if by_ops else {}
            heads = linen.MultiHeadDotProductAttention(sizes.heads, use_bias=False, **how)
            h = h + heads(a, a, mask=mask)
            a = linen.Dense(4 * sizes.width)(linen.LayerNorm()(h))
            gelu = bp.ops.gelu if by_ops else linen.gelu
            return h + linen.Dense(sizes.width)(gelu(a)), None

    class Gpt(linen.Module):
        @linen.compact
        def __call__(self, x: Array, y: Array) -> Array:
            import optax

            table = linen.Embed(sizes.vocabulary, sizes.width)
            h = table(x) + self.param(
                "p", linen.initializers.normal(0.02), (x.shape[1], sizes.width)
            )
            blocks = linen.scan(
                Block, {"params": 0}, split_rngs={"params": True}, length=sizes.layers
            )
            h = linen.LayerNorm()(blocks()(h, None)[0])
            if by_ops:
                return bp.ops.linear_softmax_cross_entropy(h, table.embedding, y, 1 / y.size)
            return optax.softmax_cross_entropy_with_integer_labels(table.attend(h), y).mean()

    model = Gpt()
    params = jax.jit(model.init)(jax.random.key(0), x, y)
    return jax.value_and_grad(model.apply), (params, x, y)


def equinox(sizes: Sizes, x: Array, y: Array) -> tuple[Callable, tuple]:
    import equinox as eqx

    width = sizes.width

    class Block(eqx.Module):
        norms: list
        heads: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key: Array) -> None:
            keys = jax.random.split(key, 3)
            self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
            self.heads = eqx.nn.MultiheadAttention(sizes.heads, width, key=keys[0])
            self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
            self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

        def __call__(self, h: Array) -> Array:
            a = jax.vmap(self.norms[0])(h)
            h = h + self.heads(a, a, a, mask=jnp.tril(jnp.ones((len(h), len(h)), bool)))
            a = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(h)))
            return h + jax.vmap(self.down)(a)

    class Gpt(eqx.Module):
        table: Array
        positions: Array
        blocks: Any
        norm: eqx.nn.LayerNorm

        def __init__(self, key: Array) -> None:
            keys = jax.random.split(key, 3)
            self.table = 0.02 * jax.random.normal(keys[0], (sizes.vocabulary, width))
            self.positions = 0.02 * jax.random.normal(keys[1], (sizes.length, width))
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[2], sizes.layers))
            self.norm = eqx.nn.LayerNorm(width)

        def __call__(self, x: Array) -> Array:
            arrays, rest = eqx.partition(self.blocks, eqx.is_inexact_array)

            def of_one(h: Array, arrays: Tree) -> tuple[Array, None]:
                return eqx.combine(arrays, rest)(h), None

            h = lax.scan(of_one, self.table[x] + self.positions, arrays)[0]
            return jax.vmap(self.norm)(h) @ self.table.T

    def cost(model: Gpt, x: Array, y: Array) -> Array:
        import optax

        z = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    arrays, static = eqx.partition(Gpt(jax.random.key(0)), eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)  # the classes above are others at every call

    def of_leaves(leaves: list[Array], x: Array, y: Array) -> Array:
        return cost(eqx.combine(tree.unflatten(leaves), static), x, y)

    return jax.value_and_grad(of_leaves), (leaves, x, y)


def torch(sizes: Sizes, x: Array, y: Array) -> tuple[Callable, tuple]:
    import numpy
    import torch
    from torch import nn
    from torch.nn import functional

    width, heads = sizes.width, sizes.heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv, self.out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, h: Any) -> Any:
            b, t, _ = h.shape
            qkv = self.qkv(self.norms[0](h)).reshape(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
            o = functional.scaled_dot_product_attention(*qkv, is_causal=True)
            h = h + self.out(o.transpose(1, 2).reshape(b, t, width))
            return h + self.down(functional.gelu(self.up(self.norms[1](h)), approximate="tanh"))

    table = nn.Embedding(sizes.vocabulary, width)
    positions = nn.Parameter(torch.zeros(sizes.length, width))
    body = nn.Sequential(*(Block() for _ in range(sizes.layers)), nn.LayerNorm(width))
    parameters = [*table.parameters(), positions, *body.parameters()]
    x, y = (torch.tensor(numpy.asarray(a)).long() for a in (x, y))

    def step() -> list:
        z = body(table(x) + positions) @ table.weight.T
        cost = functional.cross_entropy(z.flatten(0, 1), y.flatten())
        return [cost.item(), *(() for _ in torch.autograd.grad(cost, parameters))]

    return step, ()
