"""Backpropagation through time: one combinator for every recurrent cell.

A *cell* says what happens in one step, and how δ comes back through it. ``through_time`` makes a
layer of it and is the one place that knows of lengths, direction, truncation, checkpoints and
states.

The recursion of a cell with state s_t, whose first part is its output h_t (Werbos 1990):

    p_t = W_x x_t + b                  all steps of a block of time at once
    s_t = step(s_{t−1}, p_t)           t = 1 … T
    δ_t, ∂C/∂s_{t−1}  from  ∂C/∂s_t,   ∂C/∂h_t = ∂C/∂y_t + (what came back through step t + 1)
    ∂C/∂x_t = W_xᵀ δ_t
    ∂C/∂W_x = Σ_t δ_t x_tᵀ,  ∂C/∂W_h = Σ_t δ_t h_{t−1}ᵀ,  ∂C/∂b = Σ_t δ_t       (BP3, BP4)

Only δ is carried from step to step. The weights' gradients are products over all the steps of a
block, made when the δ of the block are known; blocks keep what is alive small enough for the cache
and let totals be folded on the way back, so that nothing holds the δ of the whole sequence.

Axes: n examples, t time, d features of x, k rows of W_x, h hidden units. Batches are ``(n, t, …)``
outside. Inside a block time comes first, and a step has the examples as columns, ``(h, n)``: W h
is then what the derivation writes, for all examples at once, and the matrix product that reads
memory in order (on the CPU 1.1 to 1.7 times as fast as h Wᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .checks import ModelError, choice, described, flag, function, random_key, text, told, whole
from .combinators import broadcast
from .contractions import Contraction, Drop, Total, contract_factors, keep
from .factors import Factored, Itself, Outer, accumulator
from .layer import Layer, one_of, place

Tree = Any
State = dict[str, Array]

ROWS = 512
"""Examples × steps whose products are made together: enough for a matrix product to run at its
speed, few enough for a block to stay in the cache and to be small beside what all steps save."""


@dataclass(frozen=True)
class Cell:
    """One step of a recurrent layer, for examples as columns.

    A state's vector ``(h,)`` comes as ``(h, n)`` and p_t = W_x x_t + b, made beforehand, as
    ``(k, n)``. Parameters stay as they are: ``weight_h @ s["h"]`` is right as it stands, and a
    vector takes ``[:, None]``.

    Attributes:
      name: how errors call the layer.
      hidden: the number of units h.
      state: the names of the state's parts, each ``(h,)``; the first, ``h``, is the output.
      init: ``(key, features, dtype) -> params``, with ``weight_x (k, d)`` and ``bias (k,)``.
      forward: ``(params, s_{t−1}, p_t) -> (s_t, saved)``.
      local: ``saved -> local``, the derivatives within a step. They do not wait for δ: all steps of
        a block come at once, ``(t, h, n)``, on all cores, where one step would keep one busy.
      backward: ``(paramsᵀ, local_t, ∂C/∂s_t) -> (∂C/∂s_{t−1}, δ_t)``, every matrix transposed.
      factors: ``(δ, x, h_before) -> factors`` over any leading axes of examples and steps; the δ
        that meets x in ``weight_x`` is ∂C/∂p.
      options: what else the layer's name says of the cell, ``{"activation": "relu"}``.
    """

    name: str
    hidden: int
    state: tuple[str, ...]
    init: Callable[..., Tree]
    forward: Callable[..., tuple[State, Tree]]
    local: Callable[[Tree], Tree]
    backward: Callable[..., tuple[State, Tree]]
    factors: Callable[..., Tree]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text("cell: name", self.name)
        whole(f"{self.name}: hidden", self.hidden)
        for what in ("init", "forward", "local", "backward", "factors"):
            function(f"{self.name}: {what}", getattr(self, what))
        states = self.state if isinstance(self.state, tuple) else ()
        if not states or states[0] != "h":
            raise ModelError(
                f"{self.name}: state: takes a tuple of names, 'h' first, got {told(self.state)}"
            )


def product(W: Array, a: Array) -> Array:
    """W a for every column of a, summed in float32 at least."""
    sums = jnp.matmul(W, a, preferred_element_type=accumulator(W, a))
    return sums.astype(jnp.result_type(W, a))


@dataclass(frozen=True)
class _Blocks:
    """Time in blocks, in the order in which the recursion runs: backwards where ``reverse``.

    A block is called with ``start``, the number of steps before it in that order, and ``size``.
    What blocks return is stacked, with the last one apart where it is shorter.
    """

    steps: int
    size: int
    reverse: bool

    def read(self, sequence: Array, start: Array | int, size: int) -> Array:
        """``(n, t, …)`` to the block's ``(t, n, …)``."""
        start = self.steps - start - size if self.reverse else start
        block = lax.dynamic_slice_in_dim(sequence, start, size, axis=1)
        block = jnp.moveaxis(block, 1, 0)
        return jnp.flip(block, 0) if self.reverse else block

    def join(self, stacked: tuple[Tree, Tree]) -> Tree:
        """Every array of stacked blocks of ``(t, n, …)`` to ``(n, t, …)``."""

        def joined(blocks: Array, last: Array | None) -> Array:
            steps = blocks.reshape(-1, *blocks.shape[2:])
            steps = steps if last is None else jnp.concatenate([steps, last])
            return jnp.moveaxis(jnp.flip(steps, 0) if self.reverse else steps, 0, 1)

        blocks, last = stacked
        if last is None:
            return jax.tree.map(lambda b: joined(b, None), blocks)
        return jax.tree.map(joined, blocks, last)

    def forward(self, block: Callable[..., Any], carry: Tree) -> tuple[Tree, tuple[Tree, Tree]]:
        whole, rest = divmod(self.steps, self.size)
        carry, blocks = lax.scan(
            lambda carry, start: block(carry, start, self.size), carry, self._starts()
        )
        last = None
        if rest:
            carry, last = block(carry, whole * self.size, rest)
        return carry, (blocks, last)

    def backward(
        self, block: Callable[..., Any], carry: Tree, saved: tuple[Tree, Tree]
    ) -> tuple[Tree, Tree, tuple[Tree, Tree]]:
        """``block: (carry, start, size, saved) -> (carry, sums, stacked)``, last block first;
        ``sums`` are added over the blocks."""
        whole, rest = divmod(self.steps, self.size)
        blocks, last = saved
        if rest:
            carry, sums, last = block(carry, whole * self.size, rest, last)
        else:
            one = jax.tree.map(lambda leaf: leaf[0], blocks)
            shapes = jax.eval_shape(lambda: block(carry, 0, self.size, one)[1])
            sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def step(so_far: Tree, of_block: Tree) -> tuple[Tree, Tree]:
            carry, sums = so_far
            start, saved = of_block
            carry, more, stacked = block(carry, start, self.size, saved)
            return (carry, jax.tree.map(jnp.add, sums, more)), stacked

        of_blocks = (self._starts(), blocks)
        (carry, sums), blocks = lax.scan(step, (carry, sums), of_blocks, reverse=True)
        return carry, sums, (blocks, last)

    def _starts(self) -> Array:
        return jnp.arange(self.steps // self.size) * self.size


def through_time(
    cell: Cell,
    *,
    output: str = "sequence",
    reverse: bool = False,
    trained_state: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> Recurrent:
    """A recurrent layer from a cell.

    The input is one example's ``x``, ``(t, d)``, or a tree of

        x       (t, d)
        length  an integer from 0 to t: the steps from there on are padding. They change nothing,
                neither the state nor any gradient, and their outputs are 0. (Traced, it cannot
                be looked at: a longer one counts as t.)
        state   a tuple of initial states, one for each recurrent layer that the tree passes. This
                layer takes the first, a dict of ``(h,)``, and puts its final one at the end, so
                that a chain turns the initial states of its layers into their final states, in
                the same order. Give exactly one for each recurrent layer of the model: of more,
                those left over come first

    of which ``length`` and ``state`` may be left out. The output is an array for an array; for a
    tree it is the same tree with the outputs in place of ``x``. Without a state given, the
    recursion starts from zeros, or from ``params["state"]`` if it is trained.

    Args:
      output: ``"sequence"``, all outputs, ``(t, h)``; ``"last"``, the one after the last valid
        step, ``(h,)``, which for a length of 0 is the initial state's.
      reverse: the recursion runs from the last valid step to the first; every output stays at its
        step.
      trained_state: the initial state is a parameter, ``state``.
      truncate: no δ passes from one run of this many steps to the one before, as if a long
        stream were cut into such chunks and only the state carried across. (Williams & Peng 1990.)
      checkpoint: keep the state alone, once in so many steps, and recompute from there what the
        backward needs: memory for T/k states and k steps, which is √T for ``True``,
        k = √T. (Chen et al. 2016, "Training deep nets with sublinear memory cost".)

    Raises:
      ModelError: for an argument that is none of these; in use, for inputs, lengths, states or
        parameters that do not fit.
    """
    if not isinstance(cell, Cell):
        raise ModelError(f"through_time: cell: takes a bp.Cell, got {told(cell)}")
    choice(f"{cell.name}: output", output, ("sequence", "last"))
    flag(f"{cell.name}: reverse", reverse)
    flag(f"{cell.name}: trained_state", trained_state)
    if truncate is not None:
        whole(f"{cell.name}: truncate", truncate)
    if not isinstance(checkpoint, bool):
        whole(f"{cell.name}: checkpoint", checkpoint)
    over_batch = _ThroughTime(cell, output, reverse, trained_state, truncate, checkpoint)
    name = over_batch.name
    lifted = Layer(
        name=name,
        init=_placed(name, over_batch.init),
        forward=_placed(name, over_batch.forward),
        backward=_placed(name, over_batch.backward),
        reference=_placed(name, over_batch.reference),
        probe=_placed(name, over_batch.probe),
    )

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        y, residuals = lifted.forward(params, _batch_of_one(x))
        return _only_example(y), residuals

    def backward(
        params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        dx, factors = lifted.backward(params, residuals, _batch_of_one(dy))
        return _only_example(dx), contract_factors(contract, _only_example(factors))

    def reference(params: Tree, x: Tree, key: Array | None = None) -> Tree:
        return _only_example(over_batch.reference(params, _batch_of_one(x)))

    def mirrored() -> Recurrent:
        return through_time(
            cell,
            output=output,
            reverse=not reverse,
            trained_state=trained_state,
            truncate=truncate,
            checkpoint=checkpoint,
        )

    return Recurrent(
        name=name,
        init=lifted.init,
        forward=forward,
        backward=backward,
        reference=reference,
        lift=lambda: lifted,
        mirrored=mirrored,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Recurrent(Layer):
    """A recurrent layer; ``mirrored`` makes the same one running the other way."""

    mirrored: Callable[[], Layer] = field(kw_only=True)


@dataclass(frozen=True)
class _ThroughTime:
    """The recurrent layer of a cell, over a batch."""

    cell: Cell
    output: str
    reverse: bool
    trained_state: bool
    truncate: int | None
    checkpoint: bool | int

    @property
    def name(self) -> str:
        """With the options that are not the defaults: ``lstm(4, reverse=True)``."""
        options = {
            **self.cell.options,
            "output": self.output != "sequence" and self.output,
            "reverse": self.reverse,
            "trained_state": self.trained_state,
            "truncate": self.truncate,
            "checkpoint": self.checkpoint,
        }
        given = [f"{name}={value}" for name, value in options.items() if value]
        return f"{self.cell.name}({', '.join([str(self.cell.hidden), *given])})"

    def init(self, key: Array, x: Tree) -> Tree:
        random_key("key", key, or_none=False)
        x = as_tree(x)["x"]
        _check_sequence(x)
        params = self.cell.init(key, x.shape[-1], x.dtype)
        if self.trained_state:
            zeros = jnp.zeros(self.cell.hidden, x.dtype)
            params["state"] = dict.fromkeys(self.cell.state, zeros)
        return params

    def forward(self, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        inputs = self._checked(params, x)
        time = self._blocks(inputs)
        recompute = bool(self.checkpoint)

        def block(state: State, start: Array, size: int) -> tuple[State, Tree]:
            valid, _ = self._masks(inputs, start, size)
            xs = where(turned(valid), time.read(inputs["x"], start, size), 0)
            after, hs, saved = self._run(params, state, xs, valid)
            needed = self.output == "sequence" or not recompute
            return after, (hs if needed else None, state, None if recompute else saved)

        final, (blocks, last) = time.forward(block, self._initial_state(params, inputs))
        hs = time.join((blocks[0], last and last[0]))
        final = jax.tree.map(jnp.transpose, final)
        y = final["h"] if self.output == "last" else where(self._valid(inputs), hs, 0)
        residuals = inputs, None if recompute else hs, (blocks[1:], last and last[1:])
        return _output(x, y, final), residuals

    def _run(
        self, params: Tree, state: State, xs: Array, valid: Array | None
    ) -> tuple[State, Array, Tree]:
        """The steps of one block: the state after them, every h_t, ``(t, n, h)``, and what each
        step saved."""
        steps, examples, _ = xs.shape
        W, axis = params["weight_x"], 1
        p = jnp.einsum("kd,tnd->ktn", W, xs, preferred_element_type=accumulator(W, xs))
        p = p.astype(jnp.result_type(W, xs))
        if examples < 8:  # too few for a step to read them where they lie, in pieces
            p, axis = jnp.moveaxis(p, 1, 0), 0

        def step(state: State, at_t: Tree) -> tuple[State, tuple[Array, Tree]]:
            t, valid = at_t
            p_t = lax.dynamic_index_in_dim(p, t, axis, keepdims=False)
            new, saved = self.cell.forward(params, state, p_t + params["bias"][:, None])
            new = where(valid, new, state)
            return new, (new["h"], saved)

        state, (hs, saved) = lax.scan(step, state, (jnp.arange(steps), valid))
        return state, turned(hs), saved

    def backward(
        self, params: Tree, residuals: Tree, dy: Tree, contract: Tree = keep
    ) -> tuple[Tree, Tree]:
        inputs = residuals[0]
        contract = dict(broadcast(contract, params))
        of_state = contract.pop("state", None)
        asked = jax.tree.leaves(contract, is_leaf=_is_contraction)
        if all(isinstance(c, (Total, Drop)) for c in asked):
            dx, dstate, results, _ = self._run_back(params, residuals, dy, contract)
        else:
            dx, dstate, _, (delta, h_before, _) = self._run_back(params, residuals, dy)
            xs = where(self._valid(inputs), inputs["x"], 0)
            results = contract_factors(contract, self.cell.factors(delta, xs, h_before))
        if self.trained_state:
            if "state" in inputs:  # one was given, and the trained one took no part
                dstate = jax.tree.map(jnp.zeros_like, dstate)
            results["state"] = contract_factors(
                of_state, {part: Itself(delta) for part, delta in dstate.items()}
            )
        return dx, results

    def probe(self, params: Tree, residuals: Tree, dy: Tree) -> tuple[Tree, Array]:
        """∂C/∂x and ∂C/∂h_t through time, ``(n, t, h)``."""
        dx, _, _, (_, _, dh) = self._run_back(params, residuals, dy)
        return dx, dh

    def _run_back(
        self, params: Tree, residuals: Tree, dy: Tree, totals: Tree = None
    ) -> tuple[Tree, State, Tree, Tree]:
        """δ from the last step to the first.

        Returns ∂C/∂(input), ∂C/∂(initial state) and, with a tree of ``totals`` asked for, those,
        added block by block; without, δ_t, h_{t−1} and ∂C/∂h_t of all steps.
        """
        inputs, hs, saved = residuals
        time = self._blocks(inputs)
        dys, dstate = self._output_deltas(inputs, dy)
        transposed = jax.tree.map(jnp.transpose, params)

        def block(dstate: State, start: Array, size: int, saved: Tree) -> tuple[State, Tree, Tree]:
            before, saved = saved
            valid, through = self._masks(inputs, start, size)
            xs = where(turned(valid), time.read(inputs["x"], start, size), 0)
            if self.checkpoint:
                _, h, saved = self._run(params, before, xs, valid)
            else:
                h = time.read(hs, start, size)
            h_before = jnp.concatenate([before["h"].T[None], h[:-1]])
            dy = None if dys is None else where(valid, turned(time.read(dys, start, size)), 0)

            def step(dstate: State, at_t: Tree) -> tuple[State, Tree]:
                dy, local, valid, through = at_t
                if dy is not None:
                    dstate = {**dstate, "h": dstate["h"] + dy}
                back, delta = self.cell.backward(transposed, local, dstate)
                back, delta = where(through, back, 0), where(valid, delta, 0)
                return where(valid, back, dstate), (delta, None if totals else dstate["h"])

            of_steps = (dy, self.cell.local(saved), valid, through)
            dstate, (delta, dh) = lax.scan(step, dstate, of_steps, reverse=True)
            delta = turned(delta)
            factors = self.cell.factors(delta, xs, h_before)
            dx = product(factors["weight_x"].u, params["weight_x"])  # ∂C/∂x_t = W_xᵀ δ_t, as rows
            if not totals:
                return dstate, None, (dx, (delta, h_before, turned(dh)))
            of_steps = jax.tree.map(_total_of_steps, totals, factors, is_leaf=_is_contraction)
            return dstate, of_steps, (dx, None)

        dstate, sums, stacked = time.backward(block, dstate, saved)
        dstate = jax.tree.map(jnp.transpose, dstate)
        dx, taken = time.join(stacked)
        return self._input_deltas(inputs, dy, dx, dstate), dstate, sums, taken

    def reference(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """One scan over time, for autodiff."""
        inputs = self._checked(params, x)
        steps = inputs["x"].shape[1]
        time = _Blocks(steps, steps, self.reverse)

        def step(state: State, at_t: Tree) -> tuple[State, Array]:
            x_t, valid, through = at_t
            before = where(through, state, jax.tree.map(lax.stop_gradient, state))
            p = product(params["weight_x"], x_t.T) + params["bias"][:, None]
            new = where(valid, self.cell.forward(params, before, p)[0], state)
            return new, where(valid, new["h"], 0)

        of_steps = (time.read(inputs["x"], 0, steps), *self._masks(inputs, 0, steps))
        final, hs = lax.scan(step, self._initial_state(params, inputs), of_steps)
        final = jax.tree.map(jnp.transpose, final)
        y = final["h"] if self.output == "last" else time.join((turned(hs)[None], None))
        return _output(x, y, final)

    def _blocks(self, inputs: Tree) -> _Blocks:
        examples, steps = inputs["x"].shape[:2]
        if self.checkpoint is True:
            size = math.ceil(math.sqrt(steps))
        else:
            size = self.checkpoint or _block_size(examples, steps)
        return _Blocks(steps, min(steps, size), self.reverse)

    def _masks(self, inputs: Tree, start: Array | int, size: int) -> tuple[Tree, Tree]:
        """Where a block's steps are valid, and where δ passes to the step before them; both
        ``(t, 1, n or 1)``, or None for everywhere."""
        length, steps = inputs.get("length"), inputs["x"].shape[1]
        length = None if length is None else length[None, None, :]
        padding = 0 if length is None or not self.reverse else steps - length
        step = start + jnp.arange(size)[:, None, None] - padding  # as each example counts them
        valid = None if length is None else (step >= 0) & (step < length)
        through = None if self.truncate is None else (step <= 0) | (step % self.truncate != 0)
        return valid, through

    def _valid(self, inputs: Tree) -> Array | None:
        """Where the steps are valid, ``(n, t, 1)``, or None for everywhere."""
        if "length" not in inputs:
            return None
        return (jnp.arange(inputs["x"].shape[1])[None] < inputs["length"][:, None])[..., None]

    def _initial_state(self, params: Tree, inputs: Tree) -> State:
        """Every part ``(h, n)``, as the final state and ∂C/∂(final state) are."""
        if "state" in inputs:
            return jax.tree.map(jnp.transpose, inputs["state"][0])
        x = inputs["x"]
        shape, dtype = (self.cell.hidden, x.shape[0]), jnp.result_type(x, params["weight_x"])
        if self.trained_state:
            state = params["state"].items()
            return {part: jnp.broadcast_to(s[:, None], shape).astype(dtype) for part, s in state}
        return {part: jnp.zeros(shape, dtype) for part in self.cell.state}

    def _output_deltas(self, inputs: Tree, dy: Tree) -> tuple[Array | None, State]:
        """∂C/∂y_t from outside, and ∂C/∂(final state); a δ of None is 0."""
        dy = as_tree(dy)
        x, given = inputs["x"], dy.get("state")
        if given is not None:
            dstate = jax.tree.map(jnp.transpose, given[-1])
        else:
            zeros = jnp.zeros((self.cell.hidden, x.shape[0]), dy["x"].dtype)
            dstate = dict.fromkeys(self.cell.state, zeros)
        if self.output == "last":
            return None, {**dstate, "h": dstate["h"] + dy["x"].T}
        return dy["x"], dstate

    def _input_deltas(self, inputs: Tree, dy: Tree, dx: Array, dstate: State) -> Tree:
        """∂C/∂(input), as the input was given: an array, or a tree with None for the length."""
        if not isinstance(dy, dict):
            return dx
        deltas: Tree = {"x": dx} | ({"length": None} if "length" in inputs else {})
        if "state" in inputs:
            deltas["state"] = (dstate, *dy["state"][:-1])
        return deltas

    def _checked(self, params: Tree, x: Tree) -> Tree:
        inputs = as_tree(x)
        one = one_of(inputs)
        _check_sequence(one["x"])
        _check_params(self.cell, params, one["x"], self.trained_state)
        if "length" in inputs:
            _check_length(inputs["length"], one["x"].shape[0])
        if "state" in inputs:
            _check_state(self.cell, one["state"])
        return inputs


def _block_size(examples: int, steps: int) -> int:
    """The steps of a block: all of them if they are few, else 8 to 40 with about ``ROWS`` rows;
    if possible all blocks are of one size."""
    if examples * steps <= ROWS:
        return steps
    least = min(20, max(8, ROWS // examples))
    return next((size for size in range(least, 2 * least) if steps % size == 0), least)


def _output(x: Tree, y: Array, final: State) -> Tree:
    """The output as the input was given, an array or a tree; the final state goes to the end."""
    if not isinstance(x, dict):
        return y
    tree = {**x, "x": y}
    if "state" in x:
        tree["state"] = (*x["state"][1:], final)
    return tree


def as_tree(x: Tree) -> Tree:
    """The input of a recurrent layer as a tree: ``x`` and, if given, ``length`` and ``state``."""
    tree = x if isinstance(x, dict) else {"x": x}
    if "x" not in tree or set(tree) - {"x", "length", "state"} or not hasattr(tree["x"], "ndim"):
        raise ModelError(
            f"takes an array (time, features), or a dict of x, length and state, got {described(x)}"
        )
    return tree


def where(mask: Array | None, yes: Tree, no: Tree) -> Tree:
    """``yes`` where the mask is True, else ``no``, a tree of the same shape or a number; without
    a mask, ``yes``."""
    if mask is None:
        return yes
    if not isinstance(no, dict):
        no = jax.tree.map(lambda _: no, yes)
    return jax.tree.map(lambda y, n: jnp.where(mask, y, n), yes, no)


def turned(steps: Tree) -> Tree:
    """Every step's rows to columns, and back."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 2), steps)


def _batch_of_one(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _only_example(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _is_contraction(node: Any) -> bool:
    return isinstance(node, Contraction)


def _total_of_steps(contract: Contraction, factor: Factored) -> Array | None:
    """The total of ``(t, n, …)``: to a sum over all of them, steps are as good as examples.

    Said on two axes: on one, examples that are split among devices would have to be gathered.
    """
    if isinstance(contract, Drop):
        return None
    if isinstance(factor, Outer):
        u, v = factor.u, factor.v
        return jnp.einsum("tno,tni->oi", u, v, preferred_element_type=accumulator(u, v))
    return jax.vmap(lambda f: f.total())(factor).sum(0)


def _placed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def placed(*args: Any) -> Any:
        with place(f"{name}:"):
            return function(*args)

    return placed


def _check_sequence(x: Array) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[0] == 0:
        raise ModelError(
            "takes examples of shape (time, features), with at least one step, as floating-point "
            f"numbers, got {described(x)}"
        )


def _check_params(cell: Cell, params: Tree, x: Array, trained_state: bool) -> None:
    wanted = jax.eval_shape(lambda: cell.init(jax.random.key(0), x.shape[-1], x.dtype))
    if trained_state:
        state = jax.ShapeDtypeStruct((cell.hidden,), x.dtype)  # type: ignore[no-untyped-call]
        wanted["state"] = dict.fromkeys(cell.state, state)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
        raise ModelError(
            f"takes, for examples {described(x)}, parameters {described(wanted)}, got "
            f"{described(params)}; are they another model's?"
        )


def _check_length(length: Array, steps: int) -> None:
    """``length`` is a batch's, ``(n,)``; its values are looked at if they are not traced."""
    if not jnp.issubdtype(length.dtype, jnp.integer) or length.ndim != 1:
        raise ModelError(f"length: takes one integer for each example, got {described(length)}")
    if not isinstance(length, jax.core.Tracer):
        given = np.asarray(length)
        if given.size and (given.min() < 0 or given.max() > steps):
            raise ModelError(
                f"length: takes 0 to the {steps} steps of x, got {given.min()} to {given.max()}"
            )


def _check_state(cell: Cell, states: Tree) -> None:
    wanted = {part: (cell.hidden,) for part in cell.state}
    first = states[0] if isinstance(states, (tuple, list)) and states else states
    if first is states or jax.tree.map(jnp.shape, first) != wanted:
        raise ModelError(
            "state: takes a tuple with one initial state for each recurrent layer, the first of "
            f"them {wanted} here, got {described(states)}"
        )
