"""Each example's gradient, and its norm."""

from __future__ import annotations

from typing import Any

from ..checks import choice
from ..contractions import each, squared_norms
from ..losses.definition import Loss
from ..quantity import Batch, OfExamples, Results, learned, like, of_examples
from ..recursion import Model, separate
from .norms import Groups, examples_first, norms_of

Tree = Any


def per_example_grads(
    model: Model, loss: Loss | None = None, *, microbatch: int | None = None
) -> OfExamples[Tree]:
    """The gradient gₙ of each example's cost Cₙ, unweighted.

    Args:
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, key=None) -> tree`` of ``params``, every leaf with a leading batch
      axis, and None at those that are state.

    Raises:
      ModelError: if a layer mixes examples, and when called with what does not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> gradients = bp.per_example_grads(bp.dense(1), bp.losses.squared_error)
      >>> gradients(params, jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))["bias"].tolist()
      [[2.0], [6.0]]
    """
    cost = separate(model, loss)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        return Results(rows=like(learned(cost, batch.params), r.backward(r.ones, each)))

    return of_examples(cost, formula, microbatch)


def per_example_grad_norms(
    model: Model,
    loss: Loss | None = None,
    *,
    per: Groups = "model",
    microbatch: int | None = None,
) -> OfExamples[Any]:
    """‖gₙ‖, the L2 norm of each example's gradient, without ever forming the gradient.

    For a dense layer ‖δ aᵀ‖² = ‖δ‖² ‖a‖² (Goodfellow 2015, "Efficient per-example gradient
    computations"); each class in ``bp.factors`` has its own.

    Args:
      per: ``"model"``, the norm over all parameters; ``"layer"``, one norm for the parameters of
        each layer (of one dict) together; ``"parameter"``, one for each parameter.
      microbatch: examples at a time; None for all at once.

    Returns:
      ``fn(params, x, y, *, key=None) -> (batch,)``; per layer or parameter a tree of such
      arrays, and of ``(batch, layers)`` in a ``repeat``, whose layers have a norm each.

    Raises:
      ModelError: for an unknown ``per``; if a layer mixes examples, and when called with what does
        not fit the model.

    Example:
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> norms = bp.per_example_grad_norms(bp.dense(1), bp.losses.squared_error)
      >>> print(norms(params, jnp.zeros((2, 1)), jnp.array([[-3.0], [4.0]])).round(2))
      [3. 4.]
    """
    cost = separate(model, loss)
    choice("per", per, Groups)

    def formula(batch: Batch) -> Results:
        r = batch.recursion(cost)
        norms = norms_of(r.backward(r.ones, squared_norms), per, r.costs)
        return Results(rows=examples_first(norms))

    return of_examples(cost, formula, microbatch)
