"""How a parameter meets an example in one operation, and the factors of its gradient there.

A route reads an activation on the way forward; with δ, the cotangent of what the operation gives,
it makes the factors. Arrays come with the axes ``(n, *loops, …)``: the examples, the turns of the
loops around, and what one turn has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import abstract
from ..factors.arranged import inverse, reshaped, transposed
from ..factors.combined import Stacked
from ..factors.convolved import Convolution, Convolved
from ..factors.factored import Factored, Itself, Outer, accumulator
from ..factors.rows import Rows
from ..factors.softmax_outer import SoftmaxOuter
from .jaxprs import Equation, LookUp, Product, convolution, look_up, name_of, product
from .named import Named, of_name

Shape = tuple[int, ...]


class Route(Protocol):
    """One operation of a parameter and something of an example."""

    @property
    def name(self) -> str:
        """What ``explain`` calls it."""

    @property
    def summed(self) -> int:
        """How many products are summed in each number that the operation gives."""

    def reads(self, values: Sequence[Array]) -> Array:
        """The activation, from the operation's inputs."""

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        """The factors; the parameter has an entry for each turn of the loops that are ``mapped``,
        and its gradient is a sum over those of the others."""


@dataclass(frozen=True)
class InProduct:
    """z = W a over any axes: Outer products, one for each entry of the axes that go together.

    Attributes:
      operand: which of the product's inputs W is.
      shape: of W.
    """

    operand: int
    shape: Shape
    product: Product

    name = "matrix product"

    @property
    def summed(self) -> int:
        return math.prod(self.shape[axis] for axis in self.product.contracted[self.operand])

    def reads(self, values: Sequence[Array]) -> Array:
        return values[1 - self.operand]

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        first = 1 + len(mapped)
        (w_batch, w_sum), (a_batch, a_sum) = (
            (self.product.batch[side], self.product.contracted[side])
            for side in (self.operand, 1 - self.operand)
        )
        w_free = _others(len(self.shape), w_batch, w_sum)
        a_free = _others(a.ndim - first, a_batch, a_sum)
        # z has the axes that go together, then those of the left operand, then of the right.
        together = range(len(w_batch))
        z_first = len(together) + (0 if self.operand == 0 else len(a_free))
        z_rows = range(z_first, z_first + len(w_free))
        z_free = _others(delta.ndim - first, together, z_rows)

        v = _ordered(a, first, (*a_batch, *a_free, *a_sum))
        u = _ordered(delta, first, (*together, *z_free, *z_rows))
        lead = v.shape[: first + len(together)]
        positions = math.prod(a.shape[first + axis] for axis in a_free)
        rows, columns = (math.prod(self.shape[i] for i in axes) for axes in (w_free, w_sum))
        u, v = u.reshape(*lead, positions, rows), v.reshape(*lead, positions, columns)
        f = _stacked(Outer, (u, v), (*mapped, *[True] * len(together)))
        return _laid_out(f, _lengths(a, mapped), self.shape, (*w_batch, *w_free, *w_sum))


@dataclass(frozen=True)
class InLookUp:
    """y_t = W[k_t]: rows of a table of ``shape``."""

    shape: Shape
    look_up: LookUp

    name, summed = "look-up", 1

    def reads(self, values: Sequence[Array]) -> Array:
        ids = values[1][..., 0]
        rows = self.shape[self.look_up.axis]
        return ids.clip(0, rows - 1) if self.look_up.clips else ids

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        first, (axis, offsets) = 1 + len(mapped), (self.look_up.axis, self.look_up.offsets)
        v = _ordered(delta, first, (*_others(delta.ndim - first, offsets), *offsets))
        rest = _others(len(self.shape), (axis,))
        v = v.reshape(*a.shape, math.prod(self.shape[i] for i in rest))
        f = _stacked(functools.partial(Rows, rows=self.shape[axis]), (a, v), mapped)
        return _laid_out(f, _lengths(a, mapped), self.shape, (axis, *rest))


