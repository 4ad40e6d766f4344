"""Proofs: hand-written rules against autodiff of their textbook form.

    bp.testing.check_layer(my_layer, jnp.zeros(5))

says nothing where a layer's backward pass is right, over one example and over a batch and for
every contraction of its factors. Otherwise it raises ``AssertionError`` with the quantity, the
leaf, the largest error and where it is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .checks import ModelError, arrays_of, floating, number, random_key, whole
from .contractions import (
    Contraction,
    Dot,
    contract_factors,
    drop,
    each,
    gram,
    is_factor,
    keep,
    second_moment,
    squared_norm,
    total,
)
from .factors import Factored, per_example
from .gradients import deltas, value_and_grad
from .layer import Layer, a_layer, batch_size, place, shapes_of, textbook
from .losses import Loss
from .per_example import clipped_grad, per_example_grad_norms, per_example_grads
from .recursion import check_batch
from .recursion import check_model as check_model_and_loss

Tree = Any
Gradients = np.ndarray  # one parameter's, of every example: (n, *parameter)

TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


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
    layer's textbook form (its ``reference``, or ``forward`` where it has none) each example's
    gradient gₙ for the one cotangent and hₙ for the other. Proven are

        y,  ∂C/∂x,  ∂C/∂θ                                   over one example and over a batch,
        Σₙ gₙ,  gₙ,  ‖gₙ‖²,  ⟨gₙ, gₘ⟩,  mean gₙ²,  ⟨gₙ, v⟩  as contractions on the way down
                                                            and of factors kept,
        ⟨gₙ, hₙ⟩,  ⟨gₙ, hₘ⟩,  wₙ gₙ                           of factors kept,
        Σₙ gₙ of every second parameter, the others dropped, and the other way round.

    The relative error of a leaf is max|Δ| / max|leaf|; the error is absolute where the leaf is 0
    but for rounding: nowhere above ``tolerance``.
    All of it runs operation by operation, which compiles little; the layer is traced as well, so
    that what ``jit`` would refuse is raised here.
    A layer that mixes the examples of a batch has no gₙ: its batched y, ∂C/∂x and totals are
    proven.

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
    """
    a_layer("layer", layer)
    with place("x:"):
        shapes_of(x)
    whole("batch", batch)
    proof = _proof(layer.name, dtype, tolerance, key, seed)
    draw = _Draw(np.random.default_rng(seed), dtype)
    with jax.enable_x64(True), jax.disable_jit():
        examples = [draw.example_like(x) for _ in range(batch)]
        with jax.disable_jit(False):
            params = layer.init(jax.random.key(seed), examples[0])
        params = draw.moved(params)
        if not layer.mixes_examples:
            _prove_one(proof.within("over one example"), draw, layer, params, examples[0], key)
        _prove_batch(proof.within("over a batch"), draw, layer, params, _batch(examples), key)


