"""The embedding: a table of vectors, and the gradient of the few rows that were looked up."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .dense import Initializer
from .factors import Factored, Outer, accumulator, per_example
from .layer import Layer, ModelError, described, rule

Tree = Any

standard_normal = jax.nn.initializers.normal(1.0)


def embedding(
    vocabulary: int,
    features: int,
    *,
    weight_init: Initializer = standard_normal,
    dtype: Any = jnp.float32,
) -> Layer:
    """A vector for every id: a dense layer without bias on one-hot inputs e_k, without them.

    Forward, W ``(vocabulary, features)``, ids k_t ``(*positions,)``, y ``(*positions, features)``:

        y_t = W[k_t] = Wᵀ e_{k_t}

    Backward, δ = ∂C/∂y ``(*positions, features)``:

        ∂C/∂W = Σ_t e_{k_t} δ_tᵀ            (BP4: rows that were not looked up have no gradient)

    and ids have no ∂C/∂x: it is None.

    Args:
      vocabulary: the number of ids, which are 0 to vocabulary − 1.
      features: the size of a vector.
      weight_init: ``(key, shape, dtype) -> array``.
      dtype: of the parameter, which cannot follow that of the ids.

    Raises:
      ModelError: if the ids are not integers, or not in the vocabulary; where their values are
        traced, an id outside gives NaN.
    """
    name = f"embedding({vocabulary}, {features})"

    def init(key: Array, ids: Array) -> Tree:
        check_ids(ids)
        return {"weight": weight_init(key, (vocabulary, features), dtype)}

    def check_ids(ids: Array) -> None:
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

    return rule(init, forward, backward, name=name, check=check, positionwise=True)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "v"], meta_fields=["vocabulary"]
)
@dataclass(frozen=True)
class Rows(Factored):
    """gₙ = Σ_t e_{k_t} v_tᵀ: an outer product whose u is a one-hot row, known by its id k_t.

    ``ids`` is ``(n, *positions)`` and ``v`` ``(n, *positions, i)``; the parameter is
    ``(vocabulary, i)``. u_t·u'_s is 1 where the ids are the same, so no product ever has the
    vocabulary as an axis, but for those that are asked for whole.
    """

    ids: Array
    v: Array
    vocabulary: int

    def _positions(self) -> Rows:
        n, i = self.v.shape[0], self.v.shape[-1]
        return Rows(self.ids.reshape(n, -1), self.v.reshape(n, -1, i), self.vocabulary)

    def each(self) -> Array:
        return jax.vmap(lambda f: f.total())(jax.tree.map(lambda leaf: leaf[:, None], self))

    def scaled(self, weights: Array) -> Rows:
        return Rows(self.ids, per_example(weights, self.v), self.vocabulary)

    def total(self) -> Array:
        v = self.v.astype(accumulator(self.v))
        zeros = jnp.zeros((self.vocabulary, v.shape[-1]), v.dtype)
        return zeros.at[self.ids].add(v, mode="drop", wrap_negative_indices=False)

    def inner(self, other: Factored) -> Array:
        if not isinstance(other, (Rows, Outer)):
            return super().inner(other)

        def of_example(pair: tuple[Rows, Factored]) -> Array:
            f, g = jax.tree.map(lambda leaf: leaf[None], pair)
            return f.gram(g)[0, 0]

        return lax.map(of_example, (self, other))

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, (Rows, Outer)):
            return super().gram(other)

        def row(f: Rows) -> Array:  # Σ_ts (u_t·u'_s)(v_t·v'_s), u_t·u'_s = u'_s at k_t
            if isinstance(g, Rows):
                u = (f.ids[:, None, None] == g.ids).astype(f.v.dtype)
            else:
                u = jnp.moveaxis(g.u[..., f.ids], -1, 0)
            return jnp.einsum("tms,ti,msi->m", u, f.v, g.v)

        g = other._positions()
        return lax.map(row, self._positions())

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return jnp.einsum("nti,nti->n", v[f.ids], f.v)
