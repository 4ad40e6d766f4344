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

from ..checks import ModelError, described, flag, function, number, text
from ..docstrings import Equations, explained, stated
from ..layer import Layer, check_array, no_parameters
from ..rules import rule
from ..values import recalled

Tree = Any


_SHAPES = "Element by element: z, a and every δ have the same shape, whatever it is."


@recalled
def activation(
    sigma: Callable[[Array], Array],
    dsigma: Callable[[Array], Array],
    *,
    name: str | None = None,
    of_output: bool = False,
    reference: Callable[[Array], Array] | None = None,
    equations: Equations | tuple[str, str] | None = None,
    doc: str = "",
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
      equations: the two above, with what σ and σ′ are; with its name for σ, if not given.
      doc: what else ``help`` shows of it.

    Raises:
      ModelError: in use, if z is not of a floating dtype.

    Example:
      >>> square = bp.activation(jnp.square, lambda z: 2 * z, name="square")
      >>> square.apply((), jnp.array([[1.0, 3.0]])).tolist()
      [[1.0, 9.0]]
    """

    function("activation: sigma", sigma)
    function("activation: dsigma", dsigma)
    function("activation: reference", reference, or_none=True)
    flag("activation: of_output", of_output)
    name = text("activation: name", getattr(sigma, "__name__", "σ") if name is None else name)
    equations = equations or (f"a = {name}(z)", f"∂C/∂z = ∂C/∂a ⊙ {name}′(z)")
    equations = stated(f"{name}: equations", equations, x="z", y="a")

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
        batched=True,
        elementwise=True,
        equations=equations,
        doc=doc,
    )


def _check_floating(params: Tree, z: Array) -> None:
    check_array(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ModelError(f"takes an array of floating-point numbers, got {described(z)}")


sigmoid = activation(
    lax.logistic,
    lambda a: a * (1 - a),
    name="sigmoid",
    of_output=True,
    equations=("a = 1 / (1 + e^{−z})", "∂C/∂z = ∂C/∂a ⊙ a ⊙ (1 − a)"),
    doc=f"The logistic function. {_SHAPES}",
)

tanh = activation(
    lax.tanh,
    lambda a: 1 - a * a,
    name="tanh",
    of_output=True,
    equations=("a = tanh z", "∂C/∂z = ∂C/∂a ⊙ (1 − a²)"),
    doc=f"The hyperbolic tangent. {_SHAPES}",
)


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
    batched=True,
    elementwise=True,
    equations=Equations("a = max(z, 0)", "∂C/∂z = ∂C/∂a where a > 0, else 0", "z", "a"),
    doc=f"""The rectified linear unit. It keeps a, which the layer above keeps too.

    {_SHAPES} (Nair & Hinton 2010, "Rectified linear units improve restricted Boltzmann
    machines".)""",
)


@explained(
    forward="a = z where z > 0, else s z",
    backward="∂C/∂z = ∂C/∂a ⊙ (1 where z > 0, else s)",
    x="z",
    y="a",
)
def leaky_relu(slope: float = 0.01) -> Layer:
    """A rectifier that lets a little through, element by element.

    Args:
      slope: s. (Maas et al. 2013, "Rectifier nonlinearities improve neural network acoustic
        models".)

    Raises:
      ModelError: if ``slope`` is not a finite number.

    Example:
      >>> bp.leaky_relu(0.5).apply((), jnp.array([[-1.0, 3.0]])).tolist()
      [[-0.5, 3.0]]
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


def gelu_derivative(z: Array) -> Array:
    """Φ(z) + z φ(z)."""
    return _normal_cdf(z) + z * _normal_pdf(z)


gelu = activation(
    _gelu,
    gelu_derivative,
    name="gelu",
    equations=("a = z Φ(z)", "∂C/∂z = ∂C/∂a ⊙ (Φ(z) + z φ(z))"),
    doc=f"""The Gaussian error linear unit; Φ and φ are the normal distribution's.

    {_SHAPES} (Hendrycks & Gimpel 2016, "Gaussian error linear units".)""",
)

_TANH_SCALE = math.sqrt(2 / math.pi)


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1 + jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z)))


def _gelu_tanh_derivative(z: Array) -> Array:
    t = jnp.tanh(_TANH_SCALE * (z + 0.044715 * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _TANH_SCALE * (1 + 3 * 0.044715 * z * z)


gelu_tanh = activation(
    _gelu_tanh,
    _gelu_tanh_derivative,
    name="gelu_tanh",
    equations=(
        "t = tanh(√(2/π) (z + 0.044715 z³))\na = ½ z (1 + t)",
        "∂C/∂z = ∂C/∂a ⊙ [½ (1 + t) + ½ z (1 − t²) √(2/π) (1 + 0.134145 z²)]",
    ),
    doc=f"""gelu with tanh in place of Φ.

    {_SHAPES} (Hendrycks & Gimpel 2016, "Gaussian error linear units".)""",
)


def _silu(z: Array) -> Array:
    return z * lax.logistic(z)


def silu_derivative(z: Array) -> Array:
    """s (1 + z (1 − s)), s = sigmoid(z)."""
    s = lax.logistic(z)
    return s * (1 + z * (1 - s))


silu = activation(
    _silu,
    silu_derivative,
    name="silu",
    equations=("a = z s,  s = sigmoid(z)", "∂C/∂z = ∂C/∂a ⊙ s ⊙ (1 + z (1 − s))"),
    doc=f"""The sigmoid-weighted linear unit, also called swish.

    {_SHAPES} (Elfwing et al. 2018.)""",
)


def _softplus(z: Array) -> Array:
    return jnp.logaddexp(z, jnp.zeros_like(z))


softplus = activation(
    _softplus,
    lax.logistic,
    name="softplus",
    equations=("a = log(1 + e^z)", "∂C/∂z = ∂C/∂a ⊙ sigmoid(z)"),
    doc=f"""A smooth rectifier.

    {_SHAPES} (Dugas et al. 2001.)""",
)


@explained(
    forward="a = z where z > 0, else α (e^z − 1)",
    backward="∂C/∂z = ∂C/∂a ⊙ (1 where z > 0, else α e^z)",
    x="z",
    y="a",
)
def elu(alpha: float = 1.0) -> Layer:
    """The exponential linear unit, element by element. (Clevert et al. 2016.)

    Args:
      alpha: α.

    Raises:
      ModelError: if ``alpha`` is not a finite number.

    Example:
      >>> bp.elu(1.0).apply((), jnp.array([[0.0, 3.0]])).tolist()
      [[0.0, 3.0]]
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
    equations=(
        "a = λ z where z > 0, else λ α (e^z − 1),  α = 1.6733,  λ = 1.0507",
        "∂C/∂z = ∂C/∂a ⊙ (λ where z > 0, else λ α e^z)",
    ),
    doc=f"""The scaled exponential linear unit of self-normalising networks.

    {_SHAPES} (Klambauer et al. 2017.)""",
)