def check_model(
    model: Layer,
    loss: Loss,
    params: Tree,
    x: Tree,
    y: Tree,
    *,
    key: Array | None = None,
    dtype: str = "float64",
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Proves a model with its loss: ``bp.testing.check_model(model, loss, params, x, y)``.

    With the costs Cₙ of the textbook form, gₙ = ∂Cₙ/∂θ by ``jax.vjp``, random weights wₙ of which
    one is 0, and a bound c between the smallest and the largest norm, proven are

        value_and_grad            Σ wₙ Cₙ / Σ wₙ  and  Σ wₙ gₙ / Σ wₙ
        clipped_grad              Σ wₙ gₙ min(1, c / ‖gₙ‖) / batch
        per_example_grads         gₙ
        per_example_grad_norms    ‖gₙ‖
        deltas                    ∂Cₙ/∂ε, for an ε = 0 added to the output of each rule

    the first two with weights and without; in ``repeat``, the sum of its layers' deltas. A model
    that mixes the examples of a batch has no gₙ: only the first and the last are proven.

    Args:
      model, loss: any layer, and a loss such as those of ``bp.losses``.
      params: the model's parameters; noise is added, so that no bias of 0 hides a fault.
      x, y: a batch, the examples on the first axis of every array.
      key: randomness for a random model; without it there is none.
      dtype, tolerance, seed: as for ``check_layer``.

    Raises:
      AssertionError: as ``check_layer``.
    """
    check_model_and_loss(model, loss)
    arrays_of("params", params)
    check_batch(x, y)
    proof = _proof(model.name, dtype, tolerance, key, seed)
    draw = _Draw(np.random.default_rng(seed), dtype)
    with jax.enable_x64(True), jax.disable_jit():
        params, x, y = draw.moved(params), draw.cast(x), draw.cast(y)
        _prove_quantities(proof, draw, model, loss, params, x, y, key)
        _prove_deltas(proof, model, loss, params, x, y, key)


def _proof(name: str, dtype: str, tolerance: float | None, key: Array | None, seed: int) -> _Proof:
    floating("dtype", dtype)
    if tolerance is None:
        tolerance = TOLERANCE.get(dtype)
    if tolerance is None:
        raise ModelError(f"tolerance: takes a number for the dtype {dtype}, got None")
    random_key("key", key)
    whole("seed", seed, 0)
    return _Proof(name, dtype, number("tolerance", tolerance, above=0))


# ---- a layer ----------------------------------------------------------------------------------


def _prove_one(
    proof: _Proof, draw: _Draw, layer: Layer, params: Tree, x: Tree, key: Array | None
) -> None:
    formula = textbook(layer)
    wanted_y, pullback = jax.vjp(lambda p, x: formula.forward(p, x, key)[0], params, x)
    dy = draw.cotangent(wanted_y)
    gradient, wanted_dx = pullback(_for_vjp(wanted_y, dy))

    y, residuals = layer.forward(params, x, key)
    dx, found = layer.backward(params, residuals, dy, _EachOfOne())
    proof.equal("output", y, wanted_y)
    proof.equal("input gradient", _where_float(x, dx), _where_float(x, wanted_dx))
    proof.equal("gradient", found, gradient)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _EachOfOne(Contraction):
    """g, from the factors of a rule over one example, which have no axis for the examples."""

    additive = True

    def __call__(self, factor: Factored) -> Array:
        of_one = jax.tree.map(lambda array: lax.expand_dims(array, (0,)), factor)
        return lax.squeeze(of_one.each(), (0,))


def _prove_batch(
    proof: _Proof, draw: _Draw, layer: Layer, params: Tree, x: Tree, key: Array | None
) -> None:
    wanted_y, pullback = jax.vjp(_over_batch(layer, key), params, x)
    dy, dy_other = draw.cotangent(wanted_y), draw.cotangent(wanted_y)

    def gradients(dy: Tree) -> Tree:
        """gₙ: what comes down when every other example's cotangent is 0."""
        each = []
        for one in np.eye(batch_size(x)):
            alone = jax.tree.map(functools.partial(per_example, jnp.asarray(one, draw.dtype)), dy)
            each.append(pullback(_for_vjp(wanted_y, alone))[0])
        return _stacked(each)

    y, residuals = layer.batched.forward(params, x, key)
    backward = functools.partial(layer.batched.backward, params, residuals)
    dx, factors = backward(dy, keep)
    proof.equal("output", y, wanted_y)
    wanted_dx = pullback(_for_vjp(wanted_y, dy))[1]
    proof.equal("input gradient", _where_float(x, dx), _where_float(x, wanted_dx))

    g, v = gradients(dy), jax.tree.map(lambda p: draw.normal(p.shape), params)
    for name, contract, wanted in _contractions(g, v):
        if layer.mixes_examples and not name.startswith("total"):
            continue
        proof.equal(name, backward(dy, contract)[1], wanted)
        proof.equal(f"keep, then {name}", contract_factors(contract, factors), wanted)
    if not layer.mixes_examples:
        h, others = gradients(dy_other), backward(dy_other, keep)[1]
        _prove_factors(proof, factors, others, g, h, draw.normal((batch_size(x),)))
    with jax.disable_jit(False):
        jax.eval_shape(_gradient_alone(layer, key), params, x, dy)


def _contractions(g: Tree, v: Tree) -> Iterator[tuple[str, Tree, Tree]]:
    """What may be asked of a layer over a batch: its name, the contraction, and the result by
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
    dot = jax.tree.map(lambda g, v: _rows(g) @ _float64(v).reshape(-1), g, v)
    yield "dot", jax.tree.map(Dot, v), dot


def _prove_factors(proof: _Proof, factors: Tree, others: Tree, g: Tree, h: Tree, w: Array) -> None:
    """What factors know beyond their contractions."""

    def of(function: Callable[..., Array], *factors: Tree) -> Tree:
        return jax.tree.map(function, *factors, is_leaf=is_factor)

    found = of(lambda f, h: f.inner(h), factors, others)
    proof.equal("inner", found, jax.tree.map(lambda g, h: _gram(g, h).diagonal(), g, h))
    found = of(lambda f, h: f.gram(h), factors, others)
    proof.equal("gram of two", found, jax.tree.map(_gram, g, h))
    found = of(lambda f: f.scaled(w).each(), factors)
    proof.equal("scaled", found, jax.tree.map(lambda g: (_float64(w) * g.T).T, g))


def _rows(g: Gradients) -> np.ndarray:
    return g.reshape(len(g), -1)


def _total(g: Gradients) -> np.ndarray:
    return g.sum(0)


def _gram(g: Gradients, h: Gradients) -> np.ndarray:
    return _rows(g) @ _rows(h).T


def _squared_norm(g: Gradients) -> np.ndarray:
    return (_rows(g) ** 2).sum(1)


def _over_batch(layer: Layer, key: Array | None) -> Callable[[Tree, Tree], Tree]:
    """The textbook form over a batch: one example's by ``vmap``, so that what the layer does over
    a batch is proven too; its own where examples need each other, or a key of their own."""
    if layer.mixes_examples or key is not None:
        formula = textbook(layer.batched)
        return lambda params, x: formula.forward(params, x, key)[0]
    formula = textbook(layer)
    return lambda params, x: jax.vmap(lambda x: formula.forward(params, x)[0])(x)


def _gradient_alone(layer: Layer, key: Array | None) -> Callable[[Tree, Tree, Tree], Tree]:
    def gradient(params: Tree, x: Tree, dy: Tree) -> Tree:
        _, residuals = layer.batched.forward(params, x, key)
        return layer.batched.backward(params, residuals, dy, total)[1]

    return gradient


# ---- a model with its loss --------------------------------------------------------------------


def _prove_quantities(
    proof: _Proof,
    draw: _Draw,
    model: Layer,
    loss: Loss,
    params: Tree,
    x: Tree,
    y: Tree,
    key: Array | None,
) -> None:
    def costs_of(params: Tree) -> Array:
        return jax.vmap(loss.value)(_over_batch(model, key)(params, x), y)

    costs, pullback = jax.vjp(costs_of, params)
    g = _stacked([pullback(jnp.asarray(one, costs.dtype))[0] for one in np.eye(len(costs))])
    norms = np.sqrt(sum(map(_squared_norm, jax.tree.leaves(g)), np.zeros(len(costs))))
    bound = float(norms.min() + norms.max()) / 2 or 1.0
    weights = draw.weights(len(costs))

    def weighted(w: np.ndarray) -> Tree:
        return jax.tree.map(lambda g: np.tensordot(w, g, 1), g)

    for told, given in (("", None), (" with weights", weights)):
        w = np.ones(len(costs)) if given is None else _float64(given)
        value, gradient = value_and_grad(model, loss)(params, x, y, weights=given, key=key)
        proof.equal(f"value{told}", value, w @ _float64(costs) / w.sum())
        proof.equal(f"grad{told}", gradient, weighted(w / w.sum()))
        if not model.mixes_examples:
            clipped = clipped_grad(model, loss, bound)(params, x, y, weights=given, key=key)
            wanted = weighted(w * bound / np.maximum(bound, norms) / len(costs))
            proof.equal(f"clipped_grad{told}", clipped, wanted)
    if not model.mixes_examples:
        each, found_norms = (
            quantity(model, loss)(params, x, y, key=key)
            for quantity in (per_example_grads, per_example_grad_norms)
        )
        proof.equal("per_example_grads", each, g)
        proof.equal("per_example_grad_norms", found_norms, norms)


def _prove_deltas(
    proof: _Proof, model: Layer, loss: Loss, params: Tree, x: Tree, y: Tree, key: Array | None
) -> None:
    formula = textbook(model.batched)
    shapes: dict[int, Tree] = {}

    def total_cost(moves: dict[int, Tree]) -> Array:
        moved = _outputs_moved(formula, moves, shapes, itertools.count())
        return jax.vmap(loss.value)(moved.forward(params, x, key)[0], y).sum()

    total_cost({})
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype) if _is_float(y) else None, shapes)
    wanted = jax.tree.leaves(jax.grad(total_cost)(zeros))
    # Through time deltas shows more than ∂C/∂(output): here it is asked for that alone.
    outputs = replace(model, lift=lambda: _without_probes(model.batched))
    found = _leaves(deltas(outputs, loss)(params, x, y, key=key))
    if len(found) != len(wanted):
        raise AssertionError(f"{proof.name}: {len(found)} deltas for {len(wanted)} outputs")
    for (path, delta), leaf in zip(found.items(), wanted):
        of_stack = range(1, 1 + delta.ndim - leaf.ndim)
        proof.equal(f"deltas{path}", delta.sum(of_stack), leaf)


def _without_probes(layer: Layer) -> Layer:
    if layer.rebuild is not None:
        return layer.rebuild(*map(_without_probes, layer.parts))
    return replace(layer, probe=None)


def _outputs_moved(
    layer: Layer, moves: dict[int, Tree], shapes: dict[int, Tree], count: Iterator[int]
) -> Layer:
    """The layer with a move added to each rule's output, the rules counted in their order; without
    moves, the outputs' shapes are noted."""
    if layer.rebuild is not None:
        return layer.rebuild(*(_outputs_moved(p, moves, shapes, count) for p in layer.parts))
    i = next(count)

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        y, residuals = layer.forward(params, x, key)
        if not moves:
            shapes[i] = jax.eval_shape(lambda: y)
            return y, residuals
        return jax.tree.map(lambda y, move: y if move is None else y + move, y, moves[i]), residuals

    return replace(layer, forward=forward)


# ---- what is drawn, and how it is compared ----------------------------------------------------


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _float64(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _batch(examples: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *examples)


def _stacked(gradients: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack([_float64(leaf) for leaf in leaves]), *gradients)


@dataclass(frozen=True)
class _Draw:
    """Random numbers, from NumPy: nothing is compiled for them."""

    random: np.random.Generator
    dtype: str

    def normal(self, shape: tuple[int, ...]) -> Array:
        return jnp.asarray(self.random.normal(size=shape), self.dtype)

    def weights(self, n: int) -> Array:
        """Between ½ and 2, and one of 0."""
        weights = self.random.uniform(0.5, 2, n)
        return jnp.asarray(np.where(np.arange(n) == 1, 0, weights), self.dtype)

    def example_like(self, x: Tree) -> Tree:
        """An example: floats drawn, integers as they are, 0 where x has only shapes."""

        def leaf_like(leaf: Any) -> Array:
            if not hasattr(leaf, "dtype"):
                leaf = np.asarray(leaf)
            if _is_float(leaf):
                return self.normal(leaf.shape)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = np.zeros(leaf.shape, leaf.dtype)
            return jnp.asarray(leaf)

        return jax.tree.map(leaf_like, x)

    def cast(self, tree: Tree) -> Tree:
        """The tree with its floats in the dtype of the proof."""

        def cast(leaf: Any) -> Array:
            return jnp.asarray(_float64(leaf), self.dtype) if _is_float(leaf) else jnp.asarray(leaf)

        return jax.tree.map(cast, tree)

    def moved(self, params: Tree) -> Tree:
        """The parameters with noise added, so that none is 0."""

        def moved(p: Array) -> Array:
            return jnp.asarray(_float64(p) + 0.2 * self.random.normal(size=p.shape), self.dtype)

        return jax.tree.map(moved, params)

    def cotangent(self, y: Tree) -> Tree:
        """A random δ for floating-point outputs, None for others."""
        return jax.tree.map(lambda leaf: self.normal(leaf.shape) if _is_float(leaf) else None, y)


def _for_vjp(y: Tree, dy: Tree) -> Tree:
    """A cotangent as ``jax.vjp`` takes it."""

    def leaf(y: Array, d: Array | None) -> Any:
        return np.zeros(y.shape, jax.dtypes.float0) if d is None else d

    return jax.tree.map(leaf, y, dy)


def _where_float(x: Tree, dx: Tree) -> Tree:
    """∂C/∂x at floating-point inputs; nothing is asked of it at others."""
    if dx is None:
        return None
    return jax.tree.map(lambda leaf, d: d if _is_float(leaf) else None, x, dx)


def _leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as ``[2]['weight']``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


@dataclass(frozen=True)
class _Proof:
    """Compares, and says what differs."""

    name: str
    dtype: str
    tolerance: float

    def within(self, form: str) -> _Proof:
        return replace(self, name=f"{self.name} {form}")

    def equal(self, quantity: str, found: Tree, wanted: Tree) -> None:
        ours, theirs = _leaves(found), _leaves(wanted)
        for path in theirs.keys() ^ ours.keys():
            wrong = "is missing" if path in theirs else "should not be there"
            raise AssertionError(f"{self.name}: {quantity}, leaf {path or 'x'} {wrong}")
        for path, leaf in theirs.items():
            where = f"{self.name}: {quantity}" + (f", leaf {path}" if path else "")
            self._close(where, ours[path], leaf)

    def _close(self, where: str, found: Any, wanted: Any) -> None:
        widest = jnp.promote_types(self.dtype, jnp.float32)
        if jnp.promote_types(found.dtype, widest) != widest:
            raise AssertionError(f"{where}: {found.dtype} by hand, {self.dtype} was given")
        if found.shape != wanted.shape:
            raise AssertionError(f"{where}: shape {found.shape} by hand, {wanted.shape} wanted")
        if not wanted.size:
            return
        found, wanted = _float64(found), _float64(wanted)
        scale = np.abs(wanted).max()
        relative = scale > self.tolerance
        errors = np.abs(found - wanted) / (scale if relative else 1)
        worst = np.unravel_index(np.argmax(errors), errors.shape)
        if not errors[worst] <= self.tolerance:
            raise AssertionError(
                f"{where}: {'relative' if relative else 'absolute'} error {errors[worst]:.3g}, "
                f"at most {self.tolerance:g}; largest at {tuple(map(int, worst))}: "
                f"{found[worst]} by hand, {wanted[worst]} wanted"
            )
