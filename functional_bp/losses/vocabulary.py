"""Softmax cross-entropy over a vocabulary, with the linear layer before it: no logits are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..checks import ModelError, abstract, described, function, number, whole
from ..contractions import asks_layers, contract_factors, keep, total
from ..docstrings import explained
from ..factors.factored import Outer, accumulator, block_of, einsum, per_example
from ..factors.softmax_outer import SoftmaxOuter, over_blocks, rows_at_once
from ..layer import Layer
from ..layers.dense import dense
from . import by_positions
from .classification import smoothed_softmax_cross_entropy, softmax_cross_entropy
from .definition import Loss, loss
from .targets import ids_or_probabilities, target_and_mask

Tree = Any
LOW = -1e30  # below every logit, and finite

small_normal = jax.nn.initializers.normal(0.02)


@explained(
    forward="""
        z_t = W a_t,  λ_t = log Σ_k e^{z_tk},  p_t = e^{z_t − λ_t}
        q_t = (1 − α) one_hot(y_t) + α / K
        C = mean over positions of λ_t − Σ_k q_tk z_tk + ζ λ_t²""",
    backward="""
        u_t = ((1 + 2 ζ λ_t) p_t − q_t) / positions      (BP1: δ^L, of z)
        ∂C/∂a_t = Wᵀ u_t      (BP2)
        ∂C/∂W = Σ_t u_t a_tᵀ      (BP4)""",
    x="a",
    y="C",
)
def linear_softmax_cross_entropy(
    vocabulary: int,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight_init: Callable[..., Array] = small_normal,
) -> Loss:
    """A last dense layer without bias and the softmax cross-entropy of its outputs, in one.

    It equals ``bp.dense(vocabulary, bias=False)`` under ``bp.losses.softmax_cross_entropy``, but
    the logits z, a number for each position and word, are never all there: they are made for some
    words at a time, twice. On the way forward λ_t comes of them, and E_t = Σ_k p_tk W_k, which is
    all that ∂C/∂a needs; for what is asked of ∂C/∂W, u is made anew. Memory does not grow with
    the vocabulary, but for W and its gradient.

    a is ``(*positions, features)``, y the ids ``(*positions)``. Where only some positions count, it
    is a tree of ``y`` and either ``length``, an integer, or ``mask``, bools ``(*positions)``, as
    for ``bp.losses.softmax_cross_entropy``. The mean is over an example's valid positions.

    Its parameter is ``weight``, W ``(vocabulary, features)``: make those of a model with it by
    ``bp.init``. An embedding's table serves as W by ``bp.tied(loss, {(1, "weight"): (0, 0,
    "weight")})``. Curvature goes through the logits, and needs room for them.

    (Milakov & Gimelshein 2018, the sum of exponentials in one sweep; Press & Wolf 2017, the tie;
    Szegedy et al. 2016, α; Chowdhery et al. 2022, ζ, the z-loss.)

    Args:
      vocabulary: K, the number of words.
      smoothing: α, from 0 to 1.
      z_loss: ζ, from 0: how much λ is held near 0.
      weight_init: ``(key, shape, dtype) -> array``.

    Raises:
      ModelError: for outputs that are not ``(…, features)``, targets that are not ids of the
        vocabulary at each position, and another model's parameters. An id outside that is traced
        gives NaN.

    Example:
      >>> model, loss = bp.embedding(100, 8), bp.losses.linear_softmax_cross_entropy(100)
      >>> x, y = jnp.array([[3, 1, 4]]), jnp.array([[1, 4, 1]])
      >>> params = bp.init(model, loss, jax.random.key(0), x[0], y[0])
      >>> cost, gradient = bp.value_and_grad(model, loss)(params, x, y)
      >>> gradient[1]["weight"].shape
      (100, 8)
    """
    whole("linear_softmax_cross_entropy: vocabulary", vocabulary, least=2)
    number("linear_softmax_cross_entropy: smoothing", smoothing, least=0, most=1)
    number("linear_softmax_cross_entropy: z_loss", z_loss, least=0)
    function("linear_softmax_cross_entropy: weight_init", weight_init)
    of_logits = _of_logits(smoothing, z_loss)
    of = _OverVocabulary(vocabulary, smoothing, z_loss, weight_init, of_logits)
    given = {"smoothing": smoothing, "z_loss": z_loss}
    said = [f"{name}={value}" for name, value in given.items() if value]
    name = f"linear_softmax_cross_entropy({', '.join([str(vocabulary), *said])})"
    return Loss(
        name=name,
        value=of.value,
        delta=of.delta,
        check=of.check,
        init=of.init,
        head=(dense(vocabulary, bias=False), of_logits),
        over_batch=Layer(
            name, lambda key, ay: of.init(key, *ay), of.forward, of.backward, reference=of.reference
        ),
    )


def _of_logits(smoothing: float, z_loss: float) -> Loss:
    """The same loss of logits that are there."""
    plain = smoothed_softmax_cross_entropy(smoothing) if smoothing else softmax_cross_entropy
    if not z_loss:
        return plain

    def value(z: Array, y: Tree) -> Array:
        return plain.value(z, y) + z_loss * (_ids_and_shares(z, y)[1] * _log_sum(z) ** 2).sum()

    def delta(z: Array, y: Tree) -> Array:
        weight = 2 * z_loss * _ids_and_shares(z, y)[1] * _log_sum(z)
        d = plain.delta(z, y) + weight[..., None] * jax.nn.softmax(z.astype(weight.dtype))
        return d.astype(z.dtype)

    return loss(value, delta, name=f"{plain.name} + {z_loss} λ²", check=plain.check)


def _log_sum(z: Array) -> Array:
    return jax.nn.logsumexp(z.astype(accumulator(z)), axis=-1)


def _ids_and_shares(a: Array, y: Tree) -> tuple[Array, Array]:
    """One example's ids, and the share of each position in its mean: 0 where it does not count."""
    ids, mask = target_and_mask(a, y)
    dtype = accumulator(a)
    if mask is None:
        return ids, jnp.full(ids.shape, 1 / max(1, ids.size), dtype)
    return ids, mask.astype(dtype) / jnp.maximum(1, mask.sum())


