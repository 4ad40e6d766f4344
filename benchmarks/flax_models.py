"""The Flax models of the traced layers' benchmark, and those that the library has layers for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

import functional_bp as bp

Tree = Any


def mlp() -> Any:
    from flax import linen as nn

    layers = [layer for _ in range(3) for layer in (nn.Dense(512), nn.relu)]
    return nn.Sequential([*layers, nn.Dense(10)])


def tagger() -> Any:
    from flax import linen as nn

    return nn.Sequential(
        [nn.Embed(32_000, 128), nn.Dense(256), nn.relu, nn.Dense(10), lambda z: z.mean(1)]
    )


def lstm() -> Any:
    from flax import linen as nn

    return nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(256)), lambda h: h[:, -1], nn.Dense(10)])


def cnn() -> Any:
    from flax import linen as nn

    layers = [
        layer
        for features in (16, 32)
        for layer in (nn.Conv(features, (3, 3), strides=(2, 2)), nn.GroupNorm(4), nn.relu)
    ]
    return nn.Sequential([*layers, lambda h: h.reshape(len(h), -1), nn.Dense(10)])


def block(width: int, heads: int, *, causal: bool) -> Any:
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, h: Array) -> Array:
            mask = nn.make_causal_mask(jnp.ones(h.shape[:2])) if causal else None
            a = nn.LayerNorm()(h)
            h = h + nn.MultiHeadDotProductAttention(heads)(a, a, mask=mask)
            hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(h)))
            return h + nn.Dense(width)(hidden)

    return Block()


def vit() -> Any:
    from flax import linen as nn

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            where = self.param("positions", nn.initializers.normal(0.02), (x.shape[1], 384))
            h = nn.Dense(384)(x) + where
            for _ in range(4):
                h = block(384, 6, causal=False)(h)
            return nn.Dense(10)(nn.LayerNorm()(h)[:, 0])

    return ViT()


def gpt(words: int, width: int, layers: int) -> Any:
    from flax import linen as nn

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, ids: Array) -> Array:
            table = nn.Embed(words, width)
            where = self.param("positions", nn.initializers.normal(0.02), (ids.shape[1], width))
            h = table(ids) + where
            for _ in range(layers):
                h = block(width, 4, causal=True)(h)
            return table.attend(nn.LayerNorm()(h))

    return GPT()


# ---- the same architectures in layers written by hand, where there are all of them


def mlp_by_hand() -> bp.Layer:
    layers = [layer for _ in range(3) for layer in (bp.dense(512), bp.relu)]
    return bp.chain(*layers, bp.dense(10))


def tagger_by_hand() -> bp.Layer:
    mean = bp.rule(
        lambda key, a: (),
        lambda params, a, key=None: (a.mean(0), jnp.ones(len(a)) / len(a)),
        lambda params, shares, delta: (shares[:, None] * delta, ()),
        name="mean over positions",
    )
    return bp.chain(bp.embedding(32_000, 128), bp.dense(256), bp.relu, bp.dense(10), mean)


def lstm_by_hand() -> bp.Layer:
    return bp.chain(bp.lstm(256, output="last"), bp.dense(10))
