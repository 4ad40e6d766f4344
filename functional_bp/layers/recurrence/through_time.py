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

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...checks import ModelError, choice, flag, random_key, told, whole
from ...contractions import (
    Contraction,
    asks_layers,
    broadcast,
    contract_factors,
    contract_layer,
    drop,
    is_contraction,
    keep,
)
from ...docstrings import explained
from ...factors.factored import Factored, Itself, Outer, accumulator
from ...layer import Layer, placed
from . import sequences
from .cell import Cell, State, product
from .sequences import as_tree, turned, valid_steps, where
from .time_blocks import Blocks

Tree = Any
Output = Literal["sequence", "last"]


@explained(
    forward="""
        p_t = W_x x_t + b                  all steps of a block of time at once
        s_t = step(s_{t−1}, p_t)           t = 1 … T""",
    backward="""
        δ_t, ∂C/∂s_{t−1}  from  ∂C/∂s_t,   ∂C/∂h_t = ∂C/∂y_t + (what came back through step t + 1)
        ∂C/∂x_t = W_xᵀ δ_t
        ∂C/∂W_x = Σ_t δ_t x_tᵀ,  ∂C/∂b = Σ_t δ_t       (BP3, BP4)
        the other parameters by the cell's factors""",
    y="s",
)
def through_time(
    cell: Cell,
    *,
    output: Output = "sequence",
    reverse: bool = False,
    trained_state: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> Layer:
    """A recurrent layer from a cell.

    The input is one example's ``x``, ``(t, d)``, or a tree of

        x       (t, d)
        length  an integer from 0 to t: the steps from there on are padding. They change nothing,
                neither the state nor any gradient, and their outputs are 0. (Traced, it cannot
                be looked at: a longer one counts as t.)
        state   a tuple of initial states, one for each recurrent layer that the tree passes. This
                layer takes the first, a dict of ``(h,)``, and puts its final one at the end, so
                that a chain turns the initial states of its layers into their final states, in
                the same order. Give exactly one for each recurrent layer of the model

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
        backward needs. Memory is T/k states and k steps; ``True`` chooses k = √T. (Chen et al.
        2016, "Training deep nets with sublinear memory cost".)

    Raises:
      ModelError: for an argument that is none of these; in use, for inputs, lengths, states or
        parameters that do not fit.

    Example:
      See ``bp.Cell``; ``bp.lstm`` and its like are made so:

      >>> layer = bp.lstm(4, reverse=True, output="last")
      >>> params = layer.init(jax.random.key(0), jnp.ones((10, 3)))
      >>> layer.apply(params, jnp.ones((2, 10, 3))).shape
      (2, 4)
    """
    if not isinstance(cell, Cell):
        raise ModelError(f"through_time: cell: takes a bp.Cell, got {told(cell)}")
    choice(f"{cell.name}: output", output, Output)
    flag(f"{cell.name}: reverse", reverse)
    flag(f"{cell.name}: trained_state", trained_state)
    if truncate is not None:
        whole(f"{cell.name}: truncate", truncate)
    if not isinstance(checkpoint, bool):
        whole(f"{cell.name}: checkpoint", checkpoint)
    of_cell = _ThroughTime(cell, output, reverse, trained_state, truncate, checkpoint)
    return of_cell.layer()


@dataclass(frozen=True)
class _ThroughTime:
    """The recurrent layer of a cell."""

    cell: Cell
    output: Output
    reverse: bool
    trained_state: bool
    truncate: int | None
    checkpoint: bool | int

    def layer(self) -> Layer:
        return placed(
            f"{self.name}:",
            Layer(
                self.name,
                self.init,
                self.forward,
                self.backward,
                reference=self.reference,
                mirrored=lambda: dataclasses.replace(self, reverse=not self.reverse).layer(),
            ),
        )

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
        sequences.check_sequence(x)
        params = self.cell.init(key, x.shape[-1], x.dtype)
        if self.trained_state:
            zeros = jnp.zeros(self.cell.hidden, x.dtype)
            params["state"] = dict.fromkeys(self.cell.state, zeros)
        return params

    def forward(self, params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        inputs = self._checked(params, x)
        time = self._blocks(inputs["x"])
        recompute = bool(self.checkpoint)

        def block(state: State, start: Array, size: int) -> tuple[State, Tree]:
            valid, _ = self._masks(inputs, start, size)
            xs = where(turned(valid), time.read(inputs["x"], start, size), 0)
            after, hs, saved = self._run(params, state, xs, valid)
            needed = self.output == "sequence" or not recompute
            return after, (hs if needed else None, state, None if recompute else saved)

        final, (blocks, last) = time.forward(
            block, sequences.initial_state(self.cell, params, inputs)
        )
        hs = time.join((blocks[0], last and last[0]))
        final = jax.tree.map(jnp.transpose, final)
        y = final["h"] if self.output == "last" else where(valid_steps(inputs), hs, 0)
        residuals = inputs, None if recompute else hs, (blocks[1:], last and last[1:])
        return sequences.output_of(x, y, final), residuals

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
        if asks_layers(contract):
            dx, _, _, (_, _, dh) = self._run_back(params, residuals, dy)
            return dx, contract_layer(contract, dh, ())
        contract = dict(broadcast(contract, params))
        of_state = contract.pop("state", None)
        asked = jax.tree.leaves(contract, is_leaf=is_contraction)
        if all(c.adds_examples for c in asked):
            dx, dstate, results, _ = self._run_back(params, residuals, dy, contract)
        else:
            dx, dstate, _, (delta, h_before, _) = self._run_back(params, residuals, dy)
            xs = where(valid_steps(inputs), inputs["x"], 0)
            results = contract_factors(contract, self.cell.factors(delta, xs, h_before))
        if self.trained_state:
            if "state" in inputs:  # one was given, and the trained one took no part
                dstate = jax.tree.map(jnp.zeros_like, dstate)
            results["state"] = contract_factors(
                of_state, {part: Itself(delta) for part, delta in dstate.items()}
            )
        return dx, results

    def _run_back(
        self, params: Tree, residuals: Tree, dy: Tree, totals: Tree = None
    ) -> tuple[Tree, State, Tree, Tree]:
        """δ from the last step to the first.

        Returns ∂C/∂(input), ∂C/∂(initial state) and, with a tree of ``totals`` asked for, those,
        added block by block; without, δ_t, h_{t−1} and ∂C/∂h_t of all steps.
        """
        inputs, hs, saved = residuals
        time = self._blocks(inputs["x"])
        last = self.output == "last"
        dys, dstate = sequences.output_deltas(self.cell, inputs, dy, last=last)
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
                after, back, delta = self._step_back(transposed, dstate, at_t)
                return back, (delta, None if totals else after["h"])

            of_steps = (dy, self.cell.local(saved), valid, through)
            dstate, (delta, dh) = lax.scan(step, dstate, of_steps, reverse=True)
            delta = turned(delta)
            factors = self.cell.factors(delta, xs, h_before)
            dx = product(factors["weight_x"].u, params["weight_x"])  # ∂C/∂x_t = W_xᵀ δ_t, as rows
            if not totals:
                return dstate, None, (dx, (delta, h_before, turned(dh)))
            of_block = jax.tree.map(_total_of_steps, totals, factors, is_leaf=is_contraction)
            return dstate, of_block, (dx, None)

        dstate, sums, stacked = time.backward(block, dstate, saved)
        dstate = jax.tree.map(jnp.transpose, dstate)
        dx, taken = time.join(stacked)
        return sequences.input_deltas(inputs, dy, dx, dstate), dstate, sums, taken

    def _step_back(self, transposed: Tree, dstate: State, at_t: Tree) -> tuple[State, State, Array]:
        """∂C/∂s_t with what comes from outside, ∂C/∂s_{t−1}, and δ_t."""
        dy, local, valid, through = at_t
        if dy is not None:
            dstate = {**dstate, "h": dstate["h"] + dy}
        back, delta = self.cell.backward(transposed, local, dstate)
        back, delta = where(through, back, 0), where(valid, delta, 0)
        return dstate, where(valid, back, dstate), delta

    def reference(self, params: Tree, x: Tree, key: Array | None = None) -> Tree:
        """One scan over time, for autodiff."""
        inputs = self._checked(params, x)
        steps = inputs["x"].shape[1]
        time = Blocks(steps, steps, self.reverse)

        def step(state: State, at_t: Tree) -> tuple[State, Array]:
            x_t, valid, through = at_t
            before = where(through, state, jax.tree.map(lax.stop_gradient, state))
            p = product(params["weight_x"], x_t.T) + params["bias"][:, None]
            new = where(valid, self.cell.forward(params, before, p)[0], state)
            return new, where(valid, new["h"], 0)

        of_steps = (time.read(inputs["x"], 0, steps), *self._masks(inputs, 0, steps))
        final, hs = lax.scan(step, sequences.initial_state(self.cell, params, inputs), of_steps)
        final = jax.tree.map(jnp.transpose, final)
        y = final["h"] if self.output == "last" else time.join((turned(hs)[None], None))
        return sequences.output_of(x, y, final)

    def _blocks(self, x: Array) -> Blocks:
        return Blocks.of(x, self.checkpoint, reverse=self.reverse)

    def _masks(self, inputs: Tree, start: Array | int, size: int) -> tuple[Tree, Tree]:
        return sequences.masks(inputs, start, size, reverse=self.reverse, truncate=self.truncate)

    def _checked(self, params: Tree, x: Tree) -> Tree:
        inputs = as_tree(x)
        sequences.check_inputs(self.cell, params, inputs, trained_state=self.trained_state)
        return inputs


def _total_of_steps(contract: Contraction, factor: Factored) -> Array | None:
    """The total of ``(t, n, …)``: to a sum over all of them, steps are as good as examples.

    Said on two axes: on one, examples that are split among devices would have to be gathered.
    """
    if contract.asks is drop.asks:
        return None
    if isinstance(factor, Outer):
        u, v = factor.u, factor.v
        return jnp.einsum("tno,tni->oi", u, v, preferred_element_type=accumulator(u, v))
    return jax.vmap(lambda f: f.total())(factor).sum(0)