def _mish_derivative(z: Array) -> Array:
    t = jnp.tanh(_softplus(z))
    return t + z * (1 - t * t) * lax.logistic(z)


mish = activation(
    lambda z: z * jnp.tanh(_softplus(z)),
    _mish_derivative,
    name="mish",
    equations=(
        "a = z t,  t = tanh(log(1 + e^z))",
        "∂C/∂z = ∂C/∂a ⊙ (t + z (1 − t²) sigmoid(z))",
    ),
    doc=f"""A smooth unit that is not monotonic.

    {_SHAPES} (Misra 2019.)""",
)

hard_tanh = activation(
    lambda z: jnp.clip(z, -1, 1),
    lambda z: ((z >= -1) & (z <= 1)).astype(z.dtype),
    name="hard_tanh",
    reference=jax.nn.hard_tanh,
    equations=(
        "a = z between −1 and 1, else the nearer of the two",
        "∂C/∂z = ∂C/∂a where −1 ≤ z ≤ 1, else 0",
    ),
    doc=f"""tanh in three straight pieces.

    {_SHAPES} (Collobert 2004.)""",
)


def check_features(params: Tree, z: Array) -> None:
    """Raises unless z is ``(..., features)``, of a floating dtype."""
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
    check=check_features,
    batched=True,
    equations=Equations(
        "a_j = e^{z_j} / Σ_k e^{z_k}", "∂C/∂z = a ⊙ (∂C/∂a − Σ_k a_k ∂C/∂a_k)", "z", "a"
    ),
    doc="""Probabilities from logits, over the last axis.

    z and a are ``(*positions, classes)``. As the last layer before a cross-entropy, leave it out:
    the loss contains it. (Bridle 1990.)""",
)


def _log_softmax_forward(params: Tree, z: Array, key: Array | None = None) -> tuple[Array, Array]:
    a = jax.nn.log_softmax(z, axis=-1)
    return a, a


log_softmax = rule(
    no_parameters,
    _log_softmax_forward,
    lambda params, a, da: (da - jnp.exp(a) * da.sum(-1, keepdims=True), ()),
    name="log_softmax",
    check=check_features,
    batched=True,
    equations=Equations("a_j = z_j − log Σ_k e^{z_k}", "∂C/∂z = ∂C/∂a − e^a Σ_k ∂C/∂a_k", "z", "a"),
    doc="""Log-probabilities from logits, over the last axis; z and a ``(*positions, classes)``.""",
)


identity = rule(
    no_parameters,
    lambda params, x, key=None: (x, ()),
    lambda params, residuals, dy: (dy, ()),
    name="identity",
    batched=True,
    equations=("y = x", "∂C/∂x = ∂C/∂y"),
    doc="The input as it is, whatever it is.",
)
