"""Functions of arrays whose backward pass is written by hand, known in a program by their names.

In a jaxpr a ``custom_vjp`` has functions without a name. So each is called in a ``jit`` that has
one, and by that name a traced layer finds its rule again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from ..contractions import keep, total
from ..factors.factored import Factored, Itself

Tree = Any


@dataclass(frozen=True, eq=False)
class Named:
    """A rule for a batch; ``one`` is its function of one example, ``Named.of`` keeps it by name.

    Attributes:
      name: of the ``jit`` around it.
      forward: ``(*operands) -> (outputs, residuals)``. Operands and outputs have the examples on
        the first axis, but for those that are ``shared``.
      backward: ``(operands, residuals, d_outputs, contract) -> results``, one for each operand: of
        a shared one what ``contract`` makes of its factors, of another ∂C/∂ it, of integers None.
      shared: which operands are weights, the same for all examples.
      ranks: the number of axes of every operand, of one example.
      reads: which operands, of integers, are also in the factors.
      at_once: of a function whose only output is a number, ``(*operands) -> (outputs, gradients)``
        where it is cheaper to make both on the way forward, with one gradient for each operand;
        elsewhere None.
    """

    name: str
    forward: Callable[..., tuple[list[Array], Tree]]
    backward: Callable[..., list[Any]]
    shared: tuple[int, ...]
    ranks: tuple[int, ...]
    reads: tuple[int, ...] = ()
    at_once: Callable[..., tuple[list[Array], list[Any]] | None] = lambda *operands: None

    @functools.cached_property
    def one(self) -> Callable[..., list[Array]]:
        """The function of one example."""

        @jax.custom_vjp
        def function(*operands: Array) -> list[Array]:
            return forward(*operands)[0]

        def forward(*operands: Array) -> tuple[list[Array], Tree]:
            batch = self.batch_of_one(operands)
            made = self.at_once(*batch)
            outputs, residuals = self.forward(*batch) if made is None else (made[0], None)
            return [y[0] for y in outputs], (operands, residuals, made and made[1])

        def backward(kept: Tree, d_outputs: list[Array]) -> tuple[Any, ...]:
            operands, residuals, gradients = kept
            if gradients is None:
                dy = [d[None] for d in d_outputs]
                found = self.backward(self.batch_of_one(operands), residuals, dy, total)
            else:
                found = [g if g is None else d_outputs[0] * g for g in gradients]
            shapes = zip(found, operands)
            return tuple(d if d is None else d.reshape(a.shape).astype(a.dtype) for d, a in shapes)

        function.defvjp(forward, backward)

        def called(*operands: Array) -> list[Array]:
            return function(*operands)

        called.__name__ = called.__qualname__ = self.name
        _RULES[self.name] = self
        return jax.jit(called)

    def batch_of_one(self, operands: Sequence[Array]) -> list[Array]:
        return [a if i in self.shared else a[None] for i, a in enumerate(operands)]

    def factors(
        self, operands: Sequence[Array], residuals: Tree, d_outputs: list[Array]
    ) -> list[Factored | None]:
        """The factored gradients of all operands, shared or not."""
        found = self.backward(operands, residuals, d_outputs, keep)
        return [d if d is None or isinstance(d, Factored) else Itself(d) for d in found]


_RULES: dict[str, Named] = {}


def of_name(name: str | None) -> Named | None:
    """The rule of that name, if it has been used."""
    return None if name is None else _RULES.get(name)


def tapped(
    rule: Named,
    given: list[Array],
    taps: list[Any] | None,
    apart: Callable[[list[Factored | None]], list[Any]],
) -> list[Array]:
    """The outputs for one example, where it is called under ``vmap`` for a whole batch.

    Totals are then summed over the batch at once, and no example has a gradient of its own. The
    cotangents of ``taps`` are the arrays that ``apart`` takes of the factors.
    """

    @jax.custom_vjp
    def batch(given: list[Array], taps: list[Any] | None) -> list[Array]:
        return rule.forward(*given)[0]

    def forward(given: list[Array], taps: list[Any] | None) -> tuple[list[Array], Tree]:
        outputs, residuals = rule.forward(*given)
        return outputs, (given, residuals)

    def backward(kept: Tree, d_outputs: list[Array]) -> tuple[list[Any], list[Any] | None]:
        given, residuals = kept
        found = rule.factors(given, residuals, d_outputs)
        totals = [_cotangent(f, a, i in rule.shared) for i, (f, a) in enumerate(zip(found, given))]
        return totals, None if taps is None else apart(found)

    batch.defvjp(forward, backward)

    @custom_vmap
    def one(given: list[Array], taps: list[Any] | None) -> list[Array]:
        first = jax.tree.map(lambda tap: tap[None], taps)
        return [y[0] for y in batch(rule.batch_of_one(given), first)]

    @one.def_vmap
    def _(n: int, batched: Any, given: list[Array], taps: list[Any] | None) -> Any:
        def whole(a: Array, is_batched: bool) -> Array:
            return a if is_batched else jnp.broadcast_to(a, (n, *a.shape))

        given = [
            a if i in rule.shared else whole(a, is_batched)
            for i, (a, is_batched) in enumerate(zip(given, batched[0], strict=True))
        ]
        outputs = batch(given, jax.tree.map(whole, taps, batched[1]))
        return outputs, [True] * len(outputs)

    return one(given, taps)


def _cotangent(factor: Factored | None, a: Array, shared: bool) -> Array | None:
    if factor is None:
        return None
    return (factor.total() if shared else factor.each()).astype(a.dtype)
