"""Attention, losses over a vocabulary and GPTs: costs and gradients of all parameters

In float32; on a GPU in bfloat16, where results are not compared, and cuDNN's attention is there.

A GPT's row is layers, width, positions, vocabulary, examples. Its usual form is what most people
write; *chunked* is what an expert does: attention for a block of queries at a time and the loss for
a block of positions, each made again on the way back by `jax.checkpoint`. *peak* is one large
matrix product, again and again, with as many operations as the row's own products have if none is
made twice: 1 ÷ its ratio is the share of the machine's peak that we reach. `torch` runs as it
stands, on the CPU, its attention by `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import functional_bp as bp

from . import gpt_models as models
from .compare import Candidate, Row
from .recurrent import peak_of

Tree = Any
GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if GPU else jnp.float32
GPTS = (
    models.Sizes(4, 256, 256, 8192, 4, 8),
    models.Sizes(6, 384, 256, 256, 8, 6),
    models.Sizes(4, 512, 1024, 32768, 1, 8),
)
LAYER = models.Sizes(1, 768, 1024, 0, 1, 12)
LENGTHS = (256, 1024, 4096, 16384)
VOCABULARIES = (8192, 32768, 131072)


def rows() -> Iterable[Row]:
    for sizes in GPTS:
        yield _gpt(sizes)
    yield _layer(LAYER)
    yield _clipped(GPTS[1])
    for length in LENGTHS:
        yield _attention(length)
    yield Row(
        "attention 16,384, memory, 8 heads of 64, without running",
        [Candidate(n, functools.partial(_attention_of, f, 16384)) for n, f in _FORMS.items()],
        run=False,
    )
    for vocabulary in VOCABULARIES:
        yield _loss(vocabulary)


def _same(name: str, make: Callable[[], tuple]) -> Candidate:
    return Candidate(name, make, same=not GPU)


def _cast(tree: Tree) -> Tree:
    return jax.tree.map(
        lambda a: a.astype(DTYPE) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


# ---- GPTs


def _gpt(sizes: models.Sizes) -> Row:
    model, loss = models.by_hand(sizes)

    @functools.cache
    def inputs() -> tuple[Tree, Array, Array]:
        return _cast(models.inputs(sizes))

    def step(cost: Callable[..., Array]) -> Callable[[], tuple[Callable, tuple]]:
        return lambda: (jax.value_and_grad(cost), inputs())

    return Row(
        f"GPT {sizes}",
        [
            Candidate("ours", lambda: (bp.value_and_grad(model, loss), inputs())),
            _same("usual", step(models.usual(sizes))),
            _same("usual, jax.checkpoint", step(models.usual(sizes, checkpoint=True))),
            _same(
                "jax.nn.dot_product_attention",
                step(models.usual(sizes, attention=models.of_jax)),
            ),
            _same("strongest: chunked", step(models.chunked(sizes, checkpoint=False))),
            _same("chunked, jax.checkpoint", step(models.chunked(sizes, checkpoint=True))),
            Candidate("flax", lambda: models.flax(sizes, *inputs()[1:]), same=False),
            Candidate(
                "flax, bp.ops",
                lambda: models.flax(sizes, *inputs()[1:], by_ops=True),
                same=False,
            ),
            Candidate("equinox", lambda: models.equinox(sizes, *inputs()[1:]), same=False),
            Candidate("torch", lambda: models.torch(sizes, *inputs()[1:]), jit=False, same=False),
            Candidate("peak", lambda: peak_of(sizes.operations), same=False),
        ],
    )


def _layer(sizes: models.Sizes) -> Row:
    layer = models.block(sizes)

    @functools.cache
    def inputs() -> tuple[Tree, Array, Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (sizes.examples, sizes.length, sizes.width)
        x, dy = (jax.random.normal(key, shape) for key in keys[:2])
        return _cast((layer.init(keys[2], x[0]), x, dy))

    def by_hand(params: Tree, x: Array, dy: Array) -> tuple[Array, Tree]:
        y, residuals = layer.forward(params, x)
        return y, layer.backward(params, residuals, dy, bp.contractions.total)

    def differentiated(attention: Callable, checkpoint: bool = False) -> Callable:
        of_one = functools.partial(models.block_of_arrays, sizes, attention)
        of_one = jax.checkpoint(of_one) if checkpoint else of_one

        def step(params: Tree, x: Array, dy: Array) -> tuple[Array, Tree]:
            y, pull = jax.vjp(of_one, params, x)
            dparams, dx = pull(dy)
            return y, (dx, dparams)

        return step

    return Row(
        f"GPT-2's layer, {sizes.length:,} positions, width {sizes.width}",
        [
            Candidate("ours", lambda: (by_hand, inputs())),
            _same("usual", lambda: (differentiated(models.of_arrays), inputs())),
            _same(
                "usual, jax.checkpoint",
                lambda: (differentiated(models.of_arrays, True), inputs()),
            ),
            _same(
                "jax.nn.dot_product_attention",
                lambda: (differentiated(models.of_jax), inputs()),
            ),
            _same("strongest: chunked", lambda: (differentiated(models.in_chunks), inputs())),
            Candidate("peak", lambda: peak_of(sizes.operations), same=False),
        ],
    )


def _clipped(sizes: models.Sizes) -> Row:
    model, loss = models.by_hand(sizes)
    cost = models.usual(sizes)
    clipped = functools.partial(bp.clipped_grad, model, loss, 1.0)

    @functools.cache
    def inputs() -> tuple[Tree, Array, Array]:
        return _cast(models.inputs(sizes))

    def of_one(params: Tree, x: Array, y: Array) -> Array:
        return cost(params, x[None], y[None])

    def all_at_once(params: Tree, x: Array, y: Array) -> Tree:
        each = jax.vmap(jax.grad(of_one), (None, 0, 0))(params, x, y)
        squares = sum((g.reshape(len(x), -1) ** 2).sum(1) for g in jax.tree.leaves(each))
        weights = jnp.minimum(1, 1 / jnp.sqrt(squares)) / len(x)
        return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each)

    def one_by_one(params: Tree, x: Array, y: Array) -> Tree:
        def add(sums: Tree, xy: tuple[Array, Array]) -> tuple[Tree, None]:
            g = jax.grad(of_one)(params, *xy)
            norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
            weight = jnp.minimum(1, 1 / norm) / len(x)
            return jax.tree.map(lambda s, leaf: s + weight * leaf, sums, g), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), (x, y))[0]

    return Row(
        f"clipped, GPT {sizes}",
        [
            Candidate("ours, microbatch=1", lambda: (clipped(microbatch=1), inputs())),
            Candidate("ours, all at once", lambda: (clipped(), inputs())),
            Candidate(
                "a plain step of ours",
                lambda: (bp.value_and_grad(model, loss), inputs()),
                same=False,
            ),
            _same("usual: vmap(jax.grad)", lambda: (all_at_once, inputs())),
            _same("strongest: one at a time", lambda: (one_by_one, inputs())),
            Candidate("ours, traced", lambda: (bp.clipped_grad(of_one, max_norm=1.0), inputs())),
        ],
    )


# ---- attention

_LARGE = ("usual", "jax.nn.dot_product_attention", "strongest: chunked")


def _ours(q: Array, k: Array, v: Array) -> Array:
    return bp.ops.attention(q, k, v)


_FORMS: dict[str, Callable] = {
    "ours": _ours,
    "usual": models.of_arrays,
    "jax.nn.dot_product_attention": models.of_jax,
    "strongest: chunked": functools.partial(models.in_chunks, checkpoint=False),
    "chunked, jax.checkpoint": models.in_chunks,
}
if GPU:
    _FORMS["cuDNN"] = functools.partial(models.of_jax, implementation="cudnn")


def _attention_of(form: Callable, length: int, heads: int = 8, size: int = 64) -> tuple:
    def step(q: Array, k: Array, v: Array, do: Array) -> tuple[Array, Tree]:
        o, pull = jax.vjp(form, q, k, v)
        return o, pull(do)

    shape = (1, length, heads, size)
    keys = jax.random.split(jax.random.key(0), 4)
    return step, tuple(jax.random.normal(key, shape, DTYPE) for key in keys)


def _attention(length: int, heads: int = 8, size: int = 64) -> Row:
    forms = _FORMS
    if length > 8192:  # whose matrices of all positions no memory here holds
        forms = {n: f for n, f in _FORMS.items() if n not in _LARGE}

    def of_torch() -> tuple[Callable, tuple]:
        import numpy
        import torch

        arrays = _attention_of(_ours, length)[1]
        q, k, v, do = (
            torch.tensor(numpy.asarray(jnp.swapaxes(a, 1, 2))).requires_grad_() for a in arrays
        )

        def step() -> list:
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(o, (q, k, v), do)
            return []

        return step, ()

    # q kᵀ and p v forward, twice as many back, of half the positions.
    operations = 6 * length**2 * heads * size
    return Row(
        f"attention {length:,}, {heads} heads of {size}",
        [
            *(_same(n, functools.partial(_attention_of, f, length)) for n, f in forms.items()),
            Candidate("torch", of_torch, jit=False, same=False),
            Candidate("peak", lambda: peak_of(operations), same=False),
        ],
    )


# ---- losses


def _loss(vocabulary: int, tokens: int = 1024, features: int = 512) -> Row:
    loss = bp.losses.linear_softmax_cross_entropy(vocabulary)

    @functools.cache
    def inputs() -> tuple[Tree, Array, Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        h = jax.random.normal(keys[0], (1, tokens, features))
        weight = jax.random.normal(keys[1], (vocabulary, features)) / math.sqrt(features)
        return (*_cast((weight, h)), jax.random.randint(keys[2], (1, tokens), 0, vocabulary))

    def by_hand(weight: Array, h: Array, y: Array) -> tuple[Array, Tree]:
        costs, kept = loss.layer.forward({"weight": weight}, (h, y))
        asked = {"weight": bp.contractions.total}
        (dh, again), of_weight = loss.layer.backward(
            {"weight": weight}, kept, jnp.ones_like(costs), asked
        )
        return (costs if again is None else again)[0], (of_weight["weight"], dh)

    def step(cost: Callable) -> Callable[[], tuple[Callable, tuple]]:
        return lambda: (jax.value_and_grad(cost, (0, 1)), inputs())

    def of_torch() -> tuple[Callable, tuple]:
        import numpy
        import torch

        weight, h, y = (torch.tensor(numpy.asarray(a)) for a in inputs())
        weight.requires_grad_()
        h.requires_grad_()

        def step() -> list:
            cost = torch.nn.functional.cross_entropy(h[0] @ weight.T, y[0].long())
            torch.autograd.grad(cost, (weight, h))
            return []

        return step, ()

    return Row(
        f"loss over {vocabulary:,} words, {tokens:,} positions, width {features}",
        [
            Candidate("ours", lambda: (by_hand, inputs())),
            _same("usual", step(models.loss_of_logits)),
            _same("strongest: chunked, jax.checkpoint", step(models.loss_in_chunks)),
            Candidate("torch", of_torch, jit=False, same=False),
            Candidate("peak", lambda: peak_of(6 * tokens * features * vocabulary), same=False),
        ],
    )
