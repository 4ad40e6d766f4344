"""Proofs: hand-written rules against autodiff of their textbook form.

    bp.testing.check_layer(my_layer, jnp.zeros(5))

says nothing where a layer's backward pass is right, for every contraction of its factors, and a
batch equals its examples one by one. Otherwise it raises ``AssertionError`` with the quantity, the
leaf, the largest error and where it is.
"""

from ..docstrings import shown
from .layers import check_layer
from .models import check_model

__all__ = ["check_layer", "check_model"]

__dir__ = shown(globals())
