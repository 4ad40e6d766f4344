"""Activations: a = σ(z), element by element. Their backward is the ⊙ σ′(z) of BP1 and BP2.

An activation is a layer: it is used without a call unless it takes an argument. Shapes: z, a and
every δ have the same shape, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .checks import ModelError, described, flag, function, number, text
from .layer import Layer, check_array, no_parameters, rule

Tree = Any


def activation(
    sigma: Callable[[Array], Array],
    dsigma: Callable[[Array], Array],
    *,
    name: str | None = None,
    of_output: bool = False,
    reference: Callable[[Array], Array] | None = None,
) -> Layer:
    """An activation layer from σ and its derivative.

        a = σ(z)
        ∂C/∂z = ∂C/∂a ⊙ σ′(z)

    (The element-wise chain rule: a_j depends on z_j alone.)

    Args:
      sigma: σ, element by element.
      dsigma: σ′ as a function of z; as a function of a = σ(z) if ``of_output``, which then keeps
        a and lets z go.
      name: how errors call it.
      of_output: ``dsigma`` is a function of a.
      reference: σ for autodiff, where its own derivative of ``sigma`` is another at a kink.

    Raises:
      ModelError: in use, if z is not of a floating dtype.
    """

    function("activation: sigma", sigma)
    function("activation: dsigma", dsigma)
    function("activation: reference", reference, or_none=True)
    flag("activation: of_output", of_output)
    name = text("activation: name", getattr(sigma, "__name__", "σ") if name is None else name)

    def forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
        a = sigma(z)
        return a, a if of_output else z

    def backward(params: Tree, residual: Array, da: Array) -> tuple[Array, Tree]:
        return da * dsigma(residual), ()

    return rule(
        no_parameters,
        forward,
        backward,
        name=name,
        check=_check_floating,
        reference=(lambda params, z, key=None: reference(z)) if reference else None,
        positionwise=True,
    )


def _check_floating(params: Tree, z: Array) -> None:
    check_array(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ModelError(f"takes an array of floating-point numbers, got {described(z)}")


sigmoid = activation(lax.logistic, lambda a: a * (1 - a), name="sigmoid", of_output=True)
"""σ(z) = 1 / (1 + e^{−z}); σ′ = a (1 − a)."""

tanh = activation(lax.tanh, lambda a: 1 - a * a, name="tanh", of_output=True)
"""σ(z) = tanh z; σ′ = 1 − a²."""


def _relu_forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
    # A select, not jnp.maximum(z, 0). XLA recomputes an operation on one large array wherever it
    # is read: of a maximum, read again by the way back, it therefore keeps z beside a. A select
    # reads two, its result is kept, and z is not: two thirds of an MLP's temp memory.
    a = jnp.where(z < 0, 0, z)
    return a, a


relu = rule(
    no_parameters,
    _relu_forward,
    lambda params, a, da: (jnp.where(a > 0, da, 0), ()),
    name="relu",
    check=_check_floating,
    reference=lambda params, z, key=None: jax.nn.relu(z),
    positionwise=True,
)
"""σ(z) = max(z, 0); σ′ = 1 where a > 0, else 0: it keeps a, which the layer above keeps too."""


def leaky_relu(slope: float = 0.01) -> Layer:
    """σ(z) = z where z > 0, else slope · z; σ′ = 1 or slope. (Maas et al. 2013.)

    Raises:
      ModelError: if ``slope`` is not a finite number.
    """
    number("leaky_relu: slope", slope)
    return activation(
        lambda z: jnp.where(z > 0, z, slope * z),
        lambda z: jnp.where(z > 0, jnp.ones_like(z), slope),
        name=f"leaky_relu({slope})",
        of_output=slope >= 0,  # a > 0 exactly where z > 0
    )


def _normal_cdf(z: Array) -> Array:
    return 0.5 * lax.erfc(-z * math.sqrt(0.5))


def _normal_pdf(z: Array) -> Array:
    return jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu(z: Array) -> Array:
    return z * _normal_cdf(z)


def _gelu_derivative(z: Array) -> Array:
    return _normal_cdf(z) + z * _normal_pdf(z)


gelu = activation(_gelu, _gelu_derivative, name="gelu")
"""σ(z) = z Φ(z), Φ the normal distribution's; σ′ = Φ(z) + z φ(z). (Hendrycks & Gimpel 2016.)"""

_TANH_SCALE = math.sqrt(2 / math.pi)


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1 + jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z)))


def _gelu_tanh_derivative(z: Array) -> Array:
    t = jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _TANH_SCALE * (1 + 3 * 0.044715 * z * z)


gelu_tanh = activation(_gelu_tanh, _gelu_tanh_derivative, name="gelu_tanh")
"""gelu with tanh in place of Φ: σ(z) = ½ z (1 + t), t = tanh(√(2/π)(z + 0.044715 z³));
σ′ = ½ (1 + t) + ½ z (1 − t²) √(2/π) (1 + 0.134145 z²). (Hendrycks & Gimpel 2016.)"""


def _silu(z: Array) -> Array:
    return z * lax.logistic(z)


def _silu_derivative(z: Array) -> Array:
    s = lax.logistic(z)
    return s * (1 + z * (1 - s))


silu = activation(_silu, _silu_derivative, name="silu")
"""σ(z) = z s, s = sigmoid(z); σ′ = s (1 + z (1 − s)). (Elfwing et al. 2018.)"""


def _softplus(z: Array) -> Array:
    return jnp.logaddexp(z, jnp.zeros_like(z))


softplus = activation(_softplus, lax.logistic, name="softplus")
"""σ(z) = log(1 + e^z); σ′ = sigmoid(z). (Dugas et al. 2001.)"""


