"""How a parameter meets an example in one operation, and the factors of its gradient there.

A route reads an activation on the way forward; with δ, the cotangent of what the operation gives,
it makes the factors. Arrays come with the axes ``(n, *loops, …)``: the examples, the turns of the
loops around, and what one turn has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax import Array

from ..factors.arranged import reshaped, transposed
from ..factors.combined import Stacked
from ..factors.convolved import Convolution, Convolved
from ..factors.factored import Factored, Outer
from ..factors.rows import Rows
from .jaxprs import Equation, LookUp, Product, convolution, look_up, product

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """One operation.

    Attributes:
      name: what ``explain`` calls it.
      operand: which of the operation's inputs is the parameter.
      shape: of the parameter.
    """

    operand: int
    shape: Shape

    name = "route"

    def reads(self, values: Sequence[Array]) -> Array:
        """The activation, from the operation's inputs."""
        raise NotImplementedError

    @property
    def summed(self) -> int:
        """How many products are summed in each number that the operation gives."""
        return 1

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        """The factors; the parameter has an entry for each turn of the loops that are ``mapped``,
        and its gradient is a sum over those of the others."""
        raise NotImplementedError


@dataclass(frozen=True)
class InProduct(Route):
    """z = W a over any axes: Outer products, one for each entry of the axes that go together."""

    product: Product

    name = "matrix product"

    @property
    def summed(self) -> int:
        return math.prod(self.shape[axis] for axis in self.product.contracted[self.operand])

    def reads(self, values: Sequence[Array]) -> Array:
        return values[1 - self.operand]

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        loops = len(mapped)
        w, other = self.operand, 1 - self.operand
        (w_batch, w_sum), (a_batch, a_sum) = (
            (self.product.batch[side], self.product.contracted[side]) for side in (w, other)
        )
        rank = a.ndim - 1 - loops
        a_free = [axis for axis in range(rank) if axis not in (*a_batch, *a_sum)]
        w_free = [axis for axis in range(len(self.shape)) if axis not in (*w_batch, *w_sum)]
        sizes = [self.shape[axis] for axis in (*w_batch, *w_free, *w_sum)]
        batch, free = len(w_batch), len(w_free)
        rows, columns = math.prod(sizes[batch : batch + free]), math.prod(sizes[batch + free :])

        # (batch, positions, columns) and (batch, positions, rows) of one turn
        v = _axes(a, 1 + loops, (*a_batch, *a_free, *a_sum))
        positions = [a.shape[1 + loops + axis] for axis in a_free]
        first = batch if w == 0 else batch + len(a_free)
        z_rows = range(first, first + free)
        z_free = [i for i in range(batch, delta.ndim - 1 - loops) if i not in z_rows]
        u = _axes(delta, 1 + loops, (*range(batch), *z_free, *z_rows))
        lead = a.shape[: 1 + loops]
        together = [a.shape[1 + loops + axis] for axis in a_batch]
        v = v.reshape(*lead, *together, math.prod(positions), columns)
        u = u.reshape(*lead, *together, math.prod(positions), rows)
        f = _stacked(Outer, (u, v), (*mapped, *[True] * batch))
        f = reshaped(f, (*_lengths(a, mapped), *sizes))
        order = (*w_batch, *w_free, *w_sum)
        return transposed(f, _back(order, sum(mapped)))


@dataclass(frozen=True)
class InLookUp(Route):
    """y_t = W[k_t]: rows of a table."""

    look_up: LookUp

    name = "look-up"

    def reads(self, values: Sequence[Array]) -> Array:
        ids = values[1][..., 0]
        rows = self.shape[self.look_up.axis]
        return ids.clip(0, rows - 1) if self.look_up.clips else ids

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        loops, offsets = len(mapped), self.look_up.offsets
        rank = delta.ndim - 1 - loops
        v = _axes(delta, 1 + loops, (*(i for i in range(rank) if i not in offsets), *offsets))
        rows = self.shape[self.look_up.axis]
        rest = [i for i in range(len(self.shape)) if i != self.look_up.axis]
        sizes = [self.shape[i] for i in rest]
        v = v.reshape(*a.shape, math.prod(sizes))
        f = _stacked(functools.partial(Rows, rows=rows), (a, v), mapped)
        f = reshaped(f, (*_lengths(a, mapped), rows, *sizes))
        return transposed(f, _back((self.look_up.axis, *rest), sum(mapped)))


@dataclass(frozen=True)
class InConvolution(Route):
    """z = conv(a, W)."""

    convolution: Convolution

    name = "convolution"

    @property
    def summed(self) -> int:
        return math.prod(self.shape) // self.convolution.outputs

    def reads(self, values: Sequence[Array]) -> Array:
        return values[0]

    def factor(self, a: Array, delta: Array, mapped: tuple[bool, ...]) -> Factored:
        numbers, loops = self.convolution.numbers, len(mapped)
        turns = [i for i, over in enumerate(mapped) if not over]

        def one_batch(array: Array, axis: int) -> Array:
            """The turns of loops that share the kernel, as more of the batch axis."""
            axis += 1 + sum(mapped)
            array = array.transpose(
                (
                    *(0, *(1 + i for i, over in enumerate(mapped) if over)),
                    *range(1 + loops, axis + len(turns)),
                    *(1 + i for i in turns),
                    *range(axis + len(turns), array.ndim),
                )
            )
            size = math.prod(array.shape[axis : axis + len(turns) + 1])
            return array.reshape(*array.shape[:axis], size, *array.shape[axis + len(turns) + 1 :])

        arrays = (one_batch(a, numbers.lhs_spec[0]), one_batch(delta, numbers.out_spec[0]))
        make = functools.partial(Convolved, convolution=self.convolution)
        over = [True] * sum(mapped)
        f = _stacked(make, arrays, over)
        return reshaped(f, (*_lengths(arrays[0], over), *self.shape))


def recognised(equation: Equation, operand: int) -> Route | None:
    """The route of an operation whose input ``operand`` is the parameter, if it is known."""
    shape = tuple(equation.invars[operand].aval.shape)
    of_product, of_look_up, options = product(equation), look_up(equation), convolution(equation)
    if of_product is not None:
        return InProduct(operand, shape, of_product)
    if of_look_up is not None and operand == 0:
        return InLookUp(operand, shape, of_look_up)
    if options is not None and operand == 1:
        return InConvolution(operand, shape, Convolution(shape, tuple(options.items())))
    return None


def _axes(array: Array, first: int, order: Sequence[int]) -> Array:
    """The axes from ``first`` on in another order."""
    return array.transpose((*range(first), *(first + axis for axis in order)))


def _back(order: Sequence[int], kept: int) -> Shape:
    """The permutation that undoes ``order``, behind axes that stay."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return (*range(kept), *(kept + axis for axis in inverse))


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
