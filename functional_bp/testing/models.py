"""The proof of a model with its loss."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import arrays_of
from ..contractions import Contraction, contract_layer, drop, each
from ..layer import Layer, textbook
from ..losses.definition import Loss
from ..quantities.clipping import clipped_grad
from ..quantities.gradients import deltas, value_and_grad
from ..quantities.heads import with_head
from ..quantities.per_example import per_example_grad_norms, per_example_grads
from ..recursion import check_batch, paired, with_loss
from .comparing import Draw, Proof, float64, is_float, leaves_of, proof_of
from .oracle import one_by_one, together

Tree = Any


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

    the first two with weights and without; in ``repeat``, the sum of its layers' deltas. Of a loss
    that states its ``head``, Cₙ and gₙ of that are proven too. A model that mixes the examples of a
    batch has no gₙ: only the first and the last are proven.

    Args:
      model, loss: any layer, and a loss such as those of ``bp.losses``.
      params: the model's parameters; noise is added, so that no bias of 0 hides a fault.
      x, y: a batch, the examples on the first axis of every array.
      key: randomness for a random model; without it there is none.
      dtype, tolerance, seed: as for ``check_layer``.

    Raises:
      AssertionError: as ``check_layer``.

    Example:
      >>> model, loss = bp.chain(bp.dense(4), bp.relu, bp.dense(2)), bp.losses.squared_error
      >>> params = model.init(jax.random.key(0), jnp.ones(3))
      >>> bp.testing.check_model(model, loss, params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
    """
    model, loss = paired(model, loss)
    arrays_of("params", params)
    check_batch(x, y)
    proof = proof_of(model.name, dtype, tolerance, key, seed)
    draw = Draw(np.random.default_rng(seed), dtype)
    with jax.enable_x64(True), jax.disable_jit():
        params, x, y = draw.moved(params), draw.cast(x), draw.cast(y)
        _prove_quantities(proof, draw, model, loss, params, (x, y), key)
        if loss.head is not None and not model.mixes_examples:
            _prove_head(proof, model, loss, params, (x, y), key)
        _prove_deltas(proof, model, loss, params, (x, y), key)


def _prove_quantities(
    proof: Proof,
    draw: Draw,
    model: Layer,
    loss: Loss,
    params: Tree,
    xy: tuple[Tree, Tree],
    key: Array | None,
) -> None:
    cost, n = with_loss(model, loss), check_batch(*xy)
    if model.mixes_examples or key is not None:
        costs, gradients = together(cost, params, xy, key, separate=True)
    else:
        examples = [jax.tree.map(lambda leaf: leaf[i], xy) for i in range(n)]  # noqa: B023
        costs, gradients = one_by_one(cost, params, examples)
    g = gradients(jnp.ones_like(costs))[1]
    squares = [(leaf.reshape(n, -1) ** 2).sum(1) for leaf in jax.tree.leaves(g)]
    norms = np.sqrt(sum(squares, np.zeros(n)))
    bound = float(norms.min() + norms.max()) / 2 or 1.0
    weights = draw.weights(n)

    def weighted(w: np.ndarray) -> Tree:
        return jax.tree.map(lambda g: np.tensordot(w, g, 1), g)

    for told, given in (("", None), (" with weights", weights)):
        w = np.ones(n) if given is None else float64(given)
        value, gradient = value_and_grad(model, loss)(params, *xy, weights=given, key=key)
        proof.equal(f"value{told}", value, w @ float64(costs) / w.sum())
        proof.equal(f"grad{told}", gradient, weighted(w / w.sum()))
        if not model.mixes_examples:
            clipped = clipped_grad(model, loss, bound)(params, *xy, weights=given, key=key)
            wanted = weighted(w * bound / np.maximum(bound, norms) / n)
            proof.equal(f"clipped_grad{told}", clipped, wanted)
    if not model.mixes_examples:
        each, found_norms = (
            quantity(model, loss)(params, *xy, key=key)
            for quantity in (per_example_grads, per_example_grad_norms)
        )
        proof.equal("per_example_grads", each, g)
        proof.equal("per_example_grad_norms", found_norms, norms)


def _prove_head(
    proof: Proof, model: Layer, loss: Loss, params: Tree, xy: tuple[Tree, Tree], key: Array | None
) -> None:
    """The layer and the loss that a loss with parameters says it is the same as."""

    def costs_and_gradients(model: Layer, loss: Loss) -> tuple[Array, Tree]:
        cost = with_loss(model, loss)
        costs, residuals = cost.forward(params, xy, key)
        return costs, cost.backward(params, residuals, jnp.ones_like(costs), each)[1]

    costs, g = costs_and_gradients(model, loss)
    of_head, g_of_head = costs_and_gradients(*with_head(model, loss))
    proof.equal("value of the head", of_head, costs)
    proof.equal("per_example_grads of the head", g_of_head, g)


def _prove_deltas(
    proof: Proof,
    model: Layer,
    loss: Loss,
    params: Tree,
    xy: tuple[Tree, Tree],
    key: Array | None,
) -> None:
    shapes: list[Tree] = []

    def total_cost(moves: list[Tree]) -> Array:
        moved = _outputs_moved(textbook(model), moves, shapes)
        return textbook(with_loss(moved, loss)).forward(params, xy, key)[0].sum()

    total_cost([])
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype) if is_float(y) else None, shapes)
    wanted = jax.tree.leaves(jax.grad(total_cost)(zeros))
    # Through time deltas shows more than ∂C/∂(output): here it is asked for that alone.
    outputs = model.on_layers(_with_delta_of_output)
    found = leaves_of(deltas(outputs, loss)(params, *xy, key=key))
    if len(found) != len(wanted):
        raise AssertionError(f"{proof.name}: {len(found)} deltas for {len(wanted)} outputs")
    for (path, delta), leaf in zip(found.items(), wanted):
        of_stack = range(1, 1 + delta.ndim - leaf.ndim)
        proof.equal(f"deltas{path}", delta.sum(of_stack), leaf)


def _outputs_moved(model: Layer, moves: list[Tree], shapes: list[Tree]) -> Layer:
    """The model with a move added to the output of each layer that is no combination of others, in
    their order; without moves, the outputs' shapes are noted."""
    count = itertools.count()

    def moved(layer: Layer, place: str) -> Layer:
        if layer.parts:
            return layer
        i = next(count)
        shapes.extend([None] * (i + 1 - len(shapes)))

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            y, residuals = layer.forward(params, x, key)
            if not moves:
                shapes[i] = jax.eval_shape(lambda: y)
                return y, residuals
            y = jax.tree.map(lambda y, move: y if move is None else y + move, y, moves[i])
            return y, residuals

        return replace(layer, forward=forward)

    return model.on_layers(moved)


def _with_delta_of_output(layer: Layer, place: str) -> Layer:
    if layer.parts:
        return layer

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Contraction
    ) -> tuple[Tree, Tree]:
        return layer.backward(params, residuals, dy, drop)[0], contract_layer(contract, dy, ())

    return replace(layer, backward=backward)
