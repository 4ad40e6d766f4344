"""Hand-written backpropagation in JAX: the δ recursion, with gradients kept factored.

Layers (``model.init(key, x)`` takes one example, ``model.apply(params, x)`` a batch)
    dense                   fully connected: z = W a + b
    embedding               a vector for every id
    rnn                     recurrent, plain
    lstm                    recurrent, with a cell state and gates
    gru                     recurrent, with gates
    conv                    a convolution, with any number of spatial axes, channels last
    conv_transpose          its transpose
    max_pool                the highest of each window
    avg_pool                the mean of each window
    global_max_pool         the highest of each channel
    global_avg_pool         the mean of each channel
    upsample                more positions, nearest or linear
    pad                     zeros around an image
    crop                    an image without its border
    attention               of a sequence to itself or another, in linear memory
    positions               a learned vector for every position, added
    bidirectional           a recurrent layer from both ends
    batch_norm              each feature over the batch, with running averages
    layer_norm              each position's features, with mean 0 and variance 1
    rms_norm                each position's features, with a mean square of 1
    group_norm              groups of features of each example
    instance_norm           each feature of each example
    dropout                 drops numbers at random, where there is a key
    flatten                 an example's numbers on one axis

Activations (layers, used without a call unless they take an argument)
    sigmoid                 1 / (1 + e^−z)
    tanh                    the hyperbolic tangent
    hard_tanh               tanh in three straight pieces
    relu                    max(z, 0)
    leaky_relu              relu that lets a little through; leaky_relu() is the layer
    elu                     the exponential linear unit; elu() is the layer
    selu                    the scaled one, of self-normalising networks
    gelu                    the Gaussian error linear unit, exact
    gelu_tanh               gelu with tanh in place of Φ
    silu                    z sigmoid(z), also called swish
    mish                    z tanh(softplus(z))
    softplus                log(1 + e^z)
    softmax                 probabilities from logits
    log_softmax             log-probabilities from logits
    glu                     one half of the features, gated by the other's sigmoid
    geglu                   gated by the other's gelu
    reglu                   gated by the other's relu
    swiglu                  gated by the other's silu
    identity                the input as it is

Combinators (layers made of layers)
    chain                   one after another
    parallel                side by side on the same input; gives a tuple
    add                     the sum of a tuple
    multiply                the product of a tuple
    concatenate             a tuple's arrays one after another
    residual                a layer and a way around it
    repeat                  n of one kind, as one scan
    tied                    one parameter in several places
    at                      a layer on one entry of a dict
    entry                   one entry of a dict goes on alone

Layers of one's own
    rule                    from init, forward and backward of one example
    activation              from σ and σ′
    gated                   a gated linear unit from σ and σ′
    through_time            a recurrent layer from a cell
    Cell                    one step of a recurrent layer
    Layer                   what a layer is
    Equations               what a layer computes, forward and back, as text
    factors                 what a backward returns for each parameter

Layers from other code (traced: δ by autodiff, gradients factored where they can be)
    from_function           any function of parameters and one example
    from_flax               a Flax (linen) module
    from_nnx                a Flax NNX module
    from_equinox            an Equinox module
    explain                 how each parameter meets an example, and what is kept of it

Functions of arrays, for models of other libraries
    ops                     attention, recurrences, a vocabulary's loss, with backward passes

Losses
    losses                  squared, absolute, Huber, hinge, cross-entropies, …; one's own
    init                    parameters of a model and of a loss that has some

Gradients of a batch (``bp.grad(model, loss)`` gives a function of ``params, x, y``)
    value_and_grad          the mean cost and its gradient, by hand or by autodiff
    grad                    the gradient alone
    deltas                  δ of every layer
    clipped_grad            the mean of clipped gradients of single examples
    trainable               parameters without those that are frozen or state
    merged                  trained parameters and the others together again

Gradients of single examples
    per_example_grads       gₙ
    per_example_grad_norms  ‖gₙ‖
    grad_gram               ⟨gₙ, gₘ⟩ for all pairs
    grad_dots               ⟨gₙ, v⟩
    empirical_ntk           ⟨∂aₙ/∂θ, ∂aₘ/∂θ⟩: the neural tangent kernel of the outputs a
    grad_second_moment      the mean of gₙ²
    grad_variance           the variance of gₙ
    grad_noise_scale        the batch size beyond which larger ones help little
    grad_diversity          how little the gₙ agree

Curvature
    hvp                     the Hessian times a vector
    ggnvp                   the generalised Gauss–Newton matrix times a vector
    ggn_diagonal            its diagonal
    kronecker_factors       the factors A and G of each parameter's block
    Kronecker               such a pair
    contractions            what is asked of a parameter's factored gradient

Training
    fit                     trains with an optax optimiser; checkpoints, resumption
    kfac                    an optimiser: natural gradient by Kronecker factors
    minibatches             batches of examples in memory
    evaluate                mean cost and metrics over batches
    Run                     a training run so far
    History                 its losses and evaluations
    delete_checkpoints      empties a folder of checkpoints
    save_params             parameters to a safetensors file
    load_params             and from one

A model explained
    equations               a model's own equations, forward and back
    inspect                 what one pass computed at every layer, beside its equations
    Inspection              such a pass
    Inspected               and what it computed at one layer
    pictures                of such a pass, of a run, of norms (matplotlib)
    summary                 a model's layers with their shapes and sizes

Proofs and errors
    testing                 proves a layer's or model's backward against autodiff
    ModelError              what does not fit a model, named by its place

To read the package, begin with ``layers/dense.py`` and ``layers/activations.py``, where BP2, BP3
and BP4 are a line each; ``losses/`` has BP1. ``layers/chains.py`` runs the recursion from layer to
layer, ``recursion.py`` from the cost. Then bottom up:

    factors/        what a gradient is before anyone multiplies it out: δ and a
    contractions    what is asked of it
    layer, rules    what a layer is, and how a rule for one example becomes one
    losses/         the last layer
    traced/         a layer from any JAX function
    layers/         one file for each family of rules; combinators; recurrence/, convolution/
    ops/            rules as functions of arrays
    recursion       a model with its loss, forward and back
    quantity        what every quantity shares
    quantities/     gradients, per-example quantities, moments, inner products, curvature
    training/       the loop, batches, history, checkpoints, files of parameters, K-FAC
    views/          what a model is and what a pass computed: equations, tables, pictures
    testing/        proofs of one's own rules; nothing imports it

A file imports only from files above it in this list. (But the loss over a vocabulary, which is a
dense layer too, takes ``layers/dense.py``.)
"""

