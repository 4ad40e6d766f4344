"""Models of Flax and Equinox, unchanged, as layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, takes, text, told
from ..docstrings import explained
from ..layer import Layer
from .function import from_function

Tree = Any


@explained(
    forward="y = module.apply(θ, x)",
    backward="δ by autodiff;  where z = W a in the module:  ∂C/∂W = δ aᵀ      (BP4)",
)
def from_flax(
    module: Any, *, noisy: Mapping[str, Any] | None = None, rng: str = "dropout", **options: Any
) -> Layer:
    """A layer from a Flax (linen) module, which is called with batches of one example.

    Its parameters are the module's variables, a dict of collections. Those outside ``"params"``,
    such as ``"batch_stats"``, are state: they have no gradient, and are not renewed.

    Args:
      module: a ``flax.linen.Module``.
      noisy: what ``options`` are where there is a key: ``noisy={"train": True}, train=False``.
      rng: the stream of random numbers that a key is for.
      options: keyword arguments of each call of the module. Batch norm takes its running averages:
        with them an example's gradient is its own.

    Raises:
      ModelError: for what is no Flax module.

    Example:
      >>> import flax.linen as nn
      >>> model = bp.from_flax(nn.Dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones(3))
      >>> norms = bp.per_example_grad_norms(model, bp.losses.squared_error)
      >>> norms(params, jnp.ones((4, 3)), jnp.ones((4, 2))).shape
      (4,)
    """
    if not (hasattr(module, "apply") and hasattr(module, "init")):
        raise ModelError(f"from_flax: takes a flax.linen.Module, got {told(module)}")
    if not isinstance(noisy, Mapping | None):
        raise ModelError(f"from_flax: noisy: takes a dict of keyword arguments, got {told(noisy)}")
    text("from_flax: rng", rng)

    def init(key: Array, x: Tree) -> Tree:
        ones = jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape), leaf.dtype), x)
        return module.init({"params": key, rng: key}, ones, **options)

    def apply(params: Tree, x: Tree, key: Array | None = None) -> Tree:
        how = options if key is None else options | dict(noisy or {})
        rngs = None if key is None else {rng: key}
        return _of_one(lambda batch: module.apply(params, batch, rngs=rngs, **how), x)

    def is_state(params: Tree) -> Tree:
        return {
            name: jax.tree.map(lambda _, of_state=name != "params": of_state, collection)
            for name, collection in params.items()
        }

    name = f"from_flax({type(module).__name__})"
    layer = from_function(apply, init=init, is_state=is_state, name=name)
    return dataclasses.replace(layer, random=noisy is not None)


def _of_one(function: Callable[[Tree], Tree], x: Tree) -> Tree:
    """What a function of a batch gives for a batch of one example."""
    batch = jax.tree.map(lambda leaf: leaf[None], x)
    return jax.tree.map(lambda leaf: leaf[0], function(batch))


def from_nnx(module: Any, *, rng: str = "dropout") -> tuple[Layer, Tree]:
    """A layer and its parameters from a Flax NNX module, which is called with batches of one.

    Without a key the module is as ``module.eval()`` makes it, with one as ``module.train()``. What
    is no ``nnx.Param``, such as running averages, stays as it is.

    Args:
      module: a ``flax.nnx.Module``.
      rng: the stream of random numbers that a key is for.

    Returns:
      ``(layer, params)``, the parameters being the state of its ``nnx.Param``. To have the trained
      ones in the module: ``nnx.update(module, params)``.

    Example:
      >>> from flax import nnx
      >>> model, params = bp.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> norms = bp.per_example_grad_norms(model, bp.losses.squared_error)
      >>> norms(params, jnp.ones((4, 3)), jnp.ones((4, 2))).shape
      (4,)
    """
    from flax import nnx

    text("from_nnx: rng", rng)
    if not isinstance(module, nnx.Module):
        raise ModelError(f"from_nnx: takes a flax.nnx.Module, got {told(module)}")
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]

    def apply(params: Tree, x: Tree, key: Array | None = None) -> Tree:
        model = nnx.merge(graph, *jax.tree.map(_computed_here, (params, rest)))
        if key is None:
            model.eval()
        else:
            model.train()
            nnx.reseed(model, **{rng: key})  # type: ignore[arg-type]
        return _of_one(model, x)

    layer = from_function(apply, name=f"from_nnx({type(module).__name__})")
    parts = [part for _, part in nnx.iter_graph(module)]
    drops = any(isinstance(part, nnx.Dropout) and part.rate > 0 for part in parts)
    return dataclasses.replace(layer, random=drops), params


def _computed_here(leaf: Any) -> Any:
    """A copy that belongs to the function which is traced: others NNX does not let a module change
    or scan over."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return leaf if is_key else leaf + jnp.zeros((), leaf.dtype)


def from_equinox(module: Any) -> tuple[Layer, Tree]:
    """A layer and its parameters from an Equinox module, which is called with one example.

    Without a key the module is as ``eqx.nn.inference_mode`` makes it; with one it is called with
    ``key=``, if it takes one.

    Returns:
      ``(layer, params)``, the parameters being the module with None for all but its floating-point
      arrays. To have the trained ones in the module: ``eqx.combine(params, module)``.

    Example:
      >>> import equinox as eqx
      >>> model, params = bp.from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
      >>> norms = bp.per_example_grad_norms(model, bp.losses.squared_error)
      >>> norms(params, jnp.ones((4, 3)), jnp.ones((4, 2))).shape
      (4,)
    """
    import equinox as eqx

    if not isinstance(module, eqx.Module) or not callable(module):
        raise ModelError(f"from_equinox: takes an equinox.Module to call, got {told(module)}")
    params, static = eqx.partition(module, eqx.is_inexact_array)
    takes_key = takes(module, "key")

    def apply(params: Tree, x: Tree, key: Array | None = None) -> Tree:
        model = eqx.combine(params, static)
        if key is None:
            return eqx.nn.inference_mode(model)(x)
        return model(x, key=key) if takes_key else model(x)

    layer = from_function(apply, name=f"from_equinox({type(module).__name__})")

    def is_dropout(part: Any) -> bool:
        return isinstance(part, eqx.nn.Dropout)

    parts = jax.tree.leaves(module, is_leaf=is_dropout)
    drops = any(is_dropout(part) and part.p > 0 and not part.inference for part in parts)
    return dataclasses.replace(layer, random=takes_key and drops), params
