"""The decoder of a transformer, as GPT-2 has it: a model of the next id, and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import functional_bp as bp

small_normal = jax.nn.initializers.normal(0.02)


@dataclass(frozen=True)
class Sizes:
    """Of a decoder.

    Attributes:
      vocabulary: the number of ids.
      layers, heads, features: how many of each.
      positions: the most that it reads at once.
      rotary: the base of rotary positions; None for learned ones.
      kv_heads: heads of keys and values; None for as many as ``heads``.
    """

    vocabulary: int
    layers: int
    heads: int
    features: int
    positions: int
    rotary: float | None = None
    kv_heads: int | None = None


def decoder(sizes: Sizes, dropout: float = 0.0) -> bp.Layer:
    """From ids ``(t,)`` to h ``(t, features)``, of which the loss makes logits.

        a^0 = E[k] (+ P),  a ← a + attention(norm(a)),  a ← a + MLP(norm(a)),  h = norm(a^L)

    Parameters: ``(embedding, positions, (), blocks, norm)``. (Radford et al. 2019.)
    """
    noise = bp.dropout(dropout) if dropout else bp.identity
    learned = bp.positions(sizes.positions) if sizes.rotary is None else bp.identity
    attention = bp.attention(sizes.heads, kv_heads=sizes.kv_heads, rotary=sizes.rotary)
    mlp = bp.dense(4 * sizes.features), bp.gelu_tanh, bp.dense(sizes.features)
    block = bp.chain(
        bp.residual(bp.chain(bp.layer_norm(), attention, noise)),
        bp.residual(bp.chain(bp.layer_norm(), *mlp, noise)),
    )
    embedding = bp.embedding(sizes.vocabulary, sizes.features, weight_init=small_normal)
    return bp.chain(embedding, learned, noise, bp.repeat(block, sizes.layers), bp.layer_norm())


def model_and_loss(sizes: Sizes, dropout: float = 0.0) -> tuple[bp.Layer, bp.losses.Loss]:
    """The decoder, and its loss: the output's weight is that of the embedding."""
    loss = bp.losses.linear_softmax_cross_entropy(sizes.vocabulary)
    return decoder(sizes, dropout), bp.tied(loss, {(1, "weight"): (0, 0, "weight")})


def shapes_of(sizes: Sizes) -> bp.layer.Tree:
    """The shapes of the decoder's parameters."""
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(decoder(sizes).init, jax.random.key(0), ids)