@dataclass(frozen=True)
class _OverVocabulary:
    vocabulary: int
    smoothing: float
    z_loss: float
    weight_init: Callable[..., Array]
    of_logits: Loss

    def init(self, key: Array, a: Array, y: Tree) -> Tree:
        return {"weight": self.weight_init(key, (self.vocabulary, a.shape[-1]), a.dtype)}

    def check(self, a: Array, y: Tree) -> None:
        if getattr(a, "ndim", 0) < 2 or not jnp.issubdtype(a.dtype, jnp.floating):
            raise ModelError(f"takes outputs (…, features) of each example, got {described(a)}")
        logits: Any = abstract((*a.shape[:-1], self.vocabulary), a.dtype)
        ids_or_probabilities(logits, y)
        if getattr(y["y"] if isinstance(y, dict) else y, "ndim", 0) == a.ndim:
            raise ModelError(f"takes targets as ids, not probabilities, got {described(y)}")

    def check_parameters(self, params: Tree, a: Array) -> None:
        wanted = {"weight": (self.vocabulary, a.shape[-1])}
        if not isinstance(params, dict) or jax.tree.map(jnp.shape, params) != wanted:
            raise ModelError(
                f"takes a weight of {wanted['weight']}, got {described(params)}; are they another "
                "model's?"
            )

    def value(self, params: Tree, a: Array, y: Tree) -> Array:
        return self.of_logits.value(a @ params["weight"].T, y)

    def delta(self, params: Tree, a: Array, y: Tree) -> tuple[Array, Tree]:
        u = self.of_logits.delta(a @ params["weight"].T, y)
        return u @ params["weight"], {"weight": Outer(u, a)}

    def reference(self, params: Tree, ay: Tree, key: Array | None = None) -> Array:
        return jax.vmap(self.value, (None, 0, 0))(params, *ay)

    def forward(self, params: Tree, ay: Tree, key: Array | None = None) -> tuple[Array, Tree]:
        a, y = ay
        self.check(a, y)
        self.check_parameters(params, a)
        ids, shares = jax.vmap(_ids_and_shares)(a, y)
        h = a.reshape(len(a), -1, a.shape[-1])
        ids = ids.reshape(h.shape[:2])
        costs, kept = forward(params["weight"], h, ids, self.smoothing, self.z_loss)
        return _means(costs, shares), (kept, shares)

    def backward(
        self, params: Tree, residuals: Tree, weights: Array, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        kept, shares = residuals
        weight, d_costs = params["weight"], per_example(weights, shares).reshape(kept.ids.shape)
        options = self.smoothing, self.z_loss
        # Where the gradient alone is asked for, all is made anew in one sweep, C too (in the place
        # of ∂C/∂y), and the sweep of the way forward is dropped by the compiler.
        in_one_sweep = by_positions.fits(len(weights), self.vocabulary)
        if in_one_sweep and not asks_layers(contract) and contract["weight"].asks is total.asks:
            costs, dh, dW = by_positions.swept(weight, kept.h, kept.ids, d_costs, *options)
            return (_where_counted(dh, shares), _means(costs, shares)), {"weight": dW}
        dh, factor = backward(weight, kept, d_costs, *options)
        results = () if asks_layers(contract) else contract_factors(contract, {"weight": factor})
        return (_where_counted(dh, shares), None), results


def _means(costs: Array, shares: Array) -> Array:
    """C of each example, from the costs of its positions."""
    return jnp.where(shares > 0, shares * costs.reshape(shares.shape), 0).sum(range(1, shares.ndim))


def _where_counted(dh: Array, shares: Array) -> Array:
    """∂C/∂a, on the axes of a."""
    dh = dh.reshape(*shares.shape, dh.shape[-1])
    return jnp.where(shares[..., None] > 0, dh, 0)


# ---- on arrays: n examples, t positions, d features, k rows of W


class Kept(NamedTuple):
    """What is kept of the way forward.

    ``h`` is a, ``expected`` Σ_k p_tk W_k and ``wanted`` Σ_k q_tk W_k, ``(n, t, d)``; ``ids`` and
    ``log_sum``, λ, are ``(n, t)``.
    """

    h: Array
    ids: Array
    log_sum: Array
    expected: Array
    wanted: Array


def forward(
    weight: Array, h: Array, ids: Array, smoothing: float, z_loss: float
) -> tuple[Array, Kept]:
    """The cost of each position, ``(n, t)``, of h ``(n, t, d)``."""
    weight = jnp.asarray(weight)
    log_sum, expected = _expected(weight, h)
    wanted = (1 - smoothing) * weight.at[ids].get(mode="fill", wrap_negative_indices=False)
    if smoothing:
        wanted += smoothing * weight.mean(0, dtype=expected.dtype)
    costs = log_sum - einsum("ntd,ntd->nt", h, wanted) + z_loss * log_sum**2
    return costs, Kept(h, ids, log_sum, expected, wanted)


def backward(
    weight: Array, kept: Kept, d_costs: Array, smoothing: float, z_loss: float
) -> tuple[Array, SoftmaxOuter]:
    """∂C/∂h and the factors of ∂C/∂W, given ∂C/∂ the costs, ``(n, t)``."""
    scale = d_costs * (1 + 2 * z_loss * kept.log_sum)
    dh = scale[..., None] * kept.expected - d_costs[..., None] * kept.wanted
    factor = SoftmaxOuter(
        v=kept.h,
        h=kept.h,
        weight=jnp.asarray(weight),
        ids=kept.ids,
        log_sum=kept.log_sum,
        scale=scale,
        target=(1 - smoothing) * d_costs,
        rest=smoothing / len(weight) * d_costs,
    )
    return dh.astype(kept.h.dtype), factor


def _expected(weight: Array, h: Array) -> tuple[Array, Array]:
    """λ_t = log Σ_k e^{W_k · h_t} and Σ_k e^{W_k · h_t − λ_t} W_k, in one sweep over the rows of W:
    both sums are of what is so far the highest logit, and shrink when there is a higher one."""
    dtype = accumulator(h)

    def step(carried: Tree, first: Array | int, count: int) -> Tree:
        highest, all_, sums = carried
        rows = block_of(weight, first, count, 0)
        z = einsum("ntd,kd->ntk", h, rows)
        new = jnp.maximum(highest, z.max(-1))
        p, shrunk = jnp.exp(z - new[..., None]), jnp.exp(highest - new)
        more = einsum("ntk,kd->ntd", p.astype(rows.dtype), rows)
        return new, all_ * shrunk + p.sum(-1), sums * shrunk[..., None] + more

    shape = h.shape[:-1]
    none = jnp.full(shape, LOW, dtype), jnp.zeros(shape, dtype), jnp.zeros(h.shape, dtype)
    highest, all_, sums = over_blocks(step, none, len(weight), rows_at_once(math.prod(shape)))
    return highest + jnp.log(all_), sums / all_[..., None]
