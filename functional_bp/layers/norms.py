"""Normalisation: numbers with mean 0 and variance 1, then a scale and a bias for each feature.

Whatever they are normalised over, the equations are one:

    μ = mean x,  r = 1 / √(mean (x − μ)² + ε),  x̂ = (x − μ) r,  y = s ⊙ x̂ + b
    g = ∂C/∂y ⊙ s
    ∂C/∂x = r (g − mean g − x̂ mean (g ⊙ x̂))

(x̂ depends on every x in its mean: ∂x̂_i/∂x_j = r (1[i = j] − 1/N − x̂_i x̂_j / N).)

Axes: n examples, any number of positions, c features, which come last. Means run in float32 at
least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..checks import ModelError, described, flag, number, whole
from ..docstrings import explained
from ..factors.factored import Summed, accumulator, wide
from ..layer import Layer, batch_of, check_array
from ..rules import rule

Tree = Any
Axes = tuple[int, ...]
NORMALISED = "μ = mean x,  r = 1 / √(mean (x − μ)² + ε),  x̂ = (x − μ) r\ny = s ⊙ x̂ + b"
BACK = """g = ∂C/∂y ⊙ s
∂C/∂x = r (g − mean g − x̂ mean (g ⊙ x̂))
∂C/∂s = Σ ∂C/∂y ⊙ x̂,  ∂C/∂b = Σ ∂C/∂y"""

RUNNING = """μ̄ ← (1 − m) μ̄ + m μ,  σ̄² ← (1 − m) σ̄² + m σ² N / (N − 1)
at inference  x̂ = (x − μ̄) r̄,  r̄ = 1 / √(σ̄² + ε)"""


class Normalised(NamedTuple):
    """What a norm keeps: x̂, in groups, and the r of each group."""

    x_hat: Array
    r: Array


def _normalised(x: Array, axes: Axes, epsilon: float) -> tuple[Normalised, Array, Array]:
    """x̂ and r, and the μ and the variance that they come from."""
    if math.prod(x.shape[axis] for axis in axes) == 1:
        raise ModelError("takes more than one number to normalise over, got 1")
    dtype, x = x.dtype, wide(x)
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    variance = (centred * centred).mean(axes, keepdims=True)
    r = lax.rsqrt(variance + epsilon)
    return Normalised((centred * r).astype(dtype), r), mean, variance


def _back(kept: Normalised, g: Array, axes: Axes) -> Array:
    """∂C/∂x from g = ∂C/∂x̂."""
    x_hat = wide(kept.x_hat)
    through_variance = x_hat * (g * x_hat).mean(axes, keepdims=True)
    dx = kept.r * (g - g.mean(axes, keepdims=True) - through_variance)
    return dx.astype(kept.x_hat.dtype)


def _affine(params: Tree, x_hat: Array) -> Array:
    """s ⊙ x̂ + b."""
    y = wide(x_hat) * _of_features(params["scale"], x_hat)
    y = y + _of_features(params["bias"], x_hat) if "bias" in params else y
    return y.astype(jnp.result_type(x_hat, params["scale"]))


def _affine_back(params: Tree, x_hat: Array, dy: Array) -> tuple[Array, Tree]:
    """g = ∂C/∂x̂, and the factors of s and b."""
    factors = {"scale": Summed(dy * x_hat.astype(dy.dtype))}
    if "bias" in params:
        factors["bias"] = Summed(dy)
    return wide(dy) * _of_features(params["scale"], dy), factors


def _of_features(vector: Array, x: Array) -> Array:
    """One number for each feature, to meet ``(…, features)``."""
    return jnp.expand_dims(wide(vector), range(x.ndim - 1))


def _initial(names: tuple[str, ...], x: Array) -> Tree:
    check_array(x)
    ones = {"scale": jnp.ones(x.shape[-1:], x.dtype)}
    return ones | {name: jnp.zeros(x.shape[-1:], x.dtype) for name in names if name != "scale"}


def _check(names: tuple[str, ...], params: Tree, x: Array) -> None:
    check_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0:
        raise ModelError(
            f"takes examples of shape (..., features), floating-point, got {described(x)}"
        )
    shapes = {name: x.shape[-1:] for name in names}
    if not isinstance(params, dict) or jax.tree.map(jnp.shape, params) != shapes:
        raise ModelError(
            f"takes {', '.join(names)} of ({x.shape[-1]},) each, got {described(params)}; are they "
            "another model's?"
        )


def _each_by_itself(
    kind: str,
    epsilon: float,
    bias: bool,
    axes: Callable[[int], Axes],
    grouped: Callable[[Array], Array] = lambda x: x,
    check: Callable[[Array], None] = lambda x: None,
    told: tuple[str, ...] = (),
) -> Layer:
    """A norm that takes its means within each example.

    Args:
      axes: over which, of an array with so many axes in the shape that ``grouped`` gives it.
      check: raises where one example does not fit.
      told: what its name says in front of the options.
    """
    names = _checked(kind, epsilon, bias)

    def init(key: Array, x: Array) -> Tree:
        params = _initial(names, x)
        check_all(params, x)
        jax.eval_shape(forward, params, batch_of(1, x))  # raises for groups of one number
        return params

    def check_all(params: Tree, x: Array) -> None:
        _check(names, params, x)
        check(x)

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Normalised]:
        groups = grouped(x)
        kept, _, _ = _normalised(groups, axes(groups.ndim), epsilon)
        return _affine(params, kept.x_hat.reshape(x.shape)), kept

    def backward(params: Tree, kept: Normalised, dy: Array) -> tuple[Array, Tree]:
        groups = kept.x_hat
        g, factors = _affine_back(params, groups.reshape(dy.shape), dy)
        dx = _back(kept, g.reshape(groups.shape), axes(groups.ndim))
        return dx.reshape(dy.shape), factors

    name = _told(kind, epsilon, bias, *told)
    return rule(init, forward, backward, name=name, check=check_all, batched=True)


def _checked(kind: str, epsilon: float, bias: bool) -> tuple[str, ...]:
    """The names of the parameters."""
    number(f"{kind}: epsilon", epsilon, above=0)
    return ("scale", "bias") if flag(f"{kind}: bias", bias) else ("scale",)


@explained(forward=NORMALISED, backward=BACK)
def layer_norm(*, epsilon: float = 1e-5, bias: bool = True) -> Layer:
    """Each position's features, with mean 0 and variance 1.

    x and y are ``(*positions, features)``, s and b ``(features,)``; means run over the features.
    (Ba, Kiros & Hinton 2016, "Layer normalization".)

    Args:
      epsilon: ε, above 0.
      bias: whether there is a b.

    Raises:
      ModelError: for one feature alone, and for what is not floating-point.

    Example:
      >>> layer = bp.layer_norm()
      >>> params = layer.init(jax.random.key(0), jnp.ones(2))
      >>> layer.apply(params, jnp.array([[1.0, 3.0]])).round(2).tolist()
      [[-1.0, 1.0]]
    """
    return _each_by_itself("layer_norm", epsilon, bias, lambda ndim: (ndim - 1,))


@explained(forward=NORMALISED, backward=BACK)
def group_norm(groups: int, *, epsilon: float = 1e-5, bias: bool = True) -> Layer:
    """Groups of features, over all positions of an example, with mean 0 and variance 1.

    x and y are ``(*positions, features)``, s and b ``(features,)``; means run over the positions
    and the features of a group. (Wu & He 2018, "Group normalization".)

    Args:
      groups: how many; the features divide among them, the first so many to the first group.
      epsilon, bias: as for ``layer_norm``.

    Raises:
      ModelError: where the features do not divide; for groups of one number.

    Example:
      >>> layer = bp.group_norm(2)
      >>> params = layer.init(jax.random.key(0), jnp.ones(4))
      >>> layer.apply(params, jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(2).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """
    whole("group_norm: groups", groups)

    def check(x: Array) -> None:
        if x.shape[-1] % groups:
            raise ModelError(
                f"takes features that divide among {groups} groups, got {described(x)}"
            )

    return _each_by_itself(
        "group_norm",
        epsilon,
        bias,
        lambda ndim: (1, 3),
        lambda x: x.reshape(len(x), math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups),
        check,
        (str(groups),),
    )


@explained(forward=NORMALISED, backward=BACK)
def instance_norm(*, epsilon: float = 1e-5, bias: bool = True) -> Layer:
    """Each feature, over all positions of an example, with mean 0 and variance 1.

    x and y are ``(*positions, features)``, s and b ``(features,)``; means run over the positions.
    (Ulyanov, Vedaldi & Lempitsky 2016, "Instance normalization".)

    Args:
      epsilon, bias: as for ``layer_norm``.

    Raises:
      ModelError: for a single position.

    Example:
      >>> layer = bp.instance_norm()
      >>> params = layer.init(jax.random.key(0), jnp.ones((2, 1)))
      >>> layer.apply(params, jnp.array([[[1.0], [3.0]]])).round(2).tolist()
      [[[-1.0], [1.0]]]
    """
    return _each_by_itself("instance_norm", epsilon, bias, lambda ndim: tuple(range(1, ndim - 1)))


@explained(
    forward="r = 1 / √(mean x² + ε),  x̂ = x r,  y = s ⊙ x̂",
    backward="""
        g = ∂C/∂y ⊙ s
        ∂C/∂x = r (g − x̂ mean (g ⊙ x̂))
        ∂C/∂s = Σ ∂C/∂y ⊙ x̂""",
)
def rms_norm(*, epsilon: float = 1e-5) -> Layer:
    """Each position's features, with a mean square of 1; there is no bias.

    x and y are ``(*positions, features)``, s ``(features,)``; the mean runs over the features.
    (Zhang & Sennrich 2019, "Root mean square layer normalization".)

    Args:
      epsilon: ε, above 0.

    Raises:
      ModelError: for what is not floating-point.

    Example:
      >>> layer = bp.rms_norm()
      >>> params = layer.init(jax.random.key(0), jnp.ones(2))
      >>> print(layer.apply(params, jnp.array([[3.0, -3.0]])).round(2))
      [[ 1. -1.]]
    """
    _checked("rms_norm", epsilon, bias=False)

    def init(key: Array, x: Array) -> Tree:
        return _initial(("scale",), x)

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Tree]:
        r = lax.rsqrt((wide(x) ** 2).mean(-1, keepdims=True) + epsilon)
        x_hat = (wide(x) * r).astype(x.dtype)
        return _affine(params, x_hat), (x_hat, r)

    def backward(params: Tree, residuals: Tree, dy: Array) -> tuple[Array, Tree]:
        x_hat, r = residuals
        g, factors = _affine_back(params, x_hat, dy)
        wide_x_hat = wide(x_hat)
        dx = r * (g - wide_x_hat * (g * wide_x_hat).mean(-1, keepdims=True))
        return dx.astype(x_hat.dtype), factors

    check = functools.partial(_check, ("scale",))
    name = _told("rms_norm", epsilon, bias=True)
    return rule(init, forward, backward, name=name, check=check, batched=True)


@explained(
    forward=f"{NORMALISED}\n{RUNNING}",
    backward=f"{BACK}\nat inference  ∂C/∂x = r̄ g",
)
def batch_norm(*, momentum: float = 0.1, epsilon: float = 1e-5, bias: bool = True) -> Layer:
    """Each feature, over all positions of all examples of the batch, with mean 0 and variance 1.

    x and y are ``(*positions, features)``, s and b ``(features,)``; means run over the N numbers
    that the batch has of a feature, and σ² is their variance. The running averages are μ̄,
    ``mean``, and σ̄², ``var``, which is of the unbiased variance. (Ioffe & Szegedy 2015, "Batch
    normalization".)

    Parameters: ``scale``, ``bias``, and the state ``mean`` and ``var``, all ``(features,)``; the
    state is renewed by ``bp.fit`` and by ``bp.value_and_grad(…, renew=True)``, has no gradient, and
    is what ``model.apply`` and ``model.inference()`` normalise with.

    It mixes the examples of a batch: none has a gradient of its own but at inference. Examples of
    weight 0 are in the means too. On several devices the means are the whole batch's.

    Args:
      momentum: m, from 0 to 1.
      epsilon, bias: as for ``layer_norm``.

    Raises:
      ModelError: when traced over a single number for each feature.

    Example:
      >>> model = bp.chain(bp.dense(2), bp.batch_norm())
      >>> params = model.init(jax.random.key(0), jnp.ones(3))
      >>> step = bp.value_and_grad(model, bp.losses.squared_error, renew=True)
      >>> (cost, params), gradient = step(params, jnp.eye(3), jnp.ones((3, 2)))
      >>> sorted(k for k, g in gradient[1].items() if g is not None)
      ['bias', 'scale']
    """
    number("batch_norm: momentum", momentum, least=0, most=1)
    names = _checked("batch_norm", epsilon, bias)
    more = [] if momentum == 0.1 else [f"momentum={momentum}"]
    name = _told("batch_norm", epsilon, bias, *more)
    check = functools.partial(_check, (*names, *STATE))

    def init(key: Array, x: Array) -> Tree:
        params = _initial(names, x)
        zeros = jnp.zeros(x.shape[-1:], accumulator(x))
        return params | {"mean": zeros, "var": zeros + 1}

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Tree]:
        kept, mean, variance = _normalised(x, tuple(range(x.ndim - 1)), epsilon)
        return _affine(params, kept.x_hat), (kept, mean.reshape(-1), variance.reshape(-1))

    def backward(params: Tree, residuals: Tree, dy: Array) -> tuple[Array, Tree]:
        kept, _, _ = residuals
        g, factors = _affine_back(params, kept.x_hat, dy)
        return _back(kept, g, tuple(range(dy.ndim - 1))), factors

    def renew(params: Tree, residuals: Tree) -> Tree:
        kept, mean, variance = residuals
        n = kept.x_hat.size // mean.size
        now = {"mean": mean, "var": variance * (n / (n - 1))}
        return params | {k: (1 - momentum) * params[k] + momentum * now[k] for k in STATE}

    return rule(
        init,
        forward,
        backward,
        name=name,
        check=check,
        batched=True,
        mixes_examples=True,
        state=STATE,
        renew=renew,
        inference=_with_running_averages(name, init, check, epsilon),
    )


STATE = ("mean", "var")


def _with_running_averages(name: str, init: Any, check: Any, epsilon: float) -> Layer:
    """Batch norm at inference: nothing but a scale and a bias."""

    def forward(params: Tree, x: Array, key: Array | None = None) -> tuple[Array, Array]:
        r = lax.rsqrt(wide(params["var"]) + epsilon)
        centred = wide(x) - _of_features(params["mean"], x)
        x_hat = (centred * _of_features(r, x)).astype(x.dtype)
        return _affine(params, x_hat), x_hat

    def backward(params: Tree, x_hat: Array, dy: Array) -> tuple[Array, Tree]:
        g, factors = _affine_back(params, x_hat, dy)
        r = lax.rsqrt(wide(params["var"]) + epsilon)
        return (g * _of_features(r, dy)).astype(x_hat.dtype), factors

    return rule(
        init, forward, backward, name=f"{name}.inference()", check=check, batched=True, state=STATE
    )


def _told(kind: str, epsilon: float, bias: bool, *first: str) -> str:
    """The name with the options that are not the defaults: ``layer_norm(bias=False)``."""
    options = [] if epsilon == 1e-5 else [f"epsilon={epsilon}"]
    options += [] if bias else ["bias=False"]
    return f"{kind}({', '.join([*first, *options])})"
