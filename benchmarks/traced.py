"""Traced layers: Flax models, unchanged

Ours is ``bp.from_flax`` of the module. The plain step is ``jax.value_and_grad`` of the module over
the batch. ``vmap(jax.grad)`` goes over all examples at once, but for 32,000 words, which would take
gigabytes, and over an eighth of them at a time. Norms are checked to be equal. (Gradients are not:
that of a key's bias is 0 in attention, and of rounding alone nobody agrees.) Where this library has
all of a model's layers, the same architecture of them is beside it, with parameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

from . import flax_models as models
from .compare import Candidate, Row
from .quantities import ghost_clipping

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
      all_at_once: ``vmap(jax.grad)`` can take all examples at once.
      by_hand: the same architecture in layers of this library.
      more: other candidates for the clipped gradient.
    """

    module: Callable[[], Any]
    shape: tuple[int, ...]
    batch: int
    words: int | None = None
    classes: int = 10
    at_positions: bool = False
    all_at_once: bool = True
    by_hand: Callable[[], bp.Layer] | None = None
    more: tuple[Candidate, ...] = ()


def cases() -> dict[str, Case]:
    return {
        "MLP 512-512-512-512-10, batch 128": Case(
            models.mlp, (512,), 128, by_hand=models.mlp_by_hand
        ),
        "tagger of 32,000 words, batch 64": Case(
            models.tagger,
            *((32,), 64, 32_000),
            all_at_once=False,
            by_hand=models.tagger_by_hand,
            more=(Candidate("Opacus: ghost clipping", tagger_by_opacus, jit=False, same=False),),
        ),
        "ViT-like, 17 tokens, width 384, batch 32": Case(models.vit, (17, 64), 32),
        "GPT, 8,192 words, width 256, T 128, batch 4": Case(
            lambda: models.gpt(8192, 256, 2), (128,), 4, 8192, 8192, at_positions=True
        ),
        "LSTM, 64 steps, width 256, batch 64": Case(
            models.lstm, (64, 64), 64, by_hand=models.lstm_by_hand
        ),
        "small CNN, batch 64": Case(models.cnn, (28, 28, 1), 64),
        "small GPT, width 64, T 32, batch 16": Case(
            lambda: models.gpt(128, 64, 2), (32,), 16, 128, 128, at_positions=True
        ),
    }


def rows() -> Iterable[Row]:
    for name, case in cases().items():
        step = theirs(case, "a plain step", plain_step)
        yield Row(
            f"{name}, norms",
            [
                *ours(case, bp.per_example_grad_norms),
                step,
                *by_vmap(case, "vmap(jax.grad)", norms_by_vmap, same=True),
            ],
        )
        yield Row(
            f"{name}, clipped",
            [
                *ours(case, lambda *of: bp.clipped_grad(*of, MAX_NORM)),
                step,
                *by_vmap(case, "vmap(jax.grad) and clip", clipped_by_vmap),
                theirs(case, "jax-privacy: clipped_grad", by_jax_privacy),
                *case.more,
            ],
        )
        yield Row(
            f"{name}, loss and gradient",
            [
                *ours(case, bp.value_and_grad),
                theirs(case, "usual: jax.value_and_grad", plain_step),
            ],
        )
    yield stacked(64)


def inputs(case: Case) -> tuple[Any, Tree, Array, Array]:
    module, keys = case.module(), jax.random.split(jax.random.key(0), 3)
    shape = (case.batch, *case.shape)
    if case.words is None:
        x = jax.random.normal(keys[0], shape)
    else:
        x = jax.random.randint(keys[0], shape, 0, case.words)
    y = jax.random.randint(keys[1], shape if case.at_positions else shape[:1], 0, case.classes)
    return module, jax.jit(lambda key: bp.from_flax(module).init(key, x[0]))(keys[2]), x, y


