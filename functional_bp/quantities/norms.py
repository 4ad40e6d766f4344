"""Norms of per-example gradients, over all parameters or over groups of them."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

Tree = Any
Groups = Literal["model", "layer", "parameter"]


def norms_of(squared: Tree, per: Groups, costs: Array) -> Tree:
    """Norms of each group of parameters, ``(*layers of the stack, batch)``, from their squares."""
    if per == "parameter":
        return jax.tree.map(_root, squared)

    def norm(below: Tree) -> Tree:
        leaves = jax.tree.leaves(below)
        return _root(functools.reduce(jnp.add, leaves)) if leaves else below

    if per == "layer":
        return jax.tree.map(norm, squared, is_leaf=lambda node: isinstance(node, dict))
    leaves = jax.tree.leaves(squared)
    return _root(sum((s.sum(range(s.ndim - 1)) for s in leaves), jnp.zeros_like(costs)))


def _root(squared: Array) -> Array:
    """√, with a derivative of 0 at 0: that of the norm of a gradient that stays 0."""
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def examples_first(norms: Tree) -> Tree:
    """The norms of a stack's layers, ``(batch, *layers)``."""
    return jax.tree.map(lambda norm: jnp.moveaxis(norm, -1, 0), norms)
