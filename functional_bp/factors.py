"""Factored gradients: what a parameter's gradient is before anyone multiplies it out.

BP3 and BP4 say that one example's gradient is made of two small things, a δ and an activation:

    ∂C/∂b = δ                (BP3)
    ∂C/∂W = δ aᵀ             (BP4)

A class here is one way in which a parameter meets its input. Each knows every contraction of the
batch of gradients gₙ it stands for, by the cheapest route for its shapes:

    total()          Σₙ gₙ                the gradient of a sum
    each()           gₙ                   one gradient per example, multiplied out
    squared_norm()   ‖gₙ‖²
    inner(other)     ⟨gₙ, hₙ⟩             cross terms of a parameter used in two places
    gram(other)      ⟨gₙ, hₘ⟩             for every pair of examples
    dot(v)           ⟨gₙ, v⟩
    second_moment()  mean over n of gₙ²
    scaled(w)        the factors of wₙ gₙ
    among(mask)      the factors of gₙ where mask, of 0 elsewhere

Every array in a factored gradient has the examples on its first axis; a rule, which sees one
example, builds one without that axis and ``vmap`` adds it.

Index letters in every einsum of this file: n, m examples; t, s positions; o the rows of the
parameter; i its columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype in which sums over examples and positions run: float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


class Factored:
    """Gradients of one parameter for a batch of examples, not multiplied out.

    A new way for a parameter to meet its input needs only ``each`` and ``scaled``: what is here
    is every other contraction by its definition, right for any class and overridden where the
    factors allow better.
    """

    def each(self) -> Array:
        """gₙ, shape ``(n, *parameter)``."""
        raise TypeError(f"{type(self).__name__} does not define each()")

    def scaled(self, weights: Array) -> Factored:
        """The factored gradients wₙ gₙ; ``weights`` is ``(n,)``."""
        raise TypeError(f"{type(self).__name__} does not define scaled()")

    def among(self, mask: Array) -> Factored:
        """The factored gradients gₙ where ``mask``, ``(n,)``, and 0 elsewhere, even for NaN."""
        return jax.tree.map(
            lambda leaf: jnp.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), self
        )

    def total(self) -> Array:
        """Σₙ gₙ, shape ``(*parameter)``."""
        return self.each().sum(0)

    def squared_norm(self) -> Array:
        """‖gₙ‖², shape ``(n,)``."""
        return self.inner(self)

    def inner(self, other: Factored) -> Array:
        """⟨gₙ, hₙ⟩, shape ``(n,)``."""
        return jnp.einsum("ni,ni->n", _flat(self.each()), _flat(other.each()))

    def gram(self, other: Factored) -> Array:
        """⟨gₙ, hₘ⟩, shape ``(n, m)``."""
        return jnp.einsum("ni,mi->nm", _flat(self.each()), _flat(other.each()))

    def dot(self, v: Array) -> Array:
        """⟨gₙ, v⟩, shape ``(n,)``; ``v`` has the parameter's shape."""
        return jnp.einsum("ni,i->n", _flat(self.each()), v.reshape(-1))

    def second_moment(self) -> Array:
        """Mean over n of gₙ², element by element, shape ``(*parameter)``."""
        return (self.each() ** 2).mean(0)


def _flat(each: Array) -> Array:
    return each.reshape(each.shape[0], -1)


def per_example(weights: Array, leaf: Array) -> Array:
    """wₙ times example n of ``leaf``."""
    return weights.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype) * leaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclass(frozen=True)
class Itself(Factored):
    """The gradient itself, gₙ: biases and scales, whose gradients are no larger than a δ (BP3).

    ``g`` is ``(n, *parameter)``.
    """

    g: Array

    def each(self) -> Array:
        return self.g

    def scaled(self, weights: Array) -> Itself:
        return Itself(per_example(weights, self.g))

    def total(self) -> Array:
        return self.g.sum(0, dtype=accumulator(self.g))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["g"], meta_fields=[])
@dataclass(frozen=True)
class Summed(Factored):
    """gₙ = Σ_t g_t for a parameter that is a vector: a bias or scale used at every position.

    ``g`` is ``(n, *positions, o)`` and the parameter ``(o,)``.
    """

    g: Array

    def each(self) -> Array:
        return self.g.sum(range(1, self.g.ndim - 1), dtype=accumulator(self.g))

    def scaled(self, weights: Array) -> Summed:
        return Summed(per_example(weights, self.g))

    def total(self) -> Array:
        return self.g.sum(range(self.g.ndim - 1), dtype=accumulator(self.g))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "v"], meta_fields=[])
