"""The embedding: a table of vectors, and the gradient of the few rows that were looked up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, described, floating, function, whole
from ..docstrings import explained
from ..factors.rows import Rows
from ..layer import Layer, check_array
from ..rules import rule
from .dense import Initializer

Tree = Any

standard_normal = jax.nn.initializers.normal(1.0)


@explained(
    forward="y_t = W[k_t] = Wᵀ e_{k_t}",
    backward="∂C/∂W = Σ_t e_{k_t} δ_tᵀ      (BP4)",
    x="k",
)
def embedding(
    vocabulary: int,
    features: int,
    *,
    weight_init: Initializer = standard_normal,
    dtype: Any = jnp.float32,
) -> Layer:
    """A vector for every id.

    It equals a dense layer without bias on one-hot inputs e_k, but never builds those inputs.

    W is ``(vocabulary, features)``, ids k_t ``(*positions,)``, y and δ = ∂C/∂y ``(*positions,
    features)``. Rows that were not looked up have no gradient; ids have no ∂C/∂x: it is None.

    Args:
      vocabulary: the number of ids, which are 0 to vocabulary − 1.
      features: the size of a vector.
      weight_init: ``(key, shape, dtype) -> array``.
      dtype: of the parameter, which cannot follow that of the ids.

    Raises:
      ModelError: if the ids are not integers, or not in the vocabulary; where their values are
        traced, an id outside gives NaN.

    Example:
      >>> layer = bp.embedding(100, 8)
      >>> params = layer.init(jax.random.key(0), jnp.array([3, 1, 4]))
      >>> layer.apply(params, jnp.array([[3, 1, 4]])).shape
      (1, 3, 8)
    """
    whole("embedding: vocabulary", vocabulary)
    whole("embedding: features", features)
    function("embedding: weight_init", weight_init)
    floating("embedding: dtype", dtype)
    of_dtype = "" if dtype == jnp.float32 else f", dtype={jnp.dtype(dtype).name}"
    name = f"embedding({vocabulary}, {features}{of_dtype})"

    def init(key: Array, ids: Array) -> Tree:
        check_ids(ids)
        return {"weight": weight_init(key, (vocabulary, features), dtype)}

    def check_ids(ids: Array) -> None:
        check_array(ids)
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ModelError(f"takes ids as integers, got {described(ids)}")
        if not isinstance(ids, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            given = np.asarray(ids)
            if given.size and (given.min() < 0 or given.max() >= vocabulary):
                raise ModelError(
                    f"takes ids from 0 to {vocabulary - 1}, got {given.min()} to {given.max()}"
                )

    def check(params: Tree, ids: Array) -> None:
        if not isinstance(params, dict) or jax.tree.map(jnp.shape, params) != {
            "weight": (vocabulary, features)
        }:
            raise ModelError(
                f"takes a weight of ({vocabulary}, {features}), got {described(params)}; are they "
                "another model's?"
            )

    def forward(params: Tree, ids: Array, key: Array | None = None) -> tuple[Array, Array]:
        check_ids(ids)
        ids = jnp.asarray(ids)
        return params["weight"].at[ids].get(mode="fill", wrap_negative_indices=False), ids

    def backward(params: Tree, ids: Array, delta: Array) -> tuple[None, Tree]:
        return None, {"weight": Rows(ids, delta, vocabulary)}

    return rule(init, forward, backward, name=name, check=check, batched=True)