def ours(case: Case, quantity: Callable[..., Any]) -> list[Candidate]:
    def make():
        module, *given = inputs(case)
        return quantity(bp.from_flax(module), LOSS), tuple(given)

    def make_by_hand():
        model, (_, _, x, y) = case.by_hand(), inputs(case)
        params = jax.jit(lambda key: model.init(key, x[0]))(jax.random.key(2))
        return quantity(model, LOSS), (params, x, y)

    by_hand = Candidate("ours, of layers written by hand", make_by_hand, same=False)
    return [Candidate("ours", make), *([by_hand] if case.by_hand else [])]


def theirs(
    case: Case, name: str, function: Callable[..., Any], *, same: bool = False, **options: Any
) -> Candidate:
    def make():
        module, *given = inputs(case)
        return function(module, case, **options), tuple(given)

    return Candidate(name, make, same=same)


def by_vmap(case: Case, name: str, function: Callable[..., Any], **same: bool) -> list[Candidate]:
    """All examples at once, where that can be, and some at a time."""
    some = max(1, case.batch // 8)
    at_once = [theirs(case, f"usual: {name}", function, some=None, **same)]
    some_at_a_time = theirs(case, f"usual: {name}, {some} at a time", function, some=some, **same)
    return [*(at_once if case.all_at_once else []), some_at_a_time]


def costs(module: Any, params: Tree, x: Array, y: Array) -> Array:
    import optax

    each = optax.softmax_cross_entropy_with_integer_labels(module.apply(params, x), y)
    return each.reshape(len(x), -1).mean(1)


def plain_step(module: Any, case: Case) -> Callable[..., Any]:
    return jax.value_and_grad(lambda params, x, y: costs(module, params, x, y).mean())


def gradient_of_one(module: Any) -> Callable[..., Tree]:
    return jax.grad(lambda params, x, y: costs(module, params, x[None], y[None])[0])


def norm(gradient: Tree) -> Array:
    return jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))


def norms_by_vmap(module: Any, case: Case, some: int | None) -> Callable[..., Any]:
    def of_one(params: Tree, x: Array, y: Array) -> Array:
        return norm(gradient_of_one(module)(params, x, y))

    if some is None:
        return jax.vmap(of_one, (None, 0, 0))
    return lambda params, *batch: lax.map(lambda xy: of_one(params, *xy), batch, batch_size=some)


def clipped_by_vmap(module: Any, case: Case, some: int | None) -> Callable[..., Any]:
    def of_some(params: Tree, x: Array, y: Array) -> Tree:
        each = jax.vmap(gradient_of_one(module), (None, 0, 0))(params, x, y)
        weights = jnp.minimum(1, MAX_NORM / jax.vmap(norm)(each)) / case.batch
        return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each)

    def clipped(params: Tree, *batch: Array) -> Tree:
        parts = jax.tree.map(lambda a: a.reshape(-1, some, *a.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)

        def add(sums: Tree, batch: tuple[Array, Array]) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, sums, of_some(params, *batch)), None

        return lax.scan(add, zeros, parts)[0]

    return clipped if some else of_some


def by_jax_privacy(module: Any, case: Case) -> Callable[..., Any]:
    from jax_privacy.clipping import clipped_grad

    return clipped_grad(
        lambda params, x, y: costs(module, params, x, y).mean(),
        l2_clip_norm=MAX_NORM,
        batch_argnums=(1, 2),
        normalize_by=case.batch,
        microbatch_size=None if case.all_at_once else case.batch // 8,
    )


def tagger_by_opacus() -> tuple:
    import torch

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(32_000, 128)
            self.hidden, self.last = torch.nn.Linear(128, 256), torch.nn.Linear(256, 10)

        def forward(self, ids):
            return self.last(torch.relu(self.hidden(self.embed(ids)))).mean(1)

    torch.manual_seed(0)
    ids, y = torch.randint(0, 32_000, (64, 32)), torch.randint(0, 10, (64,))
    return ghost_clipping(Tagger(), ids, y)


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
