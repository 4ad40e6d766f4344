"""Hand-written backpropagation in JAX: the δ recursion, with gradients kept factored."""

from . import contractions, factors, losses, testing
from .activations import (
    activation,
    elu,
    gated,
    geglu,
    gelu,
    gelu_tanh,
    glu,
    hard_tanh,
    identity,
    leaky_relu,
    log_softmax,
    mish,
    reglu,
    relu,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    swiglu,
    tanh,
)
from .batches import minibatches
from .checkpoint import delete_checkpoints
from .checks import ModelError
from .combinators import chain, parallel, repeat, residual, tied
from .curvature import Kronecker, ggn_diagonal, ggnvp, hvp, kronecker_factors
from .dense import dense
from .dropout import dropout
from .embedding import embedding
from .freezing import merged, trainable
from .gradients import deltas, grad, value_and_grad
from .joins import add, concatenate, multiply
from .kfac import kfac
from .layer import Layer, rule
from .moments import (
    empirical_ntk,
    grad_diversity,
    grad_dots,
    grad_gram,
    grad_noise_scale,
    grad_second_moment,
    grad_variance,
)
from .per_example import clipped_grad, per_example_grad_norms, per_example_grads
from .recurrent import bidirectional, gru, lstm, rnn
from .shapes import flatten
from .summary import summary
from .tensors import load_params, save_params
from .through_time import Cell, through_time
from .training import History, Run, evaluate, fit
from .trees import at, entry

__all__ = [
    "Cell",
    "History",
    "Kronecker",
    "Layer",
    "ModelError",
    "Run",
    "activation",
    "add",
    "at",
    "bidirectional",
    "chain",
    "clipped_grad",
    "concatenate",
    "contractions",
    "delete_checkpoints",
    "deltas",
    "dense",
    "dropout",
    "elu",
    "embedding",
    "empirical_ntk",
    "entry",
    "evaluate",
    "factors",
    "fit",
    "flatten",
    "gated",
    "geglu",
    "gelu",
    "gelu_tanh",
    "ggn_diagonal",
    "ggnvp",
    "glu",
    "grad",
    "grad_diversity",
    "grad_dots",
    "grad_gram",
    "grad_noise_scale",
    "grad_second_moment",
    "grad_variance",
    "gru",
    "hard_tanh",
    "hvp",
    "identity",
    "kfac",
    "kronecker_factors",
    "leaky_relu",
    "load_params",
    "log_softmax",
    "losses",
    "lstm",
    "merged",
    "minibatches",
    "mish",
    "multiply",
    "parallel",
    "per_example_grad_norms",
    "per_example_grads",
    "reglu",
    "relu",
    "repeat",
    "residual",
    "rnn",
    "rule",
    "save_params",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "summary",
    "swiglu",
    "tanh",
    "testing",
    "through_time",
    "tied",
    "trainable",
    "value_and_grad",
]
