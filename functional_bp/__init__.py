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
from .gradients import deltas, grad, value_and_grad
from .layer import Layer, ModelError, rule
from .per_example import clipped_grad, per_example_grad_norms, per_example_grads
from .reshape import flatten
