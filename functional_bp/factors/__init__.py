"""Factored gradients: what a parameter's gradient is before anyone multiplies it out.

BP3 and BP4 say that one example's gradient is made of two small things, a δ and an activation:

    ∂C/∂b = δ                (BP3)
    ∂C/∂W = δ aᵀ             (BP4)

A class here is one way in which a parameter meets its input. Each knows every contraction of the
batch of gradients gₙ it stands for, by the cheapest route for its shapes:

    total()          Σₙ gₙ                the gradient of a sum
    each()           gₙ                   one gradient per example, multiplied out
    squared_norm()   ‖gₙ‖²
    inner(other)     ⟨gₙ, hₙ⟩             cross terms of a parameter used in two places
    gram(other)      ⟨gₙ, hₘ⟩             for every pair of examples
    dot(v)           ⟨gₙ, v⟩
    second_moment()  mean over n of gₙ²
    scaled(w)        the factors of wₙ gₙ
    columns(j, k)    the factors of the k columns of gₙ from column j on
    examples(n, k)   the factors of the k examples from example n on
    as_outer()       the same gradients as Σ_t u_t v_tᵀ, where they are that

Every array in a factored gradient has the examples on its first axis; a rule, which sees one
example, builds one without that axis and ``vmap`` adds it. (But a ``Stacked`` has its layers before
it, and one array of an ``Along``, which functions alone have, is of all examples.)

What is larger than the factors is made for some columns or positions at a time, and of all examples
at once: a batch that is split among devices stays where it is. (A Gram matrix meets every pair of
examples, so it alone brings the factors of all examples to each device.) Sums run in float32 at
least, and so do the products in them: a square of 300 is no float16.

Index letters in every einsum of this folder: n, m examples; t, s positions; o the rows of the
parameter; i its columns.
"""

from ..docstrings import shown
from .combined import Stacked, Sum
from .factored import Factored, Itself, Outer, Summed, accumulator, per_example, wide
from .rows import Rows
from .softmax_outer import SoftmaxOuter

__all__ = [
    "Factored",
    "Itself",
    "Outer",
    "Rows",
    "SoftmaxOuter",
    "Stacked",
    "Sum",
    "Summed",
    "accumulator",
    "per_example",
    "wide",
]

__dir__ = shown(globals())
