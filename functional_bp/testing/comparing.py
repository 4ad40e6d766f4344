"""What a proof draws, and how it compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checks import ModelError, described, floating, number, random_key, whole
from ..freezing import trainable
from ..layer import Layer

Tree = Any

TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


def proof_of(name: str, dtype: str, tolerance: float | None, key: Array | None, seed: int) -> Proof:
    """What compares in ``dtype``; checks the arguments of a proof."""
    floating("dtype", dtype)
    if tolerance is None:
        tolerance = TOLERANCE.get(dtype)
    if tolerance is None:
        raise ModelError(f"tolerance: takes a number for the dtype {dtype}, got None")
    random_key("key", key)
    whole("seed", seed, 0)
    return Proof(name, dtype, number("tolerance", tolerance, above=0))


def is_float(leaf: Any) -> bool:
    """Whether an array has floating-point numbers."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def float64(leaf: Any) -> np.ndarray:
    """An array as NumPy's, in float64."""
    return np.asarray(leaf).astype(np.float64)


def batch_of(examples: list[Tree]) -> Tree:
    """Examples, one after another on a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *examples)


@dataclass(frozen=True)
class Draw:
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
            if is_float(leaf):
                return self.normal(leaf.shape)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = np.zeros(leaf.shape, leaf.dtype)
            return jnp.asarray(leaf)

        return jax.tree.map(leaf_like, x)

    def cast(self, tree: Tree) -> Tree:
        """The tree with its floats in the dtype of the proof."""

        def cast(leaf: Any) -> Array:
            return jnp.asarray(float64(leaf), self.dtype) if is_float(leaf) else jnp.asarray(leaf)

        return jax.tree.map(cast, tree)

    def moved(self, params: Tree) -> Tree:
        """The parameters with noise added, so that none is 0."""

        def moved(p: Array) -> Array:
            return jnp.asarray(float64(p) + 0.2 * self.random.normal(size=p.shape), self.dtype)

        return jax.tree.map(moved, params)

    def cotangent(self, y: Tree) -> Tree:
        """A random δ for floating-point outputs, None for others."""
        return jax.tree.map(lambda leaf: self.normal(leaf.shape) if is_float(leaf) else None, y)


def for_vjp(y: Tree, dy: Tree) -> Tree:
    """A cotangent as ``jax.vjp`` takes it."""

    def leaf(y: Array, d: Array | None) -> Any:
        return np.zeros(y.shape, jax.dtypes.float0) if d is None else d

    return jax.tree.map(leaf, y, dy)


def where_float(x: Tree, dx: Tree) -> Tree:
    """∂C/∂x at floating-point inputs; nothing is asked of it at others."""
    if dx is None:
        return None
    return jax.tree.map(lambda leaf, d: d if is_float(leaf) else None, x, dx)


def leaves_of(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as ``[2]['weight']``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


@dataclass(frozen=True)
class Proof:
    """Compares, and says what differs."""

    name: str
    dtype: str
    tolerance: float

    def within(self, form: str) -> Proof:
        return replace(self, name=f"{self.name} {form}")

    def renewal(self, layer: Layer, params: Tree, residuals: Tree) -> None:
        """What renews the state leaves everything else, and every shape and dtype, as it is."""
        renewed, is_state = layer.renew(params, residuals), layer.is_state(params)
        if described(renewed) != described(params):
            raise AssertionError(
                f"{self.name}: renew, {described(renewed)}, {described(params)} wanted"
            )
        self.equal("renew", trainable(renewed, is_state), trainable(params, is_state))

    def equal(self, quantity: str, found: Tree, wanted: Tree) -> None:
        ours, theirs = leaves_of(found), leaves_of(wanted)
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
        found, wanted = float64(found), float64(wanted)
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
