"""Convolutions and the gradient of their kernel: a sum over output positions of δ and a patch.

    y_{t o}        = Σ_{k c} W_{k c o} x_{s t + d k − p, c}
    ∂C/∂x_{u c}    = Σ_{t k: s t + d k − p = u} Σ_o W_{k c o} δ_{t o}
    ∂C/∂W_{k c o}  = Σ_t δ_{t o} x_{s t + d k − p, c}

for stride s, dilation d and p zeros before the first input, on each spatial axis. All three are
convolutions: of x with W; of δ, its positions s apart, with W from its end to its begin; and of x
with δ, its positions s apart, in strides of d, where examples are summed over as features are
elsewhere. (Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning".)

Axes: n examples, b more batch axes of each, any number of spatial ones, c or o features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from .arranged import reshaped
from .factored import Factored, Outer, accumulator, einsum, per_example

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """How a kernel meets its input.

    Attributes:
      kernel: its shape, ``(*window, c / groups, o)``.
      strides, dilation: s and d of each spatial axis.
      pads: the numbers of zeros before and after; below 0, of inputs that are left out.
      spread: how far inputs lie apart, zeros between them; 1 for side by side.
      groups: of features, each convolved by itself.
    """

    kernel: Sizes
    strides: Sizes
    pads: tuple[tuple[int, int], ...]
    dilation: Sizes
    spread: Sizes
    groups: int = 1

    @property
    def window(self) -> Sizes:
        return self.kernel[:-2]

    @property
    def outputs(self) -> int:
        """The number of output features."""
        return self.kernel[-1]

    def __call__(self, x: Array, W: Array) -> Array:
        """y ``(b, *space, o)``, of x ``(b, *space, c)``."""
        return lax.conv_general_dilated(
            x,
            W,
            self.strides,
            self.pads,
            lhs_dilation=self.spread,
            rhs_dilation=self.dilation,
            dimension_numbers=_layout(len(self.window)),
            feature_group_count=self.groups,
            preferred_element_type=accumulator(x, W),
        )

    def back(self, delta: Array, W: Array, space: Sequence[int]) -> Array:
        """∂C/∂x ``(b, *space, c)``, of δ ``(b, *positions, o)``."""
        rank, (c, o) = len(self.window), self.kernel[-2:]
        W = lax.rev(W, range(rank))
        W = W.reshape(*self.window, c, self.groups, o // self.groups)
        W = jnp.swapaxes(W, -3, -1).reshape(*self.window, o // self.groups, self.groups * c)
        pads = []
        for axis, size in enumerate(space):
            reach = self.dilation[axis] * (self.window[axis] - 1)
            given = self.strides[axis] * (delta.shape[1 + axis] - 1)
            before = reach - self.pads[axis][0]
            pads.append((before, self.spread[axis] * (size - 1) + reach - given - before))
        return lax.conv_general_dilated(
            delta,
            W,
            self.spread,
            pads,
            lhs_dilation=self.strides,
            rhs_dilation=self.dilation,
            dimension_numbers=_layout(rank),
            feature_group_count=self.groups,
            preferred_element_type=accumulator(delta, W),
        )

    def gradient(self, x: Array, delta: Array) -> Array:
        """∂C/∂W, summed over b."""
        rank = len(self.window)
        pads = []
        for axis, size in enumerate(x.shape[1:-1]):
            reach = self.dilation[axis] * (self.window[axis] - 1)
            given = self.strides[axis] * (delta.shape[1 + axis] - 1)
            before = self.pads[axis][0]
            pads.append((before, reach + given - self.spread[axis] * (size - 1) - before))
        space = tuple(range(1, 1 + rank))
        numbers = lax.ConvDimensionNumbers(
            (1 + rank, 0, *space), (1 + rank, 0, *space), (rank, 1 + rank, *range(rank))
        )
        return lax.conv_general_dilated(
            x,
            delta,
            self.dilation,
            pads,
            lhs_dilation=self.spread,
            rhs_dilation=self.strides,
            dimension_numbers=numbers,
            batch_group_count=self.groups,
            preferred_element_type=accumulator(x, delta),
        )

    def patches(self, x: Array) -> Array:
        """``(b, *positions, c, *window)``: the inputs that each output is made of."""
        found = lax.conv_general_dilated_patches(
            x,
            self.window,
            self.strides,
            self.pads,
            lhs_dilation=self.spread,
            rhs_dilation=self.dilation,
            dimension_numbers=_layout(len(self.window)),
        )
        return found.reshape(*found.shape[:-1], -1, *self.window)


def _layout(rank: int) -> lax.ConvDimensionNumbers:
    """Of arrays ``(b, *space, features)`` and kernels ``(*window, c, o)``."""
    space = tuple(range(1, 1 + rank))
    array = (0, 1 + rank, *space)
    return lax.ConvDimensionNumbers(array, (1 + rank, rank, *range(rank)), array)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "delta"], meta_fields=["convolution"]
)
@dataclass(frozen=True)
class Convolved(Factored):
    """gₙ = Σ_t δ_t patch_t(xₙ): what an output position adds to the kernel's gradient is an outer
    product of its δ and the patch of the input below it.

    ``x`` is ``(n, b, *space, c)`` and ``delta`` ``(n, b, *positions, o)``.
    """

    x: Array
    delta: Array
    convolution: Convolution

    def each(self) -> Array:
        return jax.vmap(self.convolution.gradient)(self.x, self.delta)

    def scaled(self, weights: Array) -> Convolved:
        return Convolved(self.x, per_example(weights, self.delta), self.convolution)

    def total(self) -> Array:
        return self.convolution.gradient(_one_batch(self.x), _one_batch(self.delta))

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
        outputs = self.convolution.outputs
        columns = math.prod(self.convolution.kernel) // outputs
        positions = math.prod(self.delta.shape[1:]) // outputs
        if positions * (outputs + columns) > outputs * columns:
            return None
        f, g = as_patches(self), as_patches(other)
        return None if f is None or g is None else (f, f if other is self else g)

    def dot(self, v: Array) -> Array:
        def of_one(x: Array, delta: Array) -> Array:
            z = self.convolution(x, v.astype(x.dtype))
            return einsum("i,i->", z.reshape(-1), delta.reshape(-1))

        return jax.vmap(of_one)(self.x, self.delta)

    def as_outer(self) -> Outer | None:
        patches = as_patches(self)
        return None if patches is None else patches.as_outer()

    @property
    def rows_are_inputs(self) -> bool:
        return True


def as_patches(f: Convolved) -> Factored | None:
    """An ``Outer`` of patches and δ; None where features are convolved in groups."""
    convolution, n = f.convolution, len(f.x)
    if convolution.groups != 1:
        return None
    patches = convolution.patches(_one_batch(f.x))  # (n b, *positions, c, *window)
    rank = len(convolution.window)
    patches = jnp.moveaxis(patches, -1 - rank, -1)
    outer = Outer(
        patches.reshape(n, -1, math.prod(convolution.kernel[:-1])),
        f.delta.reshape(n, -1, convolution.outputs),
    )
    return reshaped(outer, convolution.kernel)


def _one_batch(array: Array) -> Array:
    """``(n b, …)``."""
    return array.reshape(-1, *array.shape[2:])
