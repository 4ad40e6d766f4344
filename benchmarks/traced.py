"""Traced layers: Flax models, unchanged

Ours is ``bp.from_flax`` of the module. The plain step is ``jax.value_and_grad`` of the module over
the batch. ``vmap(jax.grad)`` of 32,000 words takes gigabytes, so for the tagger it goes a few
examples at a time. Norms are checked to be equal. (Gradients are not: that of a key's bias is 0 in
attention, and of rounding alone nobody agrees.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

from .compare import Candidate, Row

Tree = Any
LOSS = bp.losses.softmax_cross_entropy
MAX_NORM = 1.0


class Case(NamedTuple):
    """A model and a batch.

    Attributes:
      module: ``() -> `` a Flax module.
      shape: of one example.
      batch: the number of examples.
      words: the size of the vocabulary, where the examples are ids.
      classes: of the targets.
      at_positions: there is a target at each position.
      at_once: as many examples as ``vmap(jax.grad)`` takes at once.
    """

    module: Callable[[], Any]
    shape: tuple[int, ...]
    batch: int
    words: int | None = None
    classes: int = 10
    at_positions: bool = False
    at_once: int | None = None


def cases() -> dict[str, Case]:
    return {
        "MLP 512-512-512-512-10, batch 128": Case(mlp, (512,), 128),
        "tagger of 32,000 words, batch 64": Case(tagger, (32,), 64, 32_000, at_once=4),
        "ViT-like, 17 tokens, width 384, batch 32": Case(vit, (17, 64), 32),
        "GPT, 8,192 words, width 256, T 128, batch 4": Case(
            lambda: gpt(8192, 256, 2), (128,), 4, 8192, 8192, at_positions=True
        ),
        "LSTM, 64 steps, width 256, batch 64": Case(lstm, (64, 64), 64),
        "small CNN, batch 64": Case(cnn, (28, 28, 1), 64),
        "small GPT, width 64, T 32, batch 16": Case(
            lambda: gpt(128, 64, 2), (32,), 16, 128, 128, at_positions=True
        ),
    }


def rows() -> Iterable[Row]:
    for name, case in cases().items():
        yield Row(
            f"{name}, norms",
            [
                ours(case, bp.per_example_grad_norms),
                theirs(case, "a plain step", plain_step),
                theirs(case, usual(case), norms_by_vmap, same=True),
            ],
        )
        yield Row(
            f"{name}, clipped",
            [
                ours(case, lambda *of: bp.clipped_grad(*of, MAX_NORM)),
                theirs(case, "a plain step", plain_step),
                theirs(case, "jax-privacy: clipped_grad", by_jax_privacy),
            ],
        )
        yield Row(
            f"{name}, loss and gradient",
            [
                ours(case, bp.value_and_grad),
                theirs(case, "usual: jax.value_and_grad", plain_step),
            ],
        )
    yield stacked(64)


def usual(case: Case) -> str:
    return "usual: vmap(jax.grad)" + (f", {case.at_once} at a time" if case.at_once else "")


def inputs(case: Case) -> tuple[Any, Tree, Array, Array]:
    module, keys = case.module(), jax.random.split(jax.random.key(0), 3)
    shape = (case.batch, *case.shape)
    if case.words is None:
        x = jax.random.normal(keys[0], shape)
    else:
        x = jax.random.randint(keys[0], shape, 0, case.words)
    y = jax.random.randint(keys[1], shape if case.at_positions else shape[:1], 0, case.classes)
    return module, jax.jit(lambda key: bp.from_flax(module).init(key, x[0]))(keys[2]), x, y


def ours(case: Case, quantity: Callable[..., Any]) -> Candidate:
    def make():
        module, *given = inputs(case)
        return quantity(bp.from_flax(module), LOSS), tuple(given)

    return Candidate("ours", make)


def theirs(case: Case, name: str, function: Callable[..., Any], *, same: bool = False) -> Candidate:
    def make():
        module, *given = inputs(case)
        return function(module, case), tuple(given)

    return Candidate(name, make, same=same)


def costs(module: Any, params: Tree, x: Array, y: Array) -> Array:
    import optax

    each = optax.softmax_cross_entropy_with_integer_labels(module.apply(params, x), y)
    return each.reshape(len(x), -1).mean(1)


def plain_step(module: Any, case: Case) -> Callable[..., Any]:
    return jax.value_and_grad(lambda params, x, y: costs(module, params, x, y).mean())


def norms_by_vmap(module: Any, case: Case) -> Callable[..., Any]:
    def norm(params: Tree, x: Array, y: Array) -> Array:
        gradient = jax.grad(lambda p: costs(module, p, x[None], y[None])[0])(params)
        return jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))

    if case.at_once is None:
        return jax.vmap(norm, (None, 0, 0))
    return lambda params, *batch: lax.map(
        lambda xy: norm(params, *xy), batch, batch_size=case.at_once
    )


def by_jax_privacy(module: Any, case: Case) -> Callable[..., Any]:
    from jax_privacy.clipping import clipped_grad

    return clipped_grad(
        lambda params, x, y: costs(module, params, x, y).mean(),
        l2_clip_norm=MAX_NORM,
        batch_argnums=(1, 2),
        normalize_by=case.batch,
        microbatch_size=case.at_once,
    )


def stacked(layers: int) -> Row:
    """``repeat`` of a traced layer against a scan of the same."""
    width, batch = 256, 128

    def apply(params: Tree, x: Array) -> Array:
        return jnp.tanh(params["w"] @ x + params["b"])

    def init(key: Array, x: Array) -> Tree:
        w = jax.random.normal(key, (width, width), x.dtype) / width**0.5
        return {"w": w, "b": jnp.zeros(width, x.dtype)}

    layer = bp.from_function(apply, init=init)
    model = bp.chain(bp.repeat(layer, layers))

    def given() -> tuple[Tree, Array, Array]:
        x, y = jax.random.normal(jax.random.key(1), (2, batch, width))
        return model.init(jax.random.key(0), x[0]), x, y

    def mean_cost(params: Tree, x: Array, y: Array) -> Array:
        def step(h: Array, p: Tree) -> tuple[Array, None]:
            return jnp.tanh(h @ p["w"].T + p["b"]), None

        a = lax.scan(step, x, params[0])[0]
        return 0.5 * ((a - y) ** 2).sum(1).mean()

    return Row(
        f"repeat of a function, {layers} layers of {width}, batch {batch}, loss and gradient",
        [
            Candidate("ours", lambda: (bp.value_and_grad(model, bp.losses.squared_error), given())),
            Candidate(
                "usual: jax.value_and_grad of a scan",
                lambda: (jax.value_and_grad(mean_cost), given()),
            ),
        ],
    )


# ---- the modules


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
