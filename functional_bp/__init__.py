"""Hand-written backpropagation in JAX: the δ recursion, with gradients kept factored.

To read the package, begin with ``layers/dense.py`` and ``layers/activations.py``, where BP2, BP3
and BP4 are a line each; ``losses/`` has BP1. ``layers/chains.py`` runs the recursion from layer to
layer, ``recursion.py`` from the cost. Then bottom up:

    factors/        what a gradient is before anyone multiplies it out: δ and a
    contractions    what is asked of it
    layer, rules    what a layer is, and how a rule for one example becomes one
    losses/         the last layer
    traced/         a layer from any JAX function
    layers/         one file for each family of rules; combinators; recurrence/
    recursion       a model with its loss, forward and back
    quantity        what every quantity shares
    quantities/     gradients, per-example quantities, moments, inner products, curvature
    training/       the loop, batches, history, checkpoints, files of parameters, K-FAC
    views/          what a model is and what a pass computed: equations, tables, pictures
    testing/        proofs of one's own rules; nothing imports it

A file imports only from files above it in this list.
"""

from importlib.metadata import PackageNotFoundError, version

from . import contractions, factors, losses, testing
from .checks import ModelError
from .docstrings import Equations
from .freezing import merged, trainable
from .layer import Layer
from .layers.activations import (
    activation,
    elu,
    gelu,
    gelu_tanh,
    hard_tanh,
    identity,
    leaky_relu,
    log_softmax,
    mish,
    relu,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from .layers.chains import chain, parallel, residual
from .layers.dense import dense
from .layers.dropout import dropout
from .layers.embedding import embedding
from .layers.entries import at, entry
from .layers.gates import gated, geglu, glu, reglu, swiglu
from .layers.joins import add, concatenate, multiply
from .layers.norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from .layers.recurrence.bidirectional import bidirectional
from .layers.recurrence.cell import Cell
from .layers.recurrence.cells import gru, lstm, rnn
from .layers.recurrence.through_time import through_time
from .layers.shapes import flatten
from .layers.stack import repeat
from .layers.tying import tied
from .quantities.clipping import clipped_grad
from .quantities.curvature import Kronecker, ggn_diagonal, ggnvp, hvp, kronecker_factors
from .quantities.gradients import deltas, grad, value_and_grad
from .quantities.inner_products import empirical_ntk, grad_dots, grad_gram
from .quantities.moments import (
    grad_diversity,
    grad_noise_scale,
    grad_second_moment,
    grad_variance,
)
from .quantities.per_example import per_example_grad_norms, per_example_grads
from .recursion import init
from .rules import rule
from .traced.explain import explain
from .traced.function import from_function
from .traced.libraries import from_equinox, from_flax, from_nnx
from .training.batches import minibatches
from .training.checkpoints import delete_checkpoints
from .training.evaluation import evaluate
from .training.fit import fit
from .training.history import History, Run
from .training.kfac import kfac
from .training.parameter_files import load_params, save_params
from .views import pictures
from .views.equations import equations
from .views.inspection import Inspection, inspect
from .views.summary import summary

try:
    __version__ = version("functional_bp")
except PackageNotFoundError:  # a folder that was not installed
    __version__ = "0"

__all__ = [
    "Cell",
    "Equations",
    "History",
    "Inspection",
    "Kronecker",
    "Layer",
    "ModelError",
    "Run",
    "activation",
    "add",
    "at",
    "batch_norm",
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
    "equations",
    "evaluate",
    "explain",
    "factors",
    "fit",
    "flatten",
    "from_equinox",
    "from_flax",
    "from_function",
    "from_nnx",
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
    "group_norm",
    "gru",
    "hard_tanh",
    "hvp",
    "identity",
    "init",
    "inspect",
    "instance_norm",
    "kfac",
    "kronecker_factors",
    "layer_norm",
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
    "pictures",
    "reglu",
    "relu",
    "repeat",
    "residual",
    "rms_norm",
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
