"""The proof of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import whole
from ..contractions import (
    contract_factors,
    dot,
    drop,
    each,
    gram,
    is_factor,
    keep,
    second_moment,
    squared_norm,
    total,
)
from ..freezing import trainable
from ..layer import Layer, a_layer, place, shapes_of
from .comparing import Draw, Proof, batch_of, float64, proof_of, where_float
from .oracle import one_by_one, together

Tree = Any
Gradients = np.ndarray  # one parameter's, of every example: (n, *parameter)


def check_layer(
    layer: Layer,
    x: Tree,
    *,
    key: Array | None = None,
    dtype: str = "float64",
    tolerance: float | None = None,
    batch: int = 3,
    seed: int = 0,
) -> None:
    """Proves a layer, or a model without its loss: ``bp.testing.check_layer(my_layer, x)``.

    Draws parameters θ, a batch x and two cotangents δ = ∂C/∂y, and takes from ``jax.vjp`` of the
    layer's textbook form (its ``reference``, or ``forward`` where it has none), over one example
    after another, each one's gradient gₙ for the one cotangent and hₙ for the other. Proven are

        y,  ∂C/∂x,                                          of the batch,
        Σₙ gₙ,  gₙ,  ‖gₙ‖²,  ⟨gₙ, gₘ⟩,  mean gₙ²,  ⟨gₙ, v⟩  as contractions on the way down
                                                            and of factors kept,
        ⟨gₙ, hₙ⟩,  ⟨gₙ, hₘ⟩,  wₙ gₙ                           of factors kept,
        Σₙ gₙ of every second parameter, the others dropped, and the other way round,

    and that an example's output stays the same whatever examples are beside it: a layer that mixes
    them says so by ``mixes_examples``. Of a layer that says ``elementwise``, ∂C/∂x = σ′ ⊙ ∂C/∂y is
    proven too. A layer that mixes has no gₙ: its y, ∂C/∂x and totals are proven. A layer
    that is another at inference is proven in that form too.

    The relative error of a leaf is max|Δ| / max|leaf|; the error is absolute where the leaf is 0
    but for rounding: nowhere above ``tolerance``.
    All of it runs operation by operation, which compiles little; the layer is traced as well, so
    that what ``jit`` would refuse is raised here.

    Args:
      layer: any layer, whether from ``bp.rule`` or a combinator.
      x: ONE example: an array, a tree of them, or their ``ShapeDtypeStruct``. Numbers are drawn
        for floating-point arrays; integers keep their values.
      key: randomness for a random layer, such as dropout; without it there is none.
      dtype: in what both sides run.
      tolerance: the largest relative error; 1e-12 in float64, 5e-6 in float32 if not given.
      batch: how many examples the batch has.
      seed: of everything drawn.

    Raises:
      AssertionError: with the layer, the quantity, the leaf, the largest error, its index, and
        the two values there.

    Example:
      >>> bp.testing.check_layer(bp.dense(2), jnp.ones(3))
      >>> wrong = bp.activation(jnp.square, lambda z: z, name="square")
      >>> bp.testing.check_layer(wrong, jnp.ones(3))
      Traceback (most recent call last):
      AssertionError: square: input gradient: ...
    """
    a_layer("layer", layer)
    with place("x:"):
        shapes_of(x)
    whole("batch", batch)
    proof = proof_of(layer.name, dtype, tolerance, key, seed)
    forms = {proof: layer, proof.within("at inference"): layer.inference()}
    for of_form, form in forms.items():
        if form is layer and of_form is not proof:
            continue
        draw = Draw(np.random.default_rng(seed), dtype)
        with jax.enable_x64(True), jax.disable_jit():
            examples = [draw.example_like(x) for _ in range(batch)]
            with jax.disable_jit(False):
                params = layer.init(jax.random.key(seed), examples[0])
            if form.is_state(params) != layer.is_state(params):
                raise AssertionError(f"{of_form.name}: has another state than in training")
            _prove(of_form, draw, form, draw.moved(params), examples, key)


def _prove(
    proof: Proof, draw: Draw, layer: Layer, params: Tree, examples: list[Tree], key: Array | None
) -> None:
    x, separate = batch_of(examples), not layer.mixes_examples
    if separate and key is None:
        wanted_y, wanted = one_by_one(layer, params, examples)
    else:
        wanted_y, wanted = together(layer, params, x, key, separate=separate)
    y, residuals = layer.forward(params, x, key)
    if separate:
        others = batch_of([examples[0], *map(draw.example_like, examples[1:])])
        with_others, _ = layer.forward(params, others, key)
        told = "output of an example beside others (does it mix them? say mixes_examples)"
        proof.equal(told, _first(with_others), _first(y))
    proof.equal("output", y, wanted_y)
    proof.renewal(layer, params, residuals)

    dy, dy_other = draw.cotangent(wanted_y), draw.cotangent(wanted_y)
    backward = functools.partial(layer.backward, params, residuals)
    wanted_dx, g = wanted(dy)
    dx, factors = backward(dy, keep)
    proof.equal("input gradient", where_float(x, dx), where_float(x, wanted_dx))
    if layer.elementwise:
        slope, _ = backward(jax.tree.map(jnp.ones_like, dy), keep)
        proof.equal("input gradient as σ′(z) ⊙ ∂C/∂y (is it elementwise?)", dx, slope * dy)
    learned = trainable(params, layer.is_state(params))
    v = jax.tree.map(lambda p: draw.normal(p.shape), learned)
    for name, contract, wanted_result in _contractions(g, v):
        if separate or name.startswith("total"):
            proof.equal(name, backward(dy, contract)[1], wanted_result)
            proof.equal(f"keep, then {name}", contract_factors(contract, factors), wanted_result)
    if separate:
        others = backward(dy_other, keep)[1]
        _prove_factors(
            proof, factors, others, g, wanted(dy_other)[1], draw.normal((len(examples),))
        )
    with jax.disable_jit(False):
        jax.eval_shape(_gradient_alone(layer, key), params, x, dy)


def _first(y: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[:1], y)


def _contractions(g: Tree, v: Tree) -> Iterator[tuple[str, Tree, Tree]]:
    """What may be asked of a layer: its name, the contraction, and the result by
    definition, of gₙ ``(n, *parameter)`` at each parameter."""
    leaves, structure = jax.tree.flatten(g)
    yield "total", total, jax.tree.map(_total, g)
    for first in (0, 1):
        asked = [total if i % 2 == first else drop for i in range(len(leaves))]
        totals = [_total(leaf) if c is total else None for c, leaf in zip(asked, leaves)]
        contract, wanted = (jax.tree.unflatten(structure, each) for each in (asked, totals))
        yield f"total of every second parameter from {first}", contract, wanted
    yield "each", each, g
    yield "squared_norm", squared_norm, jax.tree.map(_squared_norm, g)
    yield "gram", gram, jax.tree.map(_gram, g, g)
    yield "second_moment", second_moment, jax.tree.map(lambda g: (g**2).mean(0), g)
    dots = jax.tree.map(lambda g, v: _rows(g) @ float64(v).reshape(-1), g, v)
    yield "dot", jax.tree.map(dot, v), dots


def _prove_factors(proof: Proof, factors: Tree, others: Tree, g: Tree, h: Tree, w: Array) -> None:
    """What factors know beyond their contractions."""

    def of(function: Callable[..., Array], *factors: Tree) -> Tree:
        return jax.tree.map(function, *factors, is_leaf=is_factor)

    found = of(lambda f, h: f.inner(h), factors, others)
    proof.equal("inner", found, jax.tree.map(lambda g, h: _gram(g, h).diagonal(), g, h))
    found = of(lambda f, h: f.gram(h), factors, others)
    proof.equal("gram of two", found, jax.tree.map(_gram, g, h))
    found = of(lambda f: f.scaled(w).each(), factors)
    proof.equal("scaled", found, jax.tree.map(lambda g: (float64(w) * g.T).T, g))


def _rows(g: Gradients) -> np.ndarray:
    return g.reshape(len(g), -1)


def _total(g: Gradients) -> np.ndarray:
    return g.sum(0)


def _gram(g: Gradients, h: Gradients) -> np.ndarray:
    return _rows(g) @ _rows(h).T


def _squared_norm(g: Gradients) -> np.ndarray:
    return (_rows(g) ** 2).sum(1)


def _gradient_alone(layer: Layer, key: Array | None) -> Callable[[Tree, Tree, Tree], Tree]:
    def gradient(params: Tree, x: Tree, dy: Tree) -> Tree:
        _, residuals = layer.forward(params, x, key)
        return layer.backward(params, residuals, dy, total)[1]

    return gradient
