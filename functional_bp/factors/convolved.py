"""The gradient of a convolution's kernel: a sum over output positions of δ and an input's patch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .arranged import inverse, reshaped, transposed
from .factored import Factored, Outer, accumulator, einsum, per_example


@dataclass(frozen=True)
class Convolution:
    """How a kernel meets its input, as ``lax.conv_general_dilated`` has it.

    Attributes:
      kernel: its shape.
      options: strides, padding, dilations, groups and ``dimension_numbers``, as pairs.
    """

    kernel: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, a: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(a, kernel, **dict(self.options))

    @property
    def numbers(self) -> lax.ConvDimensionNumbers:
        """Which axes are batch, features and space: of the input, the kernel and the output."""
        return dict(self.options)["dimension_numbers"]

    @property
    def outputs(self) -> int:
        """The number of its output features."""
        return self.kernel[self.numbers.rhs_spec[0]]

    def gradient(self, a: Array, delta: Array) -> Array:
        """∂/∂kernel ⟨δ, conv(a, kernel)⟩, summed over the batch axis."""
        dtype = accumulator(a, delta)
        a, delta = a.astype(dtype), delta.astype(dtype)
        shape = jax.ShapeDtypeStruct(self.kernel, dtype)  # type: ignore[no-untyped-call]
        return jax.linear_transpose(lambda kernel: self(a, kernel), shape)(delta)[0]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "delta"], meta_fields=["convolution"]
)
@dataclass(frozen=True)
class Convolved(Factored):
    """gₙ = Σ_p δ_p patch_p(aₙ): what one output position adds to the kernel's gradient is an outer
    product of its δ and the patch of the input below it.

    ``a`` and ``delta`` are ``(n, …)`` in the layouts of the convolution, batch axis included.
    """

    a: Array
    delta: Array
    convolution: Convolution

    def each(self) -> Array:
        return jax.vmap(self.convolution.gradient)(self.a, self.delta)

    def scaled(self, weights: Array) -> Convolved:
        return Convolved(self.a, per_example(weights, self.delta), self.convolution)

    def total(self) -> Array:
        numbers = self.convolution.numbers
        a = _one_batch(self.a, numbers.lhs_spec[0])
        return self.convolution.gradient(a, _one_batch(self.delta, numbers.out_spec[0]))

    def inner(self, other: Factored) -> Array:
        pair = self._patches_of(other)
        return pair[0].inner(pair[1]) if pair else super().inner(other)

    def gram(self, other: Factored) -> Array:
        pair = self._patches_of(other)
        return pair[0].gram(pair[1]) if pair else super().gram(other)

    def _patches_of(self, other: Factored) -> tuple[Factored, Factored] | None:
        """Both by their patches, if that is cheaper: t² (o + i) multiplications against t o i,
        where i are the numbers of a patch."""
        if not isinstance(other, Convolved) or other.convolution != self.convolution:
            return None
        kernel, outputs = self.convolution.kernel, self.convolution.outputs
        columns = math.prod(kernel) // outputs
        positions = math.prod(self.delta.shape[1:]) // outputs
        if positions * (outputs + columns) > outputs * columns:
            return None
        f, g = as_patches(self), as_patches(other)
        return None if f is None or g is None else (f, f if other is self else g)

    def dot(self, v: Array) -> Array:
        def of_one(a: Array, delta: Array) -> Array:
            z = self.convolution(a, v.astype(a.dtype))
            return einsum("i,i->", z.reshape(-1), delta.reshape(-1))

        return jax.vmap(of_one)(self.a, self.delta)

    def as_outer(self) -> Outer | None:
        patches = as_patches(self)
        return None if patches is None else patches.as_outer()

    @property
    def rows_are_inputs(self) -> bool:
        return self.convolution.numbers.rhs_spec[0] > 0


def as_patches(f: Convolved) -> Factored | None:
    """An ``Outer`` of δ and patches; None where features are convolved in groups."""
    convolution, options = f.convolution, dict(f.convolution.options)
    if options["feature_group_count"] != 1:
        return None
    numbers = convolution.numbers
    outputs, inputs, *space = numbers.rhs_spec
    window = [convolution.kernel[axis] for axis in space]
    names = ("padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")

    def of_one(a: Array) -> Array:
        """(batch, features in, *window, *positions)."""
        patches = lax.conv_general_dilated_patches(
            a, window, options["window_strides"], **{name: options[name] for name in names}
        )
        patches = patches.transpose(numbers.out_spec)
        return patches.reshape(
            len(patches), convolution.kernel[inputs], *window, *patches.shape[2:]
        )

    v = jax.vmap(of_one)(f.a)
    # Columns lie as they do in the kernel, positions before them.
    order = sorted((inputs, *space))
    columns = [2 + (inputs, *space).index(axis) for axis in order]
    v = v.transpose((0, 1, *range(3 + len(space), v.ndim), *columns))
    batch, features, *positions = (1 + axis for axis in numbers.out_spec)
    u = f.delta.transpose((0, batch, *positions, features))
    sizes = [convolution.kernel[axis] for axis in order]
    n, rows = len(u), u.shape[-1]
    outer = Outer(u.reshape(n, -1, rows), v.reshape(n, -1, math.prod(sizes)))
    lying = reshaped(outer, (rows, *sizes))
    return transposed(lying, inverse((outputs, *order)))


def _one_batch(array: Array, axis: int) -> Array:
    """``(n, …)`` with the examples joined to the batch axis."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
