"""One pass through a model, forward and back, noting what each layer takes and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, random_key, told, whole
from ..contractions import contract_factors, each_delta, is_factor, keep, total
from ..factors.factored import Outer
from ..freezing import plain_path
from ..layer import Layer, unrolled
from ..losses.definition import Loss
from ..recursion import check_batch, paired, separate, with_loss
from .inspection import Inspected, Inspection, sides_of
from .reading import LayerEquations, read

Tree = Any


class Inspect(Protocol):
    """A function of a batch that says what one pass computed."""

    def __call__(
        self, params: Tree, x: Tree, y: Tree, *, example: int | None = 0, key: Array | None = None
    ) -> Inspection:
        """What one pass computed.

        Args:
          params: the model's parameters; ``(model's, loss's)`` for a loss that has parameters.
          x, y: a batch of inputs and targets.
          example: which one to look into; None for the whole batch: its δ are ∂Cₙ/∂z of each
            example, its gradients those of the mean cost.
          key: for the noise of layers such as dropout; without it there is none.

        Raises:
          ModelError: for what does not fit the model.
        """
        ...


def inspect(model: Layer, loss: Loss) -> Inspect:
    """What one pass computes at every layer: z, a, σ′(z), δ, ∂C/∂W, ∂C/∂b.

    The numbers are those of ``model.apply``, ``bp.deltas`` and ``bp.value_and_grad``, with the
    equation that each comes from beside it. Its names tell ∂C/∂z from ∂C/∂a: ``delta`` is always
    δ = ∂C/∂z; ``d_output`` is ∂C/∂(what the layer gives), the layer's entry in ``bp.deltas``. The
    layers of ``bp.repeat`` are there one by one, and counted so.

    Args:
      model, loss: a layer and a loss.

    Returns:
      ``fn(params, x, y, *, example=0, key=None) -> Inspection`` of a batch x, y. It looks into one
      example of it, ``example``, or with ``example=None`` into all: then δ and the like have the
      examples first, and gradients are those of the mean cost. It compiles by itself. Of the
      ``bp.Inspection``, ``found[2]`` is a ``bp.Inspected``, whose help lists what it has.

    Raises:
      ModelError: when called with what does not fit the model; for one example of a model that
        mixes the examples of its batch.

    Example:
      >>> model, loss = bp.chain(bp.dense(2), bp.sigmoid), bp.losses.squared_error
      >>> params = ({"weight": jnp.eye(2), "bias": jnp.zeros(2)}, ())
      >>> found = bp.inspect(model, loss)(params, jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 1.0]]))
      >>> found[0].z.tolist(), found[1].sigma_prime[0].tolist()
      ([0.0, 1.0], 0.25)
      >>> found[0].delta[0].tolist(), found["∂C/∂W¹"][0].tolist()
      (-0.125, [-0.0, -0.125])
    """
    if not isinstance(model, Layer):
        raise ModelError(f"inspect: takes a layer and a loss, got {told(model)}")
    model, loss = paired(model, loss)
    flat = unrolled(model)

    @jax.jit
    def run(params: Tree, x: Tree, y: Tree, key: Array | None) -> Tree:
        recorder = _Recorder()
        cost = with_loss(flat.on_layers(recorder.watched), loss)
        costs, residuals = cost.forward(params, (x, y), key)
        factors = cost.backward(params, residuals, jnp.ones_like(costs), keep)[1]
        return costs, contract_factors(total, factors), recorder.met

    def fn(
        params: Tree, x: Tree, y: Tree, *, example: int | None = 0, key: Array | None = None
    ) -> Inspection:
        n = check_batch(x, y)
        random_key("key", key)
        if example is not None:
            separate(model, loss)
            if whole("example", example, 0) >= n:
                raise ModelError(
                    f"example: takes one of the batch, 0 to {n - 1}, or None for all, got {example}"
                )
            x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf)[example : example + 1], (x, y))
        costs, gradient, met = run(params, x, y, key)
        of_model = loss.of_model(params)
        shown = read(flat, loss, jax.tree.map(lambda leaf: leaf[0], x), of_model)
        count = n if example is None else None
        there = _inspected(shown[0], met, sides_of(*shown), count)
        gradient = _mean(gradient, count)
        return Inspection(costs.mean(), there.output, gradient, there, shown[1], count)

    return fn


class _Recorder:
    """Notes what a model's layers take and give while it runs forward and back."""

    def __init__(self) -> None:
        self.met: dict[str, dict[str, Tree]] = {}

    def watched(self, layer: Layer, where: str) -> Layer:
        """The layer, noting what it meets."""
        alone = not layer.parts

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            y, residuals = layer.forward(params, x, key)
            self.met[where] = {"input": x, "output": y}
            return y, residuals

        def backward(
            params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
        ) -> tuple[Tree, Tree]:
            dx, results = layer.backward(params, residuals, dy, contract)
            here = self.met[where]
            here |= {"d_input": dx, "d_output": dy, "gradient": {}}
            if alone:
                here["d_output"] = layer.backward(params, residuals, dy, each_delta)[1]
                here["gradient"] = contract_factors(total, results)
                if layer.mirrored is not None:
                    here["over_time"] = _pre_activations(params, here["input"], results)
            if layer.elementwise:
                ones = jax.tree.map(jnp.ones_like, dy)
                here["sigma_prime"] = layer.backward(params, residuals, ones, keep)[0]
            return dx, results

        return dataclasses.replace(layer, forward=forward, backward=backward)


def _pre_activations(params: Tree, x: Tree, factors: Tree) -> dict[str, Array]:
    """δ_t of a recurrent layer, the δ of ∂C/∂W_x = Σ_t δ_t x_tᵀ; and where ∂C/∂W_h has the same,
    z_t = W_x x_t + b + W_h h_{t−1}."""
    of_x, of_h = factors["weight_x"], factors.get("weight_h")
    found = {"δ": of_x.u}
    if isinstance(of_h, Outer) and of_h.u is of_x.u:
        of_input = of_x.v @ params["weight_x"].T + params["bias"]
        found["z"] = of_input + of_h.v @ params["weight_h"].T
    return found


def _inspected(
    read: LayerEquations, met: Tree, sides: Mapping[str, str], batch: int | None
) -> Inspected:
    here = met[read.place]
    parts = tuple(_inspected(part, met, sides, batch) for part in read.parts)
    named = {".".join(map(str, keys)): keys for keys in read.parameters}
    flat = dict(_by_keys(here["gradient"]))
    gradient = {name: _mean(flat[keys], batch) for name, keys in named.items() if keys in flat}
    names = ("input", "output", "d_input", "d_output", "sigma_prime", "over_time")
    values = {name: _example(here.get(name), batch) for name in names}
    given: Any = {"gradient": gradient, "parts": parts, "sides": sides, "batch": batch}
    return Inspected(equations=read, **given, **values)


def _by_keys(tree: Tree) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_factor):
        yield plain_path(path), leaf


def _example(tree: Tree, batch: int | None) -> Tree:
    """Arrays of the batch, or of its only example."""
    return tree if batch is not None else jax.tree.map(lambda leaf: leaf[0], tree)


def _mean(tree: Tree, batch: int | None) -> Tree:
    """The gradient of a sum of costs as that of their mean."""
    return jax.tree.map(lambda g: g / (batch or 1), tree)