@dataclass(frozen=True)
class Outer(Factored):
    """gₙ = Σ_t u_t v_tᵀ: an outer product summed over the example's positions (BP4).

    ``u`` is ``(n, *positions, o)`` and ``v`` is ``(n, *positions, i)``; the parameter is
    ``(o, i)``. A dense layer on plain vectors has no position axis.
    """

    u: Array
    v: Array

    def _positions(self) -> Outer:
        """The same gradient with all its positions on one axis: u (n, t, o), v (n, t, i)."""
        n, o, i = self.u.shape[0], self.u.shape[-1], self.v.shape[-1]
        return Outer(self.u.reshape(n, -1, o), self.v.reshape(n, -1, i))

    def each(self) -> Array:
        f = self._positions()
        return jnp.einsum(
            "nto,nti->noi", f.u, f.v, preferred_element_type=accumulator(self.u, self.v)
        )

    def scaled(self, weights: Array) -> Outer:
        return Outer(per_example(weights, self.u), self.v)

    def total(self) -> Array:
        # One matrix product over examples and positions together. Said as uᵀ v it costs what
        # autodiff's does; as einsum("no,ni->oi") it was a quarter slower.
        u, v = self.u.reshape(-1, self.u.shape[-1]), self.v.reshape(-1, self.v.shape[-1])
        return jnp.matmul(u.T, v, preferred_element_type=accumulator(u, v))

    def inner(self, other: Factored) -> Array:
        if not isinstance(other, Outer):
            return super().inner(other)
        f, g = self._positions(), other._positions()
        (_, t, o), (_, s, i) = f.u.shape, (*g.v.shape,)
        if t == s == 1:
            return ((f.u * g.u).sum((1, 2))) * ((f.v * g.v).sum((1, 2)))
        if t * s * (o + i) <= (t + s) * o * i:  # Σ_ts (u_t·u'_s)(v_t·v'_s): products of Grams
            return _by_example(_inner_by_gram, t * s, f, g)
        return _by_example(_inner_by_definition, o * i, f, g)

    def gram(self, other: Factored) -> Array:
        if not isinstance(other, Outer) or self.u.ndim > 2 or other.u.ndim > 2:
            return super().gram(other)
        return jnp.einsum("no,mo->nm", self.u, other.u) * jnp.einsum("ni,mi->nm", self.v, other.v)

    def dot(self, v: Array) -> Array:
        f = self._positions()
        return jnp.einsum("nto,oi,nti->n", f.u, v, f.v)

    def second_moment(self) -> Array:
        if self.u.ndim > 2:
            return super().second_moment()
        return jnp.einsum("no,ni->oi", self.u**2, self.v**2) / self.u.shape[0]


def _inner_by_gram(f: Outer, g: Outer) -> Array:
    return jnp.einsum(
        "nts,nts->n", jnp.einsum("nto,nso->nts", f.u, g.u), jnp.einsum("nti,nsi->nts", f.v, g.v)
    )


def _inner_by_definition(f: Outer, g: Outer) -> Array:
    return jnp.einsum("noi,noi->n", f.each(), f.each() if f is g else g.each())


def _by_example(
    inner: Callable[[Outer, Outer], Array], intermediate: int, f: Outer, g: Outer
) -> Array:
    """``inner(f, g)``, a few examples at a time where its intermediates (``intermediate`` numbers
    an example) would take more memory than the factors themselves."""
    n = f.u.shape[0]
    at_once = max(1, (f.u.size + f.v.size) // intermediate)
    if at_once >= n:
        return inner(f, g)

    def one(pair: tuple[Outer, Outer]) -> Array:
        f, g = jax.tree.map(lambda leaf: leaf[None], pair)
        return inner(f, g)[0]

    return lax.map(one, (f, g), batch_size=at_once if at_once > 1 else None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class Sum(Factored):
    """gₙ = fₙ + f'ₙ + …: a parameter used in several places.

    Its norms contain the cross terms ⟨fₙ, f'ₙ⟩ between the uses.
    """

    parts: tuple[Factored, ...]

    def each(self) -> Array:
        return sum(f.each() for f in self.parts)  # type: ignore[return-value]

    def scaled(self, weights: Array) -> Sum:
        return Sum(tuple(f.scaled(weights) for f in self.parts))

    def among(self, mask: Array) -> Sum:
        return Sum(tuple(f.among(mask) for f in self.parts))

    def total(self) -> Array:
        return sum(f.total() for f in self.parts)  # type: ignore[return-value]

    def inner(self, other: Factored) -> Array:
        return sum(f.inner(g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def gram(self, other: Factored) -> Array:
        return sum(f.gram(g) for f, g in self._pairs(other))  # type: ignore[return-value]

    def dot(self, v: Array) -> Array:
        return sum(f.dot(v) for f in self.parts)  # type: ignore[return-value]

    def _pairs(self, other: Factored) -> list[tuple[Factored, Factored]]:
        others = other.parts if isinstance(other, Sum) else (other,)
        return [(f, g) for f in self.parts for g in others]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class Stacked(Factored):
    """One factored gradient per layer of a stack: every array of ``layers`` has the layers on
    its first axis and the examples on its second; the parameter is ``(layers, *parameter)``."""

    layers: Factored

    def each(self) -> Array:
        return jax.vmap(lambda f: f.each(), out_axes=1)(self.layers)

    def scaled(self, weights: Array) -> Stacked:
        return Stacked(jax.vmap(lambda f: f.scaled(weights))(self.layers))

    def among(self, mask: Array) -> Stacked:
        return Stacked(jax.vmap(lambda f: f.among(mask))(self.layers))

    def total(self) -> Array:
        return lax.map(lambda f: f.total(), self.layers)

    def inner(self, other: Factored) -> Array:
        return self._sum(lambda f, g: f.inner(g), other)

    def gram(self, other: Factored) -> Array:
        return self._sum(lambda f, g: f.gram(g), other)

    def dot(self, v: Array) -> Array:
        return lax.map(lambda fv: fv[0].dot(fv[1]), (self.layers, v)).sum(0)

    def second_moment(self) -> Array:
        return lax.map(lambda f: f.second_moment(), self.layers)

    def _sum(self, pair: Callable[[Factored, Factored], Array], other: Factored) -> Array:
        if not isinstance(other, Stacked):
            raise TypeError(f"a stacked gradient meets another of the same stack, not {other}")
        return lax.map(lambda fg: pair(*fg), (self.layers, other.layers)).sum(0)