@dataclass(frozen=True)
class InConvolution:
    """z = conv(a, W), W of ``shape``."""

    shape: Shape
    convolution: Convolution
    numbers: lax.ConvDimensionNumbers

    name = "convolution"

    @classmethod
    def of(cls, shape: Shape, options: dict[str, Any]) -> InConvolution:
        """From what ``lax.conv_general_dilated`` is told."""
        numbers = options["dimension_numbers"]
        convolution = Convolution(
            kernel=tuple(shape[axis] for axis in _lying(numbers.rhs_spec)),
            strides=options["window_strides"],
            pads=options["padding"],
            dilation=options["rhs_dilation"],
            spread=options["lhs_dilation"],
            groups=options["feature_group_count"],
        )
        return cls(shape, convolution, numbers)

    @property
    def summed(self) -> int:
        return math.prod(self.shape) // self.convolution.outputs

    def reads(self, values: Sequence[Array]) -> Array:
        return values[0]

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        numbers, first = self.numbers, 1 + sum(mapped)
        turns = [1 + i for i, over in enumerate(mapped) if not over]

        def one_batch(array: Array, spec: Sequence[int]) -> Array:
            """``(n, *loops, b, *space, features)``; the turns of loops that share the kernel are
            more of b."""
            array = jnp.moveaxis(array, turns, range(first, first + len(turns)))
            batch, features, *space = (axis + first + len(turns) for axis in spec)
            order = (*range(first + len(turns)), batch, *space, features)
            array = array.transpose(order)
            return array.reshape(*array.shape[:first], -1, *array.shape[first + len(turns) + 1 :])

        arrays = (one_batch(a, numbers.lhs_spec), one_batch(delta, numbers.out_spec))
        make = functools.partial(Convolved, convolution=self.convolution)
        f = _stacked(make, arrays, [True] * sum(mapped))
        return _laid_out(f, _lengths(a, mapped), self.shape, _lying(numbers.rhs_spec))


def _lying(rhs_spec: Sequence[int]) -> tuple[int, ...]:
    """A kernel's axes as ``Convolution`` has them: the window's, in, out."""
    out, in_, *window = rhs_spec
    return (*window, in_, out)


@dataclass(frozen=True, eq=False)
class InNamed:
    """A function with a rule of its own: its factors are those of the rule's backward.

    Attributes:
      operand: which of the function's operands the parameter is.
      shape: of it.
      like: the factors of a batch of one, as shapes and dtypes.
    """

    rule: Named
    operand: int
    shape: Shape
    like: Factored

    @property
    def name(self) -> str:
        """The function's, as users call it."""
        return self.rule.name.replace("functional_bp.", "ops.")

    @property
    def taps(self) -> list[jax.ShapeDtypeStruct]:
        """Of one example, the arrays in the factors."""
        return [abstract(a.shape[1:], a.dtype) for a in self.apart(self.like)]

    @staticmethod
    def apart(factor: Factored) -> list[Array]:
        """The arrays in the factors, but for what is there on the way forward."""
        return jax.tree.leaves(_bare(factor))

    def reads(self, values: Sequence[Array]) -> list[Array]:
        """Operands of integers that factors hold."""
        return [values[i] for i in self.rule.reads]

    def factor(
        self, read: list[Array], arrays: list[Array], mapped: tuple[bool, ...], value: Array
    ) -> Factored:
        """The factors, from the arrays in them, what was read and the parameter."""
        if isinstance(self.like, Itself):
            turns = [1 + i for i, over in enumerate(mapped) if not over]
            (g,) = arrays
            return Itself(g.sum(turns, dtype=accumulator(g)) if turns else g)
        if isinstance(self.like, SoftmaxOuter):
            return self._of_softmax(read, arrays, len(mapped), value)
        make = functools.partial(_unflattened, jax.tree.structure(self.like))
        f = _stacked(make, arrays, mapped)
        return _laid_out(f, _lengths(arrays[0], mapped), self.shape, range(len(self.shape)))

    def _of_softmax(
        self, read: list[Array], arrays: list[Array], loops: int, value: Array
    ) -> Factored:
        """All turns of the loops are positions."""

        def positions(a: Array) -> Array:
            return a.reshape(len(a), -1, *a.shape[2 + loops :])

        bare = jax.tree.unflatten(jax.tree.structure(_bare(self.like)), map(positions, arrays))
        return dataclasses.replace(bare, weight=jnp.asarray(value), ids=positions(read[0]))


