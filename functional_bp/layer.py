"""Layers: rules for one example, and their form over a batch.

A *rule* is what a person writes: three pure functions on one example, with no batch axis.

    init(key, x)                        -> params           x: an example, or its ShapeDtypeStruct
    forward(params, x, key=None)        -> (y, residuals)   residuals: exactly what backward reads
    backward(params, residuals, dy)     -> (dx, factors)    one factored gradient per parameter

A *layer* is a rule together with its form over a batch: ``vmap`` of the rule, unless it brings
its own. Over a batch, ``backward`` also takes a contraction for every parameter and returns what
they make of the factors:

    batched.backward(params, residuals, dy, contract) -> (dx, results)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from .checks import ModelError, abstract, described, flag, function, random_key, text, told
from .contractions import contract_factors, keep
from .factors import Factored
from .meshes import by_examples, on_mesh

Tree = Any


@contextlib.contextmanager
def place(where: str) -> Iterator[None]:
    """Puts a layer's place in the model in front of what is raised inside."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where} {error}") from None
    except Exception as error:
        error.add_note(f"in {where}")
        raise


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer or a model: a rule with its form over a batch.

    Attributes:
      name: how errors and summaries call it, such as ``dense(256)``.
      init: ``(key, x) -> params``; ``x`` is one example's input or its ``ShapeDtypeStruct``.
      forward: ``(params, x, key=None) -> (y, residuals)``, of one example.
      backward: ``(params, residuals, dy, contract=keep) -> (dx, results)``, of one example; without
        a contraction it returns the factored gradients themselves.
      apply: ``(params, x, key=None) -> y``, over a batch: what one calls to predict.
      batched: the layer whose ``forward`` and ``backward`` are over a batch.
      reference: ``(params, x, key=None) -> y``, the textbook formula, where ``forward`` is not
        what one would write for autodiff; what autodiff and the proofs differentiate.
      probe: ``(params, residuals, dy) -> (dx, δ)``, of a batched form, where the δ that
        ``bp.deltas`` shows is more than dy (through time it is that of the states).
      parts, rebuild: for a combinator, its layers and the function that makes it from others.
      mixes_examples: the output of one example depends on the others of its batch.
    """

    name: str
    init: Callable[..., Tree]
    forward: Callable[..., tuple[Tree, Tree]]
    backward: Callable[..., tuple[Tree, Tree]]
    lift: Callable[[], Layer] | None = None
    reference: Callable[..., Tree] | None = None
    probe: Callable[..., tuple[Tree, Tree]] | None = None
    parts: tuple[Layer, ...] = ()
    rebuild: Callable[..., Layer] | None = None
    mixes_examples: bool = False

    def __post_init__(self) -> None:
        text("layer: name", self.name)
        for what in ("init", "forward", "backward"):
            function(f"{self.name}: {what}", getattr(self, what))
        for what in ("lift", "reference", "probe", "rebuild"):
            function(f"{self.name}: {what}", getattr(self, what), or_none=True)
        flag(f"{self.name}: mixes_examples", self.mixes_examples)

    @functools.cached_property
    def batched(self) -> Layer:
        """The same layer over a batch: every input, output and residual has the examples first."""
        if self.lift is None:
            raise TypeError(f"{self.name} is a batched form already")
        return self.lift()

    def apply(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """Outputs for a batch.

        Without ``key`` nothing is random (inference): dropout is the identity.

        Raises:
          ModelError: where parameters, inputs or key do not fit the model.
        """
        random_key("key", key)
        with place("x:"):
            batch_size(x)

        def outputs(params: Tree, x: Tree, key: Array | None) -> Tree:
            return self.batched.forward(params, x, key)[0]

        return on_mesh(outputs, params, x, key, results=lambda: by_examples(x))

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ModelError(
            f"{self.name}: is a layer, not a function; model.apply(params, x) gives outputs"
        )

    def __repr__(self) -> str:
        return self.name


def a_layer(what: str, value: Any) -> Layer:
    """A layer or model."""
    if not isinstance(value, Layer):
        raise ModelError(f"{what}: takes a bp.Layer, got {told(value)}")
    return value


def no_parameters(key: Array, x: Tree) -> Tree:
    """``init`` of a rule without parameters."""
    return ()


def rule(
    init: Callable[..., Tree],
    forward: Callable[..., tuple[Tree, Tree]],
    backward: Callable[..., tuple[Tree, Tree]],
    *,
    name: str = "rule",
    check: Callable[[Tree, Tree], None] = lambda params, x: None,
    reference: Callable[..., Tree] | None = None,
    random: bool = False,
    positionwise: bool = False,
    batched: Layer | None = None,
) -> Layer:
    """A layer from three pure functions on one example.

    Args:
      init: ``(key, x) -> params``; ``x`` is a ``ShapeDtypeStruct``, or a tree of them.
      forward: ``(params, x, key=None) -> (y, residuals)``.
      backward: ``(params, residuals, dy) -> (dx, factors)``; ``factors`` is the tree of params
        with one ``bp.factors.Factored`` at each parameter.
      name: how errors and summaries call the layer.
      check: ``(params, x) -> None``, raising ``bp.ModelError`` where they do not fit; x has the
        shapes and dtypes of one example, and may be a ``ShapeDtypeStruct``.
      reference: ``(params, x, key) -> y``, the textbook formula, if ``forward`` is not what one
        would write for autodiff or cannot be differentiated.
      random: ``forward`` draws from its key; each example then gets a key of its own.
      positionwise: ``forward`` and ``backward`` do the same at every position, whatever axes come
        before the last, so that they serve a batch as they stand, without ``vmap``.
      batched: the rule's own form over a batch.

    Returns:
      A ``Layer``. Prove it with ``bp.testing.check_layer``.

    Raises:
      ModelError: in use, whatever ``check`` raises as such, and where ``factors`` is not a tree
        of factored gradients; ``name`` stands in front.
    """

    text("name", name)
    given: dict[str, Any] = {"init": init, "forward": forward, "backward": backward, "check": check}
    for what, value in given.items():
        function(f"{name}: {what}", value)
    function(f"{name}: reference", reference, or_none=True)
    flag(f"{name}: random", random)
    flag(f"{name}: positionwise", positionwise)
    if batched is not None:
        a_layer(f"{name}: batched", batched)

    def named_init(key: Array, x: Tree) -> Tree:
        with place(f"{name}:"):
            random_key("key", key, or_none=False)
            x = shapes_of(x)
            params = init(key, x)
            check_all(params, x)
            return params

    def check_all(params: Tree, x: Tree) -> None:
        if init is no_parameters and not (isinstance(params, tuple) and params == ()):
            raise ModelError(
                f"takes no parameters, (), got {described(params)}; are they another model's?"
            )
        check(params, x)

    def checked_forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        with place(f"{name}:"):
            check_all(params, x)
            return forward(params, x, key)

    def factored(params: Tree, residuals: Tree, dy: Tree) -> tuple[Tree, Tree]:
        with place(f"{name}:"):
            dx, factors = backward(params, residuals, dy)
            _check_factors(params, factors)
        return dx, factors

    def over_batch(function: Callable[..., Tree]) -> Callable[..., Tree]:
        """``(params, x, key) -> …`` for one example, over a batch."""

        def lifted(params: Tree, x: Tree, key: Array | None = None) -> Tree:
            with place(f"{name}:"):
                check_all(params, one_of(x))
                if positionwise:
                    return function(params, x, key)
                if key is None or not random:
                    return jax.vmap(lambda x: function(params, x, None))(x)
                keys = jax.random.split(key, batch_size(x))
                return jax.vmap(lambda x, key: function(params, x, key))(x, keys)

        return lifted

    def contracting(function: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
        def contracted(
            params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
        ) -> tuple[Tree, Tree]:
            dx, factors = function(params, residuals, dy)
            return dx, contract_factors(contract, factors)

        return contracted

    lifted = batched or Layer(
        name=name,
        init=named_init,
        forward=over_batch(forward),
        backward=contracting(
            factored if positionwise else jax.vmap(factored, in_axes=(None, 0, 0))
        ),
        reference=over_batch(reference) if reference else None,
    )
    return Layer(
        name=name,
        init=named_init,
        forward=checked_forward,
        backward=contracting(factored),
        reference=reference,
        lift=lambda: lifted,
    )


def _check_factors(params: Tree, factors: Tree) -> None:
    def is_factor(node: Any) -> bool:
        return isinstance(node, Factored)

    found: Any = jax.tree.structure(factors, is_leaf=is_factor)
    wanted: Any = jax.tree.structure(params)
    if found != wanted or not all(map(is_factor, jax.tree.leaves(factors, is_leaf=is_factor))):
        raise ModelError(
            f"backward gives one factored gradient (bp.factors) per parameter, {wanted}; "
            f"got {factors}"
        )


def shapes_of(x: Tree) -> Tree:
    """Shapes and dtypes as JAX takes them: without x64, float64 numbers are float32."""
    try:
        if x is None:
            raise TypeError
        return jax.eval_shape(lambda x: x, x)
    except TypeError:
        raise ModelError(f"takes arrays of numbers, got {described(x)}") from None


def check_array(x: Tree) -> None:
    """Raises unless x is one array."""
    if not hasattr(x, "shape"):
        raise ModelError(f"takes one array, got {described(x)}")


def batch_size(x: Tree) -> int:
    """The number of examples in a batch: the length of every leaf's first axis."""
    sizes = {leaf.shape[0] if getattr(leaf, "shape", ()) else -1 for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or -1 in sizes:
        raise ModelError(
            f"takes a batch with the examples on the first axis of every array, got {described(x)}"
        )
    return int(sizes.pop())


def one_of(x: Tree) -> Tree:
    """The shapes and dtypes of one example of a batch."""
    batch_size(x)
    return jax.tree.map(lambda leaf: abstract(leaf.shape[1:], leaf.dtype), x)


def textbook(layer: Layer) -> Layer:
    """The layer with each rule's ``reference`` in place of its ``forward``: for autodiff."""
    if layer.rebuild is not None:
        return layer.rebuild(*map(textbook, layer.parts))
    reference = layer.reference
    if reference is None:
        return layer

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        return reference(params, x, key), ()

    return Layer(layer.name, layer.init, forward, layer.backward)