from importlib.metadata import PackageNotFoundError, version

from . import contractions, factors, losses, ops, testing
from .checks import ModelError
from .docstrings import Equations, shown
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
from .layers.attention.attention import attention
from .layers.attention.positions import positions
from .layers.chains import chain, parallel, residual
from .layers.convolution.conv import conv, conv_transpose
from .layers.convolution.pools import avg_pool, global_avg_pool, global_max_pool, max_pool
from .layers.convolution.resizing import crop, pad, upsample
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
from .views.inspecting import inspect
from .views.inspection import Inspected, Inspection
from .views.summary import summary

try:
    __version__ = version("functional_bp")
except PackageNotFoundError:  # a folder that was not installed
    __version__ = "0"

__all__ = [
    "Cell",
    "Equations",
    "History",
    "Inspected",
    "Inspection",
    "Kronecker",
    "Layer",
    "ModelError",
    "Run",
    "activation",
    "add",
    "at",
    "attention",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "chain",
    "clipped_grad",
    "concatenate",
    "contractions",
    "conv",
    "conv_transpose",
    "crop",
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
    "global_avg_pool",
    "global_max_pool",
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
    "max_pool",
    "merged",
    "minibatches",
    "mish",
    "multiply",
    "ops",
    "pad",
    "parallel",
    "per_example_grad_norms",
    "per_example_grads",
    "pictures",
    "positions",
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
    "upsample",
    "value_and_grad",
]

__dir__ = shown(globals())
