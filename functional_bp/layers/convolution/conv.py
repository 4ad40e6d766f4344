"""Convolution and its transpose, channels last, with any number of spatial axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...checks import ModelError, described, flag, function, whole
from ...docstrings import explained
from ...factors.arranged import reshaped, transposed
from ...factors.convolved import Convolution, Convolved
from ...factors.factored import Factored, Summed
from ...layer import Layer
from ...rules import rule
from .windows import Padding, Placed, Whole, Windows

Tree = Any
Initializer = Callable[..., Array]

lecun_normal = jax.nn.initializers.lecun_normal()
"""Normal with variance 1 / (numbers of a window), for a weight ``(*window, in, out)``."""


@explained(
    forward="z_{t o} = b_o + Σ_{k c} W_{k c o} a_{s t + d k − p, c}",
    backward="""
        ∂C/∂a_{u c} = Σ_{t k: s t + d k − p = u} Σ_o W_{k c o} δ_{t o}      (BP2)
        ∂C/∂W_{k c o} = Σ_t δ_{t o} a_{s t + d k − p, c}      (BP4)
        ∂C/∂b_o = Σ_t δ_{t o}      (BP3)""",
    x="a",
    y="z",
)
def conv(
    features: int,
    kernel_size: Whole,
    *,
    strides: Whole = 1,
    padding: Padding = "SAME",
    dilation: Whole = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer = lecun_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer:
    """A convolution: a dense layer of the window around each position, the same at all of them.

    a is ``(*space, in)``, W ``(*kernel_size, in / groups, features)``, b ``(features,)``, z and δ
    ``(*positions, features)``; k runs over the window, s is the stride, d the dilation and p the
    padding before the first input, on each spatial axis. Inputs beyond the ends are 0.

    All three products are convolutions: ∂C/∂a of δ, its positions s apart, with W from its end to
    its begin; ∂C/∂W of a with δ, its positions s apart, in strides of d. (LeCun et al. 1989;
    Dumoulin & Visin 2016.)

    Args:
      features: the number of output channels.
      kernel_size: the window's size, a number for every spatial axis or one of each.
      strides, dilation: s and d, as well.
      padding: ``"SAME"``: as many outputs as strides fit into the input, with the zeros that this
        takes on both sides, one more behind where their number is odd. ``"VALID"``: none.
        ``"CIRCULAR"``: as many as ``"SAME"``, of the other end in place of zeros. Or numbers: one
        for all sides, or of each axis one or ``(before, after)``.
      groups: of channels, in and out, each convolved by itself; as many as there are inputs for a
        depthwise convolution.
      bias: whether there is a b.
      weight_init, bias_init: ``(key, shape, dtype) -> array``.

    Raises:
      ModelError: for groups that do not divide, a window that is larger than the padded input, a
        wrong number of axes, and another layer's parameters.

    Example:
      >>> layer = bp.conv(16, 3, strides=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((32, 32, 3)))
      >>> params["weight"].shape, layer.apply(params, jnp.ones((8, 32, 32, 3))).shape
      ((3, 3, 3, 16), (8, 16, 16, 16))
    """
    of = _Options("conv", features, groups, bias, weight_init, bias_init)
    windows = Windows("conv", "kernel_size", kernel_size, strides, padding, dilation)

    def check(params: Tree, a: Array) -> None:
        windows.check(a)
        of.check(params, windows.at(a.shape[:-1]), a)

    def init(key: Array, a: Array) -> Tree:
        windows.check(a)
        return of.init(key, windows.at(a.shape[:-1]), a)

    def placed(a: Array, W: Array) -> tuple[Placed, Convolution]:
        at = windows.at(a.shape[1:-1])
        ones = (1,) * len(at.size)
        return at, Convolution(W.shape, at.strides, at.zeros, at.dilation, ones, groups)

    def forward(params: Tree, a: Array, key: Array | None = None) -> tuple[Array, Array]:
        W = params["weight"]
        at, convolution = placed(a, W)
        return of.with_bias(params, convolution(at.wrapped(a), W), a), a

    def backward(params: Tree, a: Array, delta: Array) -> tuple[Array, Tree]:
        W = params["weight"]
        at, convolution = placed(a, W)
        beside = at.wrapped(a)
        da = at.unwrapped(convolution.back(delta, W, beside.shape[1:-1]))
        weight = Convolved(beside[:, None], delta[:, None], convolution)
        return da.astype(a.dtype), of.factors(weight, delta)

    name = of.named(kernel_size, strides=strides, padding=padding, dilation=dilation)
    return rule(init, forward, backward, name=name, check=check, batched=True)


@explained(
    forward="z_{u o} = b_o + Σ_{t k: s t + d k − p = u} Σ_c W_{k c o} a_{t c}",
    backward="""
        ∂C/∂a_{t c} = Σ_{k o} W_{k c o} δ_{s t + d k − p, o}      (BP2)
        ∂C/∂W_{k c o} = Σ_t a_{t c} δ_{s t + d k − p, o}      (BP4)
        ∂C/∂b_o = Σ_u δ_{u o}      (BP3)""",
    x="a",
    y="z",
)
def conv_transpose(
    features: int,
    kernel_size: Whole,
    *,
    strides: Whole = 1,
    padding: Padding = "SAME",
    dilation: Whole = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer = lecun_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer:
    """A transposed convolution: what takes a convolution's δ back, as a layer of its own.

    Every input adds W, times itself, to the outputs around it. With a ``(*space, in)`` and z
    ``(*positions, features)``, W is ``(*kernel_size, in / groups, features)``. Its backward pass is
    a convolution. (Zeiler et al. 2010; Dumoulin & Visin 2016.)

    Args:
      features: the number of output channels.
      kernel_size, strides, dilation: as of ``bp.conv``.
      padding: of the convolution of which it is the transpose: what is left out of the outputs
        before and after. ``"SAME"``: s outputs for each input. ``"VALID"``: nothing is left out.
        ``"CIRCULAR"``: as many as ``"SAME"``, and what would lie beyond one end is added at the
        other. Or numbers, as of ``bp.conv``.
      groups, bias, weight_init, bias_init: as of ``bp.conv``.

    Raises:
      ModelError: for groups that do not divide, padding that leaves no output, a wrong number of
        axes, and another layer's parameters.

    Example:
      >>> layer = bp.conv_transpose(3, 4, strides=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((16, 16, 8)))
      >>> params["weight"].shape, layer.apply(params, jnp.ones((2, 16, 16, 8))).shape
      ((4, 4, 8, 3), (2, 32, 32, 3))
    """
    of = _Options("conv_transpose", features, groups, bias, weight_init, bias_init)
    windows = Windows("conv_transpose", "kernel_size", kernel_size, strides, padding, dilation)

    def check(params: Tree, a: Array) -> None:
        windows.check_rank(a)
        of.check(params, windows.onto(a.shape[:-1])[1], a)

    def init(key: Array, a: Array) -> Tree:
        windows.check_rank(a)
        return of.init(key, windows.onto(a.shape[:-1])[1], a)

    def placed(a: Array, W: Array) -> tuple[tuple[int, ...], Placed, Convolution, Array]:
        """The outputs' sizes, and the convolution of them that gives a, with its kernel."""
        space, at = windows.onto(a.shape[1:-1])
        ones, (c, o) = (1,) * len(at.size), W.shape[-2:]
        turned = W.reshape(*at.size, c, groups, o // groups)
        turned = jnp.swapaxes(turned, -3, -1).reshape(*at.size, o // groups, groups * c)
        how = Convolution(turned.shape, at.strides, at.zeros, at.dilation, ones, groups)
        return space, at, how, turned

    def forward(params: Tree, a: Array, key: Array | None = None) -> tuple[Array, Array]:
        space, at, convolution, W = placed(a, params["weight"])
        return of.with_bias(params, at.unwrapped(convolution.back(a, W, at.beside(space))), a), a

    def backward(params: Tree, a: Array, delta: Array) -> tuple[Array, Tree]:
        _, at, convolution, W = placed(a, params["weight"])
        beside = at.wrapped(delta)
        da = convolution(beside, W)
        weight = Convolved(beside[:, None], a[:, None], convolution)
        return da.astype(a.dtype), of.factors(_turned_back(weight, W.shape, groups), delta)

    name = of.named(kernel_size, strides=strides, padding=padding, dilation=dilation)
    return rule(init, forward, backward, name=name, check=check, batched=True)


def _turned_back(factor: Factored, shape: tuple[int, ...], groups: int) -> Factored:
    """From ``(*window, o / groups, c)`` to ``(*window, c / groups, o)``."""
    *window, o, c = shape
    rank = len(window)
    if groups == 1:
        return transposed(factor, (*range(rank), rank + 1, rank))
    split = reshaped(factor, (*window, o, groups, c // groups))
    swapped = transposed(split, (*range(rank), rank + 2, rank + 1, rank))
    return reshaped(swapped, (*window, c // groups, groups * o))


class _Options:
    """What both have besides their windows."""

    def __init__(
        self,
        of: str,
        features: int,
        groups: int,
        bias: bool,
        weight_init: Initializer,
        bias_init: Initializer,
    ) -> None:
        whole(f"{of}: features", features)
        whole(f"{of}: groups", groups)
        flag(f"{of}: bias", bias)
        function(f"{of}: weight_init", weight_init)
        function(f"{of}: bias_init", bias_init)
        if features % groups:
            raise ModelError(f"{of}: groups: takes a divisor of {features} features, got {groups}")
        self.of, self.features, self.groups, self.bias = of, features, groups, bias
        self.weight_init, self.bias_init = weight_init, bias_init

    def named(self, size: Whole, **windows: Any) -> str:
        """How errors and summaries call the layer."""
        usual = {"strides": 1, "padding": "SAME", "dilation": 1, "groups": 1, "bias": True}
        given = windows | {"groups": self.groups, "bias": self.bias}
        said = [f"{name}={given[name]!r}" for name in usual if given[name] != usual[name]]
        return f"{self.of}({', '.join([str(self.features), str(size), *said])})"

    def shapes(self, at: Placed, a: Array) -> dict[str, tuple[int, ...]]:
        c, groups = a.shape[-1], self.groups
        if c % groups:
            raise ModelError(f"takes channels that {groups} groups divide, got {described(a)}")
        weight = {"weight": (*at.size, c // groups, self.features)}
        return weight | ({"bias": (self.features,)} if self.bias else {})

    def init(self, key: Array, at: Placed, a: Array) -> Tree:
        shapes = self.shapes(at, a)
        params = {"weight": self.weight_init(key, shapes["weight"], a.dtype)}
        return params | (
            {"bias": self.bias_init(key, shapes["bias"], a.dtype)} if self.bias else {}
        )

    def check(self, params: Tree, at: Placed, a: Array) -> None:
        shapes = self.shapes(at, a)
        given = jax.tree.map(jnp.shape, params) if isinstance(params, dict) else None
        floating = all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))
        if given != shapes or not floating:
            raise ModelError(
                f"takes parameters {shapes}, floating-point, got {described(params)}; are they "
                "another model's?"
            )

    def with_bias(self, params: Tree, z: Array, a: Array) -> Array:
        z = z.astype(jnp.result_type(a, params["weight"]))
        return z + jnp.expand_dims(params["bias"], range(z.ndim - 1)) if self.bias else z

    def factors(self, weight: Factored, delta: Array) -> Tree:
        return {"weight": weight} | ({"bias": Summed(delta)} if self.bias else {})
