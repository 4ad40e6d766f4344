"""Rules: what a person writes, three pure functions on one example, and the layer made of them.

    init(key, x)                        -> params           x: an example's shapes and dtypes
    forward(params, x, key=None)        -> (y, residuals)   residuals: what backward and renew read
    backward(params, residuals, dy)     -> (dx, factors)    one factored gradient per parameter

This file alone knows ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .checks import ModelError, called_with, described, flag, function, random_key, text, told
from .contractions import check_factors, contract_layer, keep
from .docstrings import Equations
from .layer import (
    Layer,
    batch_size,
    no_parameters,
    none_is_state,
    not_renewed,
    one_of,
    placed,
    shapes_of,
)
from .values import recalled

Tree = Any


@recalled
def rule(
    init: Callable[..., Tree],
    forward: Callable[..., tuple[Tree, Tree]],
    backward: Callable[..., tuple[Tree, Tree]],
    *,
    name: str = "rule",
    check: Callable[[Tree, Tree], None] = lambda params, x: None,
    reference: Callable[..., Tree] | None = None,
    random: bool = False,
    batched: bool = False,
    mixes_examples: bool = False,
    elementwise: bool = False,
    state: tuple[str, ...] = (),
    renew: Callable[[Tree, Tree], Tree] = not_renewed,
    inference: Layer | None = None,
    equations: Equations | tuple[str, str] | None = None,
    doc: str = "",
) -> Layer:
    """A layer from three pure functions on one example.

    Args:
      init: ``(key, x) -> params``; ``x`` is a ``ShapeDtypeStruct``, or a tree of them, of one
        example.
      forward: ``(params, x, key=None) -> (y, residuals)``.
      backward: ``(params, residuals, dy) -> (dx, factors)``; ``factors`` is the tree of params
        with one ``bp.factors.Factored`` at each parameter.
      name: how errors and summaries call the layer.
      check: ``(params, x) -> None``, raising ``bp.ModelError`` where they do not fit; x has the
        shapes and dtypes of one example, and may be a ``ShapeDtypeStruct``.
      reference: ``(params, x, key) -> y``, the textbook formula, if ``forward`` is not what one
        would write for autodiff or cannot be differentiated.
      random: ``forward`` draws from its key; each example then gets a key of its own.
      batched: ``forward``, ``backward`` and ``reference`` are over a batch as they stand, because
        they do the same at every position, whatever axes come before the last, or because they
        must see the whole batch.
      mixes_examples: the output of one example depends on the others of its batch.
      elementwise: each number of the output depends on that of the input at its place alone, as in
        an activation.
      state: the names of the entries of ``params`` that are state, such as running averages.
        ``backward`` gives no factors for them.
      renew: ``(params, residuals) -> params``, with the state as it is after a batch. Examples of
        weight 0, with which ``bp.fit`` fills up smaller batches, are in it.
      inference: the layer as it is at inference, with the same parameters, where that is another.
      equations: what it computes, forward and back, as two texts of one equation a line, of x and
        y, the parameters' symbols, ∂C/∂x and ∂C/∂y: ``("y = s ⊙ x", "∂C/∂x = s ⊙ ∂C/∂y")``; or a
        ``bp.Equations`` with other names for x and y. They are shown, not proven.
      doc: what else ``help`` shows of it: what it is, shapes, source.

    Returns:
      A ``Layer``. Prove it with ``bp.testing.check_layer``.

    Raises:
      ModelError: in use, whatever ``check`` raises as such, and where ``factors`` is not a tree
        of factored gradients; ``name`` stands in front.

    Example:
      >>> shift = bp.rule(
      ...     init=lambda key, x: {"b": jnp.zeros(x.shape)},
      ...     forward=lambda params, x, key=None: (x + params["b"], ()),
      ...     backward=lambda params, residuals, dy: (dy, {"b": bp.factors.Itself(dy)}),
      ...     name="shift",
      ... )
      >>> bp.testing.check_layer(shift, jnp.ones(3))
    """
    text("name", name)
    given: dict[str, Any] = {"init": init, "forward": forward, "backward": backward}
    for what, value in (given | {"check": check, "renew": renew}).items():
        function(f"{name}: {what}", value)
    called_with(f"{name}: init", init, "key", "x")
    called_with(f"{name}: forward", forward, "params", "x", "key")
    called_with(f"{name}: backward", backward, "params", "residuals", "dy")
    function(f"{name}: reference", reference, or_none=True)
    flags = {"random": random, "batched": batched, "mixes_examples": mixes_examples}
    flags |= {"elementwise": elementwise}
    for what, value in flags.items():
        flag(f"{name}: {what}", value)
    if mixes_examples and not batched:
        raise ModelError(f"{name}: mixes_examples: takes a rule over a batch, batched=True")
    if not isinstance(state, tuple) or not all(isinstance(entry, str) for entry in state):
        raise ModelError(f"{name}: state: takes a tuple of names, got {told(state)}")
    of_example = _Rule(init, forward, backward, renew, check, random, batched, state)
    layer = Layer(
        name=name,
        init=of_example.initial,
        forward=of_example.over_batch(of_example.forward_pair),
        backward=of_example.contracted,
        reference=of_example.over_batch(reference) if reference else None,
        renew=not_renewed if renew is not_renewed else of_example.renewed,
        is_state=of_example.is_state if state else none_is_state,
        in_inference=inference,
        mixes_examples=mixes_examples,
        elementwise=elementwise,
        random=random,
        equations=equations,
        doc=doc,
    )
    return placed(f"{name}:", layer)


@dataclass(frozen=True)
class _Rule:
    """A rule's functions, and what they are over a batch."""

    init: Callable[..., Tree]
    forward: Callable[..., tuple[Tree, Tree]]
    backward: Callable[..., tuple[Tree, Tree]]
    renew: Callable[[Tree, Tree], Tree]
    check: Callable[[Tree, Tree], None]
    random: bool
    batched: bool
    state: tuple[str, ...]

    def initial(self, key: Array, x: Tree) -> Tree:
        random_key("key", key, or_none=False)
        x = shapes_of(x)
        params = self.init(key, x)
        self.check_all(params, x)
        self.is_state(params)
        return params

    def check_all(self, params: Tree, x: Tree) -> None:
        if self.init is no_parameters and not (isinstance(params, tuple) and params == ()):
            raise ModelError(
                f"takes no parameters, (), got {described(params)}; are they another model's?"
            )
        self.check(params, x)

    def over_batch(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        """``(params, x, key) -> …`` for one example, over a batch."""

        def lifted(params: Tree, x: Tree, key: Array | None = None) -> Tree:
            self.check_all(params, one_of(x))
            if self.batched:
                return function(params, x, key)
            if key is None or not self.random:
                return jax.vmap(lambda x: function(params, x, None))(x)
            keys = jax.random.split(key, batch_size(x))
            return jax.vmap(lambda x, key: function(params, x, key))(x, keys)

        return lifted

    def forward_pair(self, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        return _pair("forward", "(y, residuals)", self.forward(params, x, key))

    def contracted(
        self, params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        factored = self.factored if self.batched else jax.vmap(self.factored, in_axes=(None, 0, 0))
        dx, factors = factored(params, residuals, dy)
        return dx, contract_layer(contract, dy, factors)

    def factored(self, params: Tree, residuals: Tree, dy: Tree) -> tuple[Tree, Tree]:
        """``backward``, with None at the state."""
        dx, factors = _pair("backward", "(dx, factors)", self.backward(params, residuals, dy))
        if not self.state:
            check_factors(params, factors)
            return dx, factors
        check_factors({k: p for k, p in params.items() if k not in self.state}, factors)
        return dx, factors | {k: jax.tree.map(lambda _: None, params[k]) for k in self.state}

    def renewed(self, params: Tree, residuals: Tree) -> Tree:
        new = self.renew(params, residuals)
        if jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, params):
            raise ModelError(
                "takes a renew that keeps the parameters' tree and shapes, "
                f"{described(params)}, got {described(new)}"
            )
        return new

    def is_state(self, params: Tree) -> Tree:
        if not self.state:
            return none_is_state(params)
        if not isinstance(params, dict) or not params.keys() >= set(self.state):
            raise ModelError(
                f"takes a dict with the state {list(self.state)}, got {described(params)}"
            )
        return jax.tree.map_with_path(lambda path, _: path[0].key in self.state, params)


def _pair(what: str, names: str, result: Tree) -> tuple[Tree, Tree]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ModelError(f"takes a {what} that gives {names}, got {described(result)}")
    return result
