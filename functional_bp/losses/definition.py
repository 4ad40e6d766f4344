"""What a loss is: the last layer of the recursion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, described, function, scalar_cost, takes, text, told
from ..contractions import check_factors, contract_factors, is_factor, keep
from ..docstrings import Equations, composed, stated
from ..factors.factored import per_example
from ..layer import Layer, a_layer, no_parameters, one_of, placed
from ..values import Value, recalled

Tree = Any


def any_target(a: Tree, y: Tree) -> None:
    """Fits every output and target."""


def _unchanged(pair: Layer) -> Layer:
    return pair


@dataclass(frozen=True, eq=False)
class Loss(Value):
    """C(a, y) for one example and its derivative by a. Make one with ``bp.losses.loss``.

    Attributes:
      name: how errors call it.
      value, delta: ``(a, y) -> C`` and ``(a, y) -> ∂C/∂a`` of one example; of a loss with
        parameters, ``(params, a, y) -> C`` and ``(params, a, y) -> (∂C/∂a, factors)``. A delta may
        take a weight; see ``bp.losses.loss``.
      check: ``(a, y) -> None`` over a batch.
      root, sample: of its Hessian; see ``bp.losses.loss``.
      init: ``(key, a, y) -> params``, of a loss that has parameters.
      head: the layer and the loss without parameters that it is the same as, if it says so.
      over_batch: the loss as a layer over a batch, from (a, y) to C, where it does not follow from
        ``value`` and ``delta``. In place of ∂C/∂y its backward may give C, where that is made anew
        on the way back.
      joined: what is made of the layer from (x, y) to C: ties between its two parts.
      equations, doc: what ``help`` shows.
    """

    name: str
    value: Callable[..., Array]
    delta: Callable[..., Tree]
    check: Callable[[Tree, Tree], None] = any_target
    root: Callable[[Tree, Tree, Tree], Tree] | None = None
    sample: Callable[[Array, Tree, Tree], Tree] | None = None
    init: Callable[..., Tree] = no_parameters
    head: tuple[Layer, Loss] | None = None
    over_batch: Layer | None = None
    joined: Callable[[Layer], Layer] = _unchanged
    equations: Equations | tuple[str, str] | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        text(f"{self.name}: doc", self.doc)
        equations = stated(f"{self.name}: equations", self.equations, "a", "C")
        object.__setattr__(self, "equations", equations)
        words = composed(self.doc or f"The loss {self.name}.", self.equations)
        object.__setattr__(self, "__doc__", words)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ModelError(f"{self.name}: is a loss, not a function; loss.value(a, y) gives C")

    @property
    def has_parameters(self) -> bool:
        """Whether the parameters of a model with this loss are the pair (model's, loss's)."""
        return self.init is not no_parameters

    def of_model(self, params: Tree) -> Tree:
        """The model's part of the parameters."""
        return pair_of(self.name, params)[0] if self.has_parameters else params

    # Compiled, because vmap outside jit goes from operation to operation, 10 ms for a loss whose
    # arithmetic is microseconds. Inside jit they are inlined and leave no trace.

    @functools.cached_property
    def costs(self) -> Callable[..., Array]:
        """``value`` over a batch: ``(a, y) -> (batch,)``, or ``(params, a, y)``."""

        def scalar(*args: Tree) -> Array:
            return scalar_cost("a value", self.value(*args))

        return self._batched(scalar)

    @functools.cached_property
    def deltas(self) -> Callable[..., Tree]:
        """``delta`` over a batch."""

        def of_outputs(*args: Tree) -> Tree:
            a, result = args[self.has_parameters], self.delta(*args)
            delta = self._checked_factors(args[0], result) if self.has_parameters else result
            if jax.tree.map(jnp.shape, delta) != jax.tree.map(jnp.shape, a):
                raise ModelError(
                    f"takes a delta of the outputs' shape, {described(a)}, got {described(delta)}"
                )
            return result

        return self._batched(of_outputs)

    @staticmethod
    def _checked_factors(params: Tree, result: Tree) -> Tree:
        if not isinstance(result, tuple) or len(result) != 2:
            raise ModelError(f"takes a delta that gives (∂C/∂a, factors), got {described(result)}")
        check_factors(params, result[1])
        return result[0]

    def _batched(self, of_example: Callable[..., Tree]) -> Callable[..., Tree]:
        def batched(*args: Tree) -> Tree:
            axes = (None, *(0 for _ in args[1:])) if self.has_parameters else 0
            return jax.vmap(of_example, axes)(*args)

        return jax.jit(batched, inline=True)

    @functools.cached_property
    def _takes_weight(self) -> bool:
        return not self.has_parameters and takes(self.delta, "weight")

    @functools.cached_property
    def layer(self) -> Layer:
        """The loss as a layer over a batch, from (a, y) to C; its δ are the weights of the Cₙ."""
        from_values = Layer(
            self.name, lambda key, ay: self.init(key, *ay), self._forward, self._backward
        )
        return placed(f"{self.name}:", self.over_batch or from_values)

    def _forward(self, params: Tree, ay: Tree, key: Array | None = None) -> tuple[Array, Tree]:
        self.check(*ay)
        if self.has_parameters:
            self._check_parameters(params, *one_of(ay))
        return self.costs(*self._given(params), *ay), ay

    def _check_parameters(self, params: Tree, a: Tree, y: Tree) -> None:
        wanted = jax.eval_shape(self.init, jax.random.key(0), a, y)
        if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, params):
            raise ModelError(
                f"takes parameters {described(wanted)}, got {described(params)}; are they another "
                "model's?"
            )

    def _backward(
        self, params: Tree, ay: Tree, weights: Array, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        given = (*self._given(params), *ay, *([weights] if self._takes_weight else []))
        delta = self.deltas(*given)  # BP1: ∂C/∂a of each example
        delta, factors = delta if self.has_parameters else (delta, ())
        if not self._takes_weight:
            delta = jax.tree.map(lambda d: per_example(weights, d), delta)
        factors = jax.tree.map(lambda f: f.scaled(weights), factors, is_leaf=is_factor)
        return (delta, None), contract_factors(contract, factors)

    def _given(self, params: Tree) -> tuple[Tree, ...]:
        return (params,) if self.has_parameters else ()

    def __repr__(self) -> str:
        return self.name


def pair_of(name: str, params: Tree) -> tuple[Tree, Tree]:
    """The model's and the loss's parameters."""
    if not isinstance(params, tuple) or len(params) != 2:
        raise ModelError(
            f"{name}: takes parameters as the tuple (model's, loss's), as bp.init makes them, got "
            f"{described(params)}"
        )
    return params


@recalled
def loss(
    value: Callable[..., Array],
    delta: Callable[..., Tree],
    *,
    name: str | None = None,
    check: Callable[[Tree, Tree], None] = any_target,
    root: Callable[[Tree, Tree, Tree], Tree] | None = None,
    sample: Callable[[Array, Tree, Tree], Tree] | None = None,
    init: Callable[..., Tree] = no_parameters,
    head: tuple[Layer, Loss] | None = None,
    equations: Equations | tuple[str, str] | None = None,
    doc: str = "",
) -> Loss:
    """A loss from its value and its derivative, both for one example.

    Args:
      value: ``(a, y) -> C``, a scalar.
      delta: ``(a, y) -> ∂C/∂a``, of a's shape; or ``(a, y, weight=1.0) -> weight ∂C/∂a``, where
        the weight of an example costs less inside.
      name: how errors call it.
      check: ``(a, y) -> None`` for a whole batch, raising ``bp.ModelError`` where the target
        does not fit; y may be traced.
      root: ``(a, y, e) -> S e``, linear in e of a's shape, for the S with ∇²C = S Sᵀ (by a).
        Exact curvature needs it.
      sample: ``(key, a, y) -> δ̂``, a random δ with mean of δ̂ δ̂ᵀ = ∇²C: the δ of a target drawn
        from the model's own prediction. Sampled curvature needs it.
      init: ``(key, a, y) -> params``, from the shapes of one example, for a loss that has
        parameters. ``value`` is then ``(params, a, y) -> C`` and ``delta`` ``(params, a, y) ->
        (∂C/∂a, factors)``, with one ``bp.factors.Factored`` at each parameter. Make the parameters
        of a model with such a loss by ``bp.init``: they are the pair ``(model's, loss's)``.
      head: ``(layer, loss)``, a layer with the parameters of this loss and a loss without, which
        together are the same. For a loss with parameters, curvature needs it.
      equations: what it computes and its δ, as two texts of one equation a line.
      doc: what else ``help`` shows of it.

    Example:
      >>> quartic = bp.losses.loss(
      ...     lambda a, y: jnp.sum((a - y) ** 4) / 4, lambda a, y: (a - y) ** 3, name="quartic"
      ... )
      >>> x = y = jnp.ones((2, 3))
      >>> bp.testing.check_model(bp.tanh, quartic, (), x, y)
    """
    given: dict[str, Any] = {"value": value, "delta": delta, "check": check, "init": init}
    for what, argument in given.items():
        function(f"loss: {what}", argument)
    function("loss: root", root, or_none=True)
    function("loss: sample", sample, or_none=True)
    name = text("loss: name", getattr(value, "__name__", "loss") if name is None else name)
    if head is not None and init is no_parameters:
        raise ModelError(f"{name}: head: takes None for a loss without init, got {told(head)}")
    if head is not None:
        if not isinstance(head, tuple) or len(head) != 2 or not isinstance(head[1], Loss):
            raise ModelError(f"{name}: head: takes a layer and a loss, got {told(head)}")
        a_layer(f"{name}: head", head[0])
        if head[1].has_parameters:
            raise ModelError(f"{name}: head: takes a loss without parameters, got {head[1]}")
    return Loss(
        name=name,
        value=value,
        delta=delta,
        check=check,
        root=root,
        sample=sample,
        init=init,
        head=head,
        equations=equations,
        doc=doc,
    )
