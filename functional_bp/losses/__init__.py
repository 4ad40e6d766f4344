"""Losses: the last layer of the recursion.

A loss takes the model's output a and the target y of one example and gives the cost C. Its
backward begins the recursion: ∂C/∂a, which is δ^L where the loss is fused with its activation.

    loss.value(a, y) -> C           a scalar
    loss.delta(a, y) -> ∂C/∂a       the shape of a

One example's cost, with p = softmax(a) or sigmoid(a):

    squared_error                   ½ Σ_j (a_j − y_j)²
    mean_squared_error              mean over j of (a_j − y_j)²
    absolute_error                  Σ_j |a_j − y_j|
    huber(t)                        Σ_j ½ e_j², or t (|e_j| − ½ t) beyond t;  e = a − y
    hinge                           Σ_j max(0, 1 − y_j a_j);  y_j −1 or 1
    softmax_cross_entropy           mean over positions of −Σ_k y_k log p_k
    smoothed_softmax_cross_entropy(α)   the same with (1 − α) one_hot(y) + α / K
    linear_softmax_cross_entropy(K) a last dense layer to K words and softmax_cross_entropy in one
    kl_divergence                   mean over positions of Σ_k y_k log(y_k / p_k)
    sigmoid_cross_entropy           −Σ_k [y_k log p_k + (1 − y_k) log(1 − p_k)]

For ``softmax_cross_entropy`` a is ``(*positions, classes)`` and y the class ids ``(*positions)``
or probabilities of a's shape. Where only some positions count, y is a dict of ``y`` and ``length``,
the first so many, or of ``y`` and ``mask``, bools ``(*positions)``; the mean is over those.
"""

from ..docstrings import shown
from .classification import (
    kl_divergence,
    perplexity,
    sigmoid_cross_entropy,
    smoothed_softmax_cross_entropy,
    softmax_cross_entropy,
)
from .definition import Loss, loss
from .regression import absolute_error, hinge, huber, mean_squared_error, squared_error
from .vocabulary import linear_softmax_cross_entropy

__all__ = [
    "Loss",
    "absolute_error",
    "hinge",
    "huber",
    "kl_divergence",
    "linear_softmax_cross_entropy",
    "loss",
    "mean_squared_error",
    "perplexity",
    "sigmoid_cross_entropy",
    "smoothed_softmax_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]

__dir__ = shown(globals())
