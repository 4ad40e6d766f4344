"""Rules of this package as functions of arrays, for models in Flax, Equinox or plain JAX.

Each has its backward pass attached, by hand: ``jax.grad``, ``jit``, ``vmap`` and ``scan`` take them
as they take any other function. Forward mode (``jax.jvp``) does not exist through them. A traced
layer (``bp.from_function`` and its like) knows them, and keeps the factors of their weights'
gradients.
"""

from ..docstrings import shown
from .activations import gelu
from .attention import attention
from .recurrence import gru, lstm, rnn
from .vocabulary import linear_softmax_cross_entropy

__all__ = ["attention", "gelu", "gru", "linear_softmax_cross_entropy", "lstm", "rnn"]

__dir__ = shown(globals())
