"""Hand-written backpropagation in JAX: the δ recursion, with gradients kept factored."""

from . import contractions, factors, losses
from .activations import (
    activation,
    gelu,
    gelu_tanh,
    identity,
    leaky_relu,
    relu,
    sigmoid,
    silu,
    softplus,
    tanh,
)
from .combinators import chain, parallel, repeat, residual, tied
from .dense import dense
from .freezing import merged, trainable
from .gradients import deltas, grad, value_and_grad
from .layer import Layer, ModelError, rule
from .per_example import clipped_grad, per_example_grad_norms, per_example_grads
from .reshape import flatten

__all__ = [
    "Layer",
    "ModelError",
    "activation",
    "chain",
    "clipped_grad",
    "contractions",
    "deltas",
    "dense",
    "factors",
    "flatten",
    "gelu",
    "gelu_tanh",
    "grad",
    "identity",
    "leaky_relu",
    "losses",
    "merged",
    "parallel",
    "per_example_grad_norms",
    "per_example_grads",
    "relu",
    "repeat",
    "residual",
    "rule",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
    "tied",
    "trainable",
    "value_and_grad",
]