def elu(alpha: float = 1.0) -> Layer:
    """σ(z) = z where z > 0, else α (e^z − 1); σ′ = 1 or α e^z. (Clevert et al. 2016.)

    Raises:
      ModelError: if ``alpha`` is not a finite number.
    """
    number("elu: alpha", alpha)
    return activation(
        lambda z: jnp.where(z > 0, z, alpha * jnp.expm1(jnp.minimum(z, 0))),
        lambda z: jnp.where(z > 0, 1, alpha * jnp.exp(jnp.minimum(z, 0))),
        name=f"elu({alpha})",
    )


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

selu = activation(
    lambda z: _SELU_SCALE * jnp.where(z > 0, z, _SELU_ALPHA * jnp.expm1(jnp.minimum(z, 0))),
    lambda z: _SELU_SCALE * jnp.where(z > 0, 1, _SELU_ALPHA * jnp.exp(jnp.minimum(z, 0))),
    name="selu",
)
"""σ(z) = λ z where z > 0, else λ α (e^z − 1), α = 1.6733, λ = 1.0507; σ′ = λ or λ α e^z.
(Klambauer et al. 2017.)"""


def _mish_derivative(z: Array) -> Array:
    t = jnp.tanh(_softplus(z))
    return t + z * (1 - t * t) * lax.logistic(z)


mish = activation(lambda z: z * jnp.tanh(_softplus(z)), _mish_derivative, name="mish")
"""σ(z) = z t, t = tanh(log(1 + e^z)); σ′ = t + z (1 − t²) sigmoid(z). (Misra 2019.)"""

hard_tanh = activation(
    lambda z: jnp.clip(z, -1, 1),
    lambda z: ((z >= -1) & (z <= 1)).astype(z.dtype),
    name="hard_tanh",
    reference=jax.nn.hard_tanh,
)
"""σ(z) = z between −1 and 1, else the nearer of the two; σ′ = 1 between them, else 0.
(Collobert 2004.)"""


def _check_features(params: Tree, z: Array) -> None:
    check_array(z)
    if not jnp.issubdtype(z.dtype, jnp.floating) or z.ndim == 0:
        raise ModelError(f"takes floating-point numbers (..., features), got {described(z)}")


def _softmax_forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
    a = jax.nn.softmax(z, axis=-1)
    return a, a


softmax = rule(
    no_parameters,
    _softmax_forward,
    lambda params, a, da: (a * (da - (a * da).sum(-1, keepdims=True)), ()),
    name="softmax",
    check=_check_features,
    positionwise=True,
)
"""a_j = e^{z_j} / Σ_k e^{z_k} over the last axis; ∂C/∂z = a ⊙ (∂C/∂a − Σ_k a_k ∂C/∂a_k).
As the last layer before a cross-entropy, leave it out: the loss contains it. (Bridle 1990.)"""


def _log_softmax_forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
    a = jax.nn.log_softmax(z, axis=-1)
    return a, a


log_softmax = rule(
    no_parameters,
    _log_softmax_forward,
    lambda params, a, da: (da - jnp.exp(a) * da.sum(-1, keepdims=True), ()),
    name="log_softmax",
    check=_check_features,
    positionwise=True,
)
"""a_j = z_j − log Σ_k e^{z_k} over the last axis; ∂C/∂z = ∂C/∂a − e^a Σ_k ∂C/∂a_k."""


def gated(sigma: Callable[[Array], Array], dsigma: Callable[[Array], Array], *, name: str) -> Layer:
    """One half of the features, gated by the other: a gated linear unit.

        [u, g] = z,  a = u ⊙ σ(g)
        ∂C/∂u = ∂C/∂a ⊙ σ(g),  ∂C/∂g = ∂C/∂a ⊙ u ⊙ σ′(g)

    z is ``(*positions, 2h)`` and a ``(*positions, h)``. (Dauphin et al. 2017; Shazeer 2020, "GLU
    variants improve transformer".)

    Args:
      sigma: σ, element by element.
      dsigma: σ′ as a function of g.
      name: how errors call it.

    Raises:
      ModelError: in use, if the number of features is odd.
    """

    function("gated: sigma", sigma)
    function("gated: dsigma", dsigma)
    text("gated: name", name)

    def check(params: Tree, z: Array) -> None:
        _check_features(params, z)
        if z.shape[-1] % 2:
            raise ModelError(f"takes an even number of features, got {described(z)}")

    def forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
        u, g = jnp.split(z, 2, axis=-1)
        return u * sigma(g), z

    def backward(params: Tree, z: Array, da: Array) -> tuple[Array, Tree]:
        u, g = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([da * sigma(g), da * u * dsigma(g)], axis=-1), ()

    return rule(no_parameters, forward, backward, name=name, check=check, positionwise=True)


def _sigmoid_derivative(z: Array) -> Array:
    return lax.logistic(z) * lax.logistic(-z)


glu = gated(lax.logistic, _sigmoid_derivative, name="glu")
"""Gated by σ = sigmoid."""

reglu = gated(jax.nn.relu, lambda g: (g > 0).astype(g.dtype), name="reglu")
"""Gated by σ = relu."""

geglu = gated(_gelu, _gelu_derivative, name="geglu")
"""Gated by σ = gelu."""

swiglu = gated(_silu, _silu_derivative, name="swiglu")
"""Gated by σ = silu."""


identity = rule(
    no_parameters,
    lambda params, x, key=None: (x, ()),
    lambda params, residuals, dy: (dy, ()),
    name="identity",
    positionwise=True,
)
"""y = x; ∂C/∂x = ∂C/∂y."""
