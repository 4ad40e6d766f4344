"""A layer from any JAX function of one example."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import (
    ModelError,
    described,
    function,
    is_traced,
    random_key,
    scalar_cost,
    takes,
    text,
)
from ..contractions import Contraction, asks_layers, broadcast, contract_layer, is_contraction, keep
from ..docstrings import explained
from ..factors.factored import Factored
from ..layer import Layer, batch_size, no_parameters, none_is_state, one_of, placed
from .jaxprs import Program, program_of, source_of, with_effects
from .parameters import factors_of
from .plan import Plan
from .planning import plan_of
from .run import run, static_values

Tree = Any


@explained(
    forward="y = f(θ, x)",
    backward="δ by autodiff;  where z = W a in f:  ∂C/∂W = δ aᵀ      (BP4)",
)
def from_function(
    apply: Callable[..., Tree],
    *,
    init: Callable[..., Tree] = no_parameters,
    is_state: Callable[[Tree], Tree] = none_is_state,
    name: str | None = None,
) -> Layer:
    """A layer from a function of parameters and ONE example, of any library or of none.

    δ comes by autodiff. How each parameter meets the example is read from the function's program
    (its jaxpr): in a matrix product, a convolution or a look-up the gradient is kept as its
    factors, and elsewhere there is one gradient per example, as in ``vmap(jax.grad)``. Every
    quantity is exact.

    Args:
      apply: ``(params, x) -> y``, or ``(params, x, key=…) -> y``. Parameters, x and y are any trees
        of arrays. It gets a key where the quantity does, one for each example, if it takes one.
      init: ``(key, x) -> params``, if the layer is to make its parameters.
      is_state: ``params -> tree of bools``: which of them are no parameters but state, such as
        running averages, and have no gradient.
      name: how errors and summaries call the layer.

    Raises:
      ModelError: in use, for parameters that are not floating-point, and where ``apply`` has side
        effects, or wants a key and gets none. What ``apply`` raises has a note that it was called
        with one example.

    Example:
      >>> model = bp.from_function(lambda params, x: params["w"] @ x, name="linear")
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> norms = bp.per_example_grad_norms(model, bp.losses.squared_error)
      >>> print(norms(params, jnp.ones((4, 3)), jnp.ones((4, 2))).round(2))
      [2.45 2.45 2.45 2.45]
    """
    function("from_function: apply", apply)
    function("from_function: init", init)
    function("from_function: is_state", is_state)
    name = f"from_function({_name_of(apply)})" if name is None else text("name", name)
    traced = _Traced(apply, is_state)

    def initial(key: Array, x: Tree) -> Tree:
        random_key("key", key, or_none=False)
        return init(key, x)

    layer = Layer(
        name=name,
        init=initial,
        forward=traced.forward,
        backward=traced.backward,
        reference=traced.outputs,
        is_state=is_state,
        holds_deltas=True,
        random=traced.takes_key,
    )
    return placed(f"{name}:", layer)


@functools.lru_cache(maxsize=64)
def from_cost(cost: Callable[..., Array]) -> Layer:
    """A layer from (x, y) to the costs, of ``cost(params, x, y) -> C`` for one example."""

    @functools.wraps(cost)  # whether it takes a key is read from its signature
    def of_example(params: Tree, xy: Tree, **key: Array) -> Array:
        return scalar_cost("a cost", cost(params, *xy, **key))

    return from_function(of_example, name=_name_of(cost))


def _name_of(apply: Callable[..., Any]) -> str:
    return getattr(apply, "__name__", type(apply).__name__)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kept", "x"], meta_fields=["way"])
@dataclass(frozen=True)
class Residuals:
    """What a forward pass leaves.

    Attributes:
      kept: the arrays of the way back and of what was read, but for parameters, which are given
        again.
      x: inputs and keys, where the plan finds them by a pass of its own: the taps are ``apart``
        asked for.
      way: how those arrays go together.
    """

    kept: list[Array]
    x: Tree
    way: _Way

    @property
    def plan(self) -> Plan:
        """What was run."""
        return self.way.plan

    @classmethod
    def of(cls, plan: Plan, leaves: list[Array], found: Tree, x: Tree) -> Residuals:
        """``found``, without what is among the parameters."""
        arrays, tree = jax.tree.flatten(found)
        places = {id(leaf): i for i, leaf in enumerate(leaves)}
        given = tuple(places.get(id(array)) for array in arrays)
        kept = [array for array, place in zip(arrays, given) if place is None]
        return cls(kept, x, _Way(plan, given, tree))

    def found(self, leaves: list[Array]) -> Tree:
        """What ``of`` was given."""
        kept = iter(self.kept)
        arrays = [next(kept) if place is None else leaves[place] for place in self.way.given]
        return self.way.tree.unflatten(arrays)


@dataclass(frozen=True)
class _Way:
    """A tree whose structure has programs in it, which JAX tells apart though they are the same,
    as where it traces the body of a loop twice: it equals another of the same plan."""

    plan: Plan
    given: tuple[int | None, ...]
    tree: Any = dataclasses.field(compare=False)


class _Traced:
    """A function of parameters and one example, over a batch."""

    def __init__(self, apply: Callable[..., Tree], is_state: Callable[[Tree], Tree]) -> None:
        self.apply = apply
        self.is_state = is_state
        self.takes_key, self.wants_key = _key_of(apply)
        self.plans: dict[Any, tuple[Plan, Any]] = {}

    def outputs(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """The function over a batch, as autodiff differentiates it."""
        keys = self.keys(x, key)
        return jax.vmap(lambda x, key: self.of_one(params, x, key))(x, keys)

    def of_one(self, params: Tree, x: Tree, key: Array | None) -> Tree:
        return self.apply(params, x) if key is None else self.apply(params, x, key=key)

    def keys(self, x: Tree, key: Array | None) -> Array | None:
        """A key for each example, if the function takes one."""
        if key is None and self.wants_key:
            raise ModelError("wants a key; give the quantity key=")
        return None if key is None or not self.takes_key else jax.random.split(key, batch_size(x))

    def forward(self, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        keys, leaves = self.keys(x, key), jax.tree.leaves(params)
        plan, structure = self.plan(params, one_of(x), None if keys is None else one_of(keys))
        if plan.taps_apart:

            def alone(leaves: list[Array], x: Tree) -> list[Array]:
                return over_batch(plan, leaves, x, keys, None)[0]

            ys, pull = jax.vjp(alone, leaves, x)
            residuals = Residuals.of(plan, leaves, (pull, None), (x, keys))
        else:
            taps = taps_of(plan, batch_size(x))
            ys, pull, read = jax.vjp(
                lambda leaves, x, taps: over_batch(plan, leaves, x, keys, taps),
                *(leaves, x, taps),
                has_aux=True,
            )
            residuals = Residuals.of(plan, leaves, (pull, read), None)
        return jax.tree.unflatten(structure, ys), residuals

    def backward(
        self, params: Tree, residuals: Residuals, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        plan, leaves = residuals.plan, jax.tree.leaves(params)
        pull, read = residuals.found(leaves)
        dy_leaves = jax.tree.leaves(dy)
        totals, dx, *deltas = pull(dy_leaves)
        dx = jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, dx)
        if asks_layers(contract):
            return dx, contract_layer(contract, dy, ())

        @functools.cache
        def factors() -> list[Factored]:
            n = batch_size(dy)
            if plan.taps_apart:
                return factors_of(plan, leaves, *_met(residuals, leaves, dy_leaves, n), n)
            return factors_of(plan, leaves, read, deltas[0], n)

        asked = jax.tree.leaves(broadcast(contract, params), is_leaf=is_contraction)
        state = jax.tree.leaves(self.is_state(params))
        results = [
            None if of_state else _result(c, total, lambda i=i: factors()[i])  # type: ignore[misc]
            for i, (c, total, of_state) in enumerate(zip(asked, totals, state, strict=True))
        ]
        return dx, jax.tree.unflatten(jax.tree.structure(params), results)

    def plan(self, params: Tree, x: Tree, key: Array | None) -> tuple[Plan, Any]:
        """The plan for arguments of these shapes, and the tree of the outputs. (Equations keep the
        precision that they were traced under.)"""
        leaves, structure = jax.tree.flatten((params, x, key))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        arguments = structure, shapes, jax.dtypes.canonicalize_dtype(float), precision
        if arguments in self.plans:
            return self.plans[arguments]
        state = jax.tree.leaves(self.is_state(params))
        _check_parameters(params, state)
        with _told_of_one_example(x):
            jaxpr, outputs = jax.make_jaxpr(self.of_one, return_shape=True)(params, x, key)
        program = program_of(jaxpr)
        _check_effects(program)
        plan = plan_of(program, len(state), [not of_state for of_state in state])
        found = plan, jax.tree.structure(outputs)
        if not any(map(is_traced, plan.known.values())):  # which are good in this call alone
            self.plans[arguments] = found
        return found


def taps_of(plan: Plan, n: int) -> list[Any]:
    """Zeros for each meeting, of the shape of its δ."""

    def zeros(tap: Any, loops: tuple[int, ...]) -> Array:
        return jnp.zeros((n, *loops, *tap.shape), tap.dtype)

    return [
        jax.tree.map(functools.partial(zeros, loops=meeting.loops), meeting.tap)
        for meeting in plan.body.meetings
    ]


def over_batch(
    plan: Plan, leaves: list[Array], x: Tree, keys: Array | None, taps: list[Array] | None
) -> tuple[list[Array], list[Any]]:
    """The outputs for a batch, and what is read at the meetings."""
    values = static_values(plan, leaves)
    statics = {ref: values[ref.place] for ref in plan.body.statics}

    def of_one(xs: Tree, taps: list[Array] | None) -> tuple[list[Array], list[Any]]:
        return run(plan.body, statics, jax.tree.leaves(xs), taps)

    return jax.vmap(of_one)((x, keys), taps)


def _met(
    residuals: Residuals, leaves: list[Array], dy: list[Array], n: int
) -> tuple[list[Any], list[Array]]:
    """What is read at the meetings, and δ there, by a pass of its own."""
    plan, (x, keys) = residuals.plan, residuals.x
    _, pull, read = jax.vjp(
        lambda taps: over_batch(plan, leaves, x, keys, taps), taps_of(plan, n), has_aux=True
    )
    return read, pull(dy)[0]


def _result(contraction: Contraction, total: Array, factor: Callable[[], Factored]) -> Any:
    """A total is what autodiff sums anyway."""
    return contraction(_Total(total) if contraction.adds_examples else factor())


@dataclass(frozen=True)
class _Total(Factored):
    """Gradients that are summed already."""

    sum: Array

    def total(self) -> Array:
        return self.sum


def _key_of(apply: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a function takes a key, and whether it must have one."""
    if not takes(apply, "key"):
        return False, False
    return True, inspect.signature(apply).parameters["key"].default is inspect.Parameter.empty


def _check_parameters(params: Tree, state: list[bool]) -> None:
    for (path, leaf), of_state in zip(jax.tree.leaves_with_path(params), state, strict=True):
        if not of_state and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ModelError(
                f"params{jax.tree_util.keystr(path)}: takes floating-point parameters, got "
                f"{described(leaf)}; keep other arrays in the function, or name them by is_state="
            )


def _check_effects(program: Program) -> None:
    equation = with_effects(program)
    if equation is not None:
        raise ModelError(
            f"takes a function without side effects, got {equation.primitive.name} in "
            f"{source_of(equation)}"
        )


@contextlib.contextmanager
def _told_of_one_example(x: Tree) -> Iterator[None]:
    """Says of an error in the user's function that it was called with ONE example."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        error.add_note(
            f"the function was called with ONE example, {described(x)}, of those on the first axis "
            "of what was given; one that takes a batch can be called as lambda params, x: "
            "f(params, jax.tree.map(lambda a: a[None], x))[0]"
        )
        raise
