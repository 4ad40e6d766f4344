"""A model's mean cost and metrics over data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, abstract, function, told
from ..layer import Layer, batch_size, place
from ..losses.definition import Loss, any_target
from ..recursion import Model, cost_itself, paired, with_loss, with_outputs
from .batches import Batches, Padded, each_epoch

Tree = Any
Metric = Callable[[Tree, Tree], Array]


def evaluate(
    model: Model, loss: Loss | None = None, *, metrics: Mapping[str, Metric] | None = None
) -> Callable[[Tree, Batches], dict[str, float]]:
    """The mean cost, and the means of metrics, over batches; without noise.

    Args:
      metrics: by name, functions of a batch's outputs and targets that give one value per
        example: ``{"accuracy": lambda a, y: a.argmax(-1) == y}``.

    Returns:
      ``fn(params, batches) -> {"loss": Σₙ wₙ Cₙ / Σₙ wₙ, name: Σₙ wₙ mₙ / Σₙ wₙ, …}``; batches as
      ``bp.fit`` takes them. It compiles by itself.

    Raises:
      ModelError: for what is no function, when called with what does not fit the model, and for a
        metric that does not give one value per example.
      ValueError: when called with no batches.

    Example:
      >>> model, loss = bp.dense(1), bp.losses.squared_error
      >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.zeros(1)}
      >>> batches = [(jnp.ones((4, 1)), jnp.zeros((4, 1)))]
      >>> bp.evaluate(model, loss)(params, batches)
      {'loss': 2.0}
    """
    model, loss = paired(model, loss)
    check_metrics(metrics, loss)
    added = _added(model, loss, tuple((metrics or {}).items()))

    def fn(params: Tree, batches: Batches) -> dict[str, float]:
        zero = jnp.zeros(())
        sums: Tree = (dict.fromkeys(["loss", *(metrics or {})], zero), zero)
        targets = Targets(model, loss, params)
        padded = Padded(fill=not model.inference().mixes_examples)
        for batch in each_epoch(batches)(0):
            x, y, weights = padded(batch)
            targets.add(x, y, padded.usual)
            sums = added(sums, params, x, y, weights)
        targets.check()
        totals, weight = jax.device_get(sums)
        if weight == 0:
            raise ValueError("batches: takes examples to evaluate, got none with a weight above 0")
        return {name: float(total / weight) for name, total in totals.items()}

    return fn


@functools.lru_cache(maxsize=32)
def _added(
    model: Layer, loss: Loss, metrics: tuple[tuple[str, Metric], ...]
) -> Callable[..., Tree]:
    """``(sums, params, x, y, weights) -> sums``: ({name: Σ w m}, Σ w) with a batch added.

    It is kept, so that a second evaluation of the same model does not compile."""
    model = model.inference()
    cost = with_outputs(model, loss) if metrics else with_loss(model, loss)

    @jax.jit
    def added(sums: Tree, params: Tree, x: Tree, y: Tree, weights: Array) -> Tree:
        found, _ = cost.forward(params, (x, y))
        costs, a = found if metrics else (found, None)
        values = {"loss": costs} | {name: metric(a, y) for name, metric in metrics}
        for name, value in values.items():
            if jnp.shape(value) != weights.shape:
                raise ModelError(
                    f"metrics: {name} takes (outputs, y) to one value per example, "
                    f"{weights.shape}; got {jnp.shape(value)}"
                )
        here = {name: weights @ value.astype(weights.dtype) for name, value in values.items()}
        return jax.tree.map(jnp.add, sums, (here, weights.sum()))

    return added


@functools.lru_cache(maxsize=32)
def _outputs(model: Layer, loss: Loss) -> Any:
    """``(params, x) -> a``, to be traced and never run; kept, so that it is traced once."""
    return jax.jit(lambda params, x: model.apply(loss.of_model(params), x))


class Targets:
    """Looks into the values of targets, such as class ids, which a compiled step cannot.

    It does so at once where a batch is not as those before it. The rest it looks at together when
    the losses are read, because one by one they take a fifth of a small network's step. Targets
    that are on a device already stay there.
    """

    def __init__(self, model: Layer, loss: Loss, params: Tree) -> None:
        self.model, self.loss = model, loss
        self.params = jax.tree.map(lambda p: abstract(p.shape, p.dtype), params)
        self.outputs: Tree = None
        self.unseen: list[Tree] = []

    def add(self, x: Tree, y: Tree, usual: bool) -> None:
        if self.loss.check is any_target:
            return
        if not usual:
            self.check()
            self.outputs = _outputs(self.model, self.loss).eval_shape(self.params, x)
            self.unseen = [y]
            self.check()
        elif _has_ids(y):
            self.unseen.append(y)

    def check(self) -> None:
        targets, self.unseen = self.unseen, []
        if not targets:
            return
        y = jax.tree.map(lambda *leaves: np.concatenate(leaves), *targets)
        outputs = jax.tree.map(
            lambda a: abstract((batch_size(y), *a.shape[1:]), a.dtype), self.outputs
        )
        with place(f"{self.loss.name}:"):
            self.loss.check(outputs, y)


def _has_ids(y: Tree) -> bool:
    """Whether y is on the host and has whole numbers in it."""
    leaves = [y] if isinstance(y, np.ndarray) else jax.tree.leaves(y)
    return any(isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu" for leaf in leaves)


def check_metrics(metrics: Any, loss: Loss) -> None:
    """Raises unless they are functions by name, or None; a cost has no outputs to measure."""
    if metrics and loss is cost_itself:
        raise ModelError("metrics: takes None for a cost, which has no outputs")
    if not isinstance(metrics, Mapping | None):
        raise ModelError(f"metrics: takes a dict of functions by name, got {told(metrics)}")
    for name, metric in (metrics or {}).items():
        function(f"metrics: {name}", metric)
        if name == "loss":
            raise ModelError("metrics: takes names beside the loss's own, got 'loss'")