def _bare(factor: Factored) -> Factored:
    if isinstance(factor, SoftmaxOuter):
        there: Any = {"weight": None, "ids": None}
        return dataclasses.replace(factor, **there)
    return factor


def _unflattened(structure: Any, *arrays: Array) -> Factored:
    return jax.tree.unflatten(structure, arrays)


def recognised_by_name(equation: Equation, learned: Sequence[int]) -> dict[int, InNamed]:
    """The routes of the operands that are made of parameters, if the function has a rule; else
    none."""
    rule = of_name(name_of(equation))
    avals = [abstract(v.aval.shape, v.aval.dtype) for v in equation.invars]
    if rule is None or rule.ranks != tuple(len(a.shape) for a in avals):  # as under vmap
        return {}
    batch = [
        a if i in rule.shared else abstract((1, *a.shape), a.dtype) for i, a in enumerate(avals)
    ]

    def factors(operands: list[Array]) -> list[Factored | None]:
        outputs, residuals = rule.forward(*operands)
        return rule.factors(operands, residuals, outputs)

    found = jax.eval_shape(factors, batch)
    return {i: InNamed(rule, i, tuple(avals[i].shape), found[i]) for i in learned}


def recognised(equation: Equation, operand: int) -> Route | None:
    """The route of an operation whose input ``operand`` is the parameter, if it is known."""
    shape = tuple(equation.invars[operand].aval.shape)
    of_product, of_look_up, options = product(equation), look_up(equation), convolution(equation)
    if of_product is not None:
        return InProduct(operand, shape, of_product)
    if of_look_up is not None and operand == 0:
        return InLookUp(shape, of_look_up)
    if options is not None and operand == 1:
        return InConvolution.of(shape, options)
    return None


def _others(rank: int, *axes: Sequence[int]) -> list[int]:
    """The axes that are in none of ``axes``."""
    taken = [axis for some in axes for axis in some]
    return [axis for axis in range(rank) if axis not in taken]


def _ordered(array: Array, first: int, order: Sequence[int]) -> Array:
    """The axes from ``first`` on in another order."""
    return array.transpose((*range(first), *(first + axis for axis in order)))


def _laid_out(f: Factored, lengths: Sequence[int], shape: Shape, order: Sequence[int]) -> Factored:
    """The factors for a parameter of ``shape``, of whose axes ``f`` has those of ``order``, behind
    loops of ``lengths``."""
    f = reshaped(f, (*lengths, *(shape[axis] for axis in order)))
    loops = len(lengths)
    return transposed(f, (*range(loops), *(loops + axis for axis in inverse(order))))


def _lengths(a: Array, mapped: Sequence[bool]) -> list[int]:
    return [n for n, over in zip(a.shape[1:], mapped) if over]


def _stacked(
    make: Callable[..., Factored], arrays: Sequence[Array], mapped: Sequence[bool]
) -> Factored:
    """A factor of arrays ``(n, *loops, …)``: a stack of those of the loops that are mapped, the
    others being positions."""
    over = [1 + i for i, m in enumerate(mapped) if m]
    if not over:
        return make(*arrays)
    rest = [1 + i for i, m in enumerate(mapped) if not m]

    def layers_first(array: Array) -> Array:
        later = range(1 + len(mapped), array.ndim)
        array = array.transpose((*over, 0, *rest, *later))
        return array.reshape(-1, *array.shape[len(over) :])

    return Stacked(make(*map(layers_first, arrays)))
