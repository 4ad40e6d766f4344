"""What a traced function's gradients are made of, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..checks import ModelError, abstract, arrays_of, function, told
from ..factors.along import Along
from ..factors.arranged import Arranged, Part
from ..factors.combined import Stacked, Sum
from ..factors.convolved import Convolved
from ..factors.factored import Factored, Outer
from ..factors.rows import Rows
from ..factors.softmax_outer import SoftmaxOuter
from ..layer import Layer, batch_size, place
from ..tables import columns
from .function import Residuals, from_cost, from_function, over_batch, taps_of
from .parameters import factors_of
from .plan import Meeting, Plan, Step
from .routes import InNamed

Tree = Any


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      parameter: its path, as ``['params']['kernel']``.
      shape: its shape.
      meets: the operations in which it meets an example.
      sources: where in the user's code, ``file:line`` for each.
      kept: what each example's gradient is kept as.
      share: the multiplications that its per-example norms take, as a share of those of a plain
        step (three times those of all products that parameters are in).
      unknown: what is not known to keep factors, and where.
    """

    parameter: str
    shape: tuple[int, ...]
    meets: tuple[str, ...]
    sources: tuple[str, ...]
    kept: str
    share: float
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A row for each parameter; ``str`` is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "meets an example in", "kept as", "norms ÷ step", "where")
        table = [head, *(line for row in self.rows for line in _lines(row))]
        unknown = [f"{row.parameter}: {what}" for row in self.rows for what in row.unknown]
        more = ["", "multiplied out:", *unknown] if unknown else []
        return "\n".join([columns(table), *more])

    __repr__ = __str__


def explain(
    model: Layer | Callable[..., Tree], params: Tree, x: Tree, y: Tree = None
) -> Explanation:
    """How each parameter meets an example, what its gradients are kept as, and what that costs.

    What to read where a quantity is slower than hoped. Nothing is computed: shapes alone are
    traced.

    Args:
      model: a layer of ``bp.from_function`` and its like, or the function ``apply(params, x)``
        that such a layer is made of, or a cost ``(params, x, y) -> C``.
      params: the parameters, or their shapes and dtypes.
      x, y: a batch, y for a cost alone. The examples are on the first axis.

    Raises:
      ModelError: for another kind of layer, and as the layer does.

    Example:
      >>> cost = lambda params, x, y: ((params["w"] @ x + params["b"] - y) ** 2).sum()
      >>> params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
      >>> found = bp.explain(cost, params, jnp.ones((4, 3)), jnp.ones((4, 2)))
      >>> [(row.parameter, row.meets, row.kept) for row in found.rows]
      [("['b']", ('add',), 'itself'), ("['w']", ('matrix product',), 'δ aᵀ')]
    """
    arrays_of("explain: params", params)
    layer, x = _layer_of(model, x, y)
    with place("explain: x:"):
        n = batch_size(x)
    residuals = jax.eval_shape(lambda params, x: layer.forward(params, x)[1], params, x)
    if not isinstance(residuals, Residuals):
        raise ModelError(f"explain: takes a layer of bp.from_function or a function, got {layer}")
    plan = residuals.plan
    meetings = plan.body.meetings
    leaves, multiplied_out = jax.tree.leaves(params), list[Step]()

    def factors(leaves: list[Any], x: Tree) -> list[Factored]:
        taps = taps_of(plan, n)  # which are of the shapes of δ
        read = over_batch(plan, leaves, x, None, taps)[1]
        return factors_of(plan, leaves, read, taps, n, multiplied_out)

    found = jax.eval_shape(factors, leaves, x)
    step = 3 * sum(_of_meeting(meeting) for meeting in meetings)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    rows = []
    for i, (path, leaf, factor) in enumerate(zip(paths, leaves, found, strict=True)):
        theirs, unknown = _met_by(plan, i, multiplied_out)
        rows.append(
            Row(
                parameter=path,
                shape=tuple(leaf.shape),
                meets=tuple(meeting.operation for meeting in theirs) or ("nothing",),
                sources=tuple(str(meeting.source) for meeting in theirs),
                kept=_kept(factor) if theirs else "zero",
                share=_of_norms(factor) / step if theirs and step else 0.0,
                unknown=unknown,
            )
        )
    return Explanation(tuple(rows))


def _layer_of(model: Any, x: Tree, y: Tree) -> tuple[Layer, Tree]:
    if not isinstance(model, Layer):
        function("explain: model", model)
        return (from_function(model), x) if y is None else (from_cost(model), (x, y))
    if y is not None:
        raise ModelError(f"explain: takes y for a cost, got the layer {model} and {told(y)}")
    return model, x


def _met_by(
    plan: Plan, leaf: int, multiplied_out: list[Step]
) -> tuple[list[Meeting], tuple[str, ...]]:
    """A parameter's meetings, and the steps to them that multiply its gradients out."""
    reached, unknown = {leaf}, []
    for step in plan.steps:
        if reached & set(step.inputs):
            reached |= {made for made in step.outputs if plan.learned[made]}
            if step in multiplied_out:
                unknown.append(f"{step.equation.primitive.name}, {step.source}")
    theirs = [meeting for meeting in plan.body.meetings if meeting.static.place in reached]
    unknown += [f"{m.operation}, {m.source}" for m in theirs if m.is_unknown]
    return theirs, tuple(dict.fromkeys(unknown))


def _lines(row: Row) -> list[tuple[str, ...]]:
    first = (row.parameter, str(row.shape), row.meets[0], row.kept, f"{row.share:.2f}")
    wheres = row.sources or ("",)
    more = zip(row.meets[1:], wheres[1:])
    return [(*first, wheres[0]), *(("", "", meets, "", "", where) for meets, where in more)]


def _kept(factor: Factored) -> str:
    """What an example's gradient is kept as, in the derivation's letters."""
    if isinstance(factor, Sum):
        kinds = list(dict.fromkeys(map(_kept, factor.parts)))
        return f"a sum of {len(factor.parts)}: {', '.join(kinds)}"
    if isinstance(factor, (Arranged, Part)):
        return _kept(factor.factor)
    if isinstance(factor, Stacked):
        return f"a stack of {factor.count}: {_kept(_of_a_layer(factor))}"
    if isinstance(factor, Outer):
        positions = math.prod(factor.u.shape[1:-1])
        return "δ aᵀ" if positions == 1 else f"Σ δ aᵀ over {positions:,}"
    if isinstance(factor, SoftmaxOuter):
        return f"Σ δ aᵀ over {math.prod(factor.ids.shape[1:]):,}, δ made anew"
    if isinstance(factor, Rows):
        return f"{math.prod(factor.ids.shape[1:]):,} rows of {factor.rows:,}"
    if isinstance(factor, Along):
        return "a number, along one direction"
    return "δ and patches" if isinstance(factor, Convolved) else "itself"


def _of_a_layer(stack: Stacked) -> Factored:
    return jax.tree.map(lambda leaf: abstract(leaf.shape[1:], leaf.dtype), stack.layers)


def _of_norms(factor: Factored) -> float:
    """Multiplications of the norms of one example's gradient."""
    if isinstance(factor, Sum):
        return len(factor.parts) * sum(map(_of_norms, factor.parts))
    if isinstance(factor, (Arranged, Part)):
        return _of_norms(factor.factor)
    if isinstance(factor, Stacked):
        return factor.count * _of_norms(_of_a_layer(factor))
    if isinstance(factor, Outer):
        t, o, i = math.prod(factor.u.shape[1:-1]), factor.u.shape[-1], factor.v.shape[-1]
        return min(t * t * (o + i), t * o * i) if t > 1 else o + i
    if isinstance(factor, SoftmaxOuter):
        t, o, i = math.prod(factor.ids.shape[1:]), len(factor.weight), factor.v.shape[-1]
        return t * o * factor.h.shape[-1] + min(t * t * (o + i), t * o * i)
    if isinstance(factor, Rows):
        return math.prod(factor.ids.shape[1:]) * math.prod(factor.v.shape[1:])
    if isinstance(factor, Convolved):
        kernel, outputs = math.prod(factor.convolution.kernel), factor.convolution.outputs
        positions = math.prod(factor.delta.shape[1:]) // outputs
        return min(positions**2 * (outputs + kernel // outputs), positions * kernel)
    if isinstance(factor, Along):
        return math.prod(factor.direction.shape)
    return math.prod(jax.tree.leaves(factor)[0].shape[1:])


def _of_products(factor: Factored) -> int:
    """Multiplications of the matrix product that one example's factors are of."""
    if isinstance(factor, Outer):
        return math.prod(factor.u.shape[1:]) * factor.v.shape[-1]
    if isinstance(factor, SoftmaxOuter):
        return math.prod(factor.h.shape[1:]) * len(factor.weight)
    return math.prod(jax.tree.leaves(factor)[0].shape[1:])


def _of_meeting(meeting: Meeting) -> float:
    """Multiplications of one example's forward pass through a meeting."""
    turns = math.prod(meeting.loops)
    if isinstance(meeting.route, InNamed):
        return turns * _of_products(meeting.route.like)
    outputs = math.prod(meeting.tap.shape)
    return turns * outputs * (meeting.route.summed if meeting.route is not None else 1)
