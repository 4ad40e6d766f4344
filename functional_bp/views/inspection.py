"""What one pass through a model computed, layer by layer, with the equations beside the numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import ModelError, whole
from ..tables import fitted, numbers, rich_table
from .notation import RAISED, by
from .reading import LayerEquations

Tree = Any
MOST_ROWS = 60  # of a table, beyond which what has parts is folded


@dataclass(frozen=True, eq=False, repr=False)
class Inspected:
    """What a pass computed at one layer; ``found[2]`` of a ``bp.Inspection``, or a part of it.

    Arrays are of one example, or have the examples first where a whole batch was inspected;
    gradients have the shapes of their parameters.

    Attributes:
      equations: the layer's own, with its place and what its values are called.
      input, output: what it took and gave.
      d_input, d_output: ∂C/∂(its input) and ∂C/∂(its output). A recurrent layer's ``d_output`` is
        ∂C/∂h_t through time, what later steps sent back included.
      gradient: ∂C/∂θ of each of its parameters, by name. Of a tied one, the part of this use.
      sigma_prime: σ′(z), of an activation; else None.
      over_time: of a recurrent layer, the δ_t of its pre-activations, and their z_t where the
        equations have one; else None.
      parts: what it is made of, where it is a combination of layers.
      sides: what each value is equal to, as the equations say it.
      batch: the number of examples, where a whole batch was inspected; else None.
    """

    equations: LayerEquations
    input: Tree
    output: Tree
    d_input: Tree
    d_output: Tree
    gradient: dict[str, Any]
    sigma_prime: Any
    over_time: dict[str, Any] | None
    parts: tuple[Inspected, ...]
    sides: Mapping[str, str]
    batch: int | None

    def __getitem__(self, index: int | tuple[int, ...]) -> Inspected:
        return _at(self.parts, index)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Inspected]:
        return iter(self.parts)

    @property
    def name(self) -> str:
        """Its place and name: ``[2] dense(1)``."""
        return f"{self.equations.place} {self.equations.name}".strip()

    @property
    def z(self) -> Any:
        """The pre-activation: what a layer such as dense gives, and what an activation takes; of an
        rnn or lstm z_t."""
        if self.over_time is not None and "z" in self.over_time:
            return self.over_time["z"]
        return self._of("z", self.output, self.input)

    @property
    def a(self) -> Any:
        """The activation a = σ(z): what an activation gives."""
        return self._of("a", self.output, None)

    @property
    def delta(self) -> Any:
        """δ = ∂C/∂z, never ∂C/∂a: of a dense layer its output's, of an activation its input's; of a
        recurrent layer δ_t."""
        if self.over_time is not None:
            return self.over_time["δ"]
        return self._of("z", self.d_output, self.d_input)

    def _of(self, symbol: str, of_output: Any, of_input: Any) -> Any:
        stated = self._stated
        if stated is not None and stated.y == symbol:
            return of_output
        if stated is not None and stated.x == symbol and of_input is not None:
            return of_input
        raise AttributeError(
            f"{self.name} has no {symbol} of its own: what it takes is called "
            f"{self.equations.x}, what it gives {self.equations.y}; see input, output, d_input "
            "and d_output"
        )

    @property
    def _stated(self) -> Any:
        layer = self.equations.layer
        return None if layer is None or layer.parts else layer.equations

    @property
    def values(self) -> dict[str, np.ndarray]:
        """All of it by name, as the equations call it: ``z¹``, ``σ′(z¹)``, ``δ¹``, ``∂C/∂W¹``."""
        here = self.equations
        of: dict[str, Any] = {here.y: self.output}
        if self.sigma_prime is not None:
            of[f"σ′({here.x})"] = self.sigma_prime
        steps = self.over_time or {}
        of[by(here.y) + ("_t" if steps else "")] = self.d_output
        of |= {f"{symbol}{here.y[1:]}_t": value for symbol, value in steps.items()}
        return _arrays(of) | self.gradients

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """∂C/∂θ of its parameters, as the equations call them."""
        named = {".".join(map(str, k)): name for k, (name, _) in self.equations.parameters.items()}
        return _arrays({by(named[name]): g for name, g in self.gradient.items()})

    def walk(self) -> Iterator[Inspected]:
        """The layers that made a value, from the first to the last, those of parts included."""
        for part in self.parts:
            yield from part.walk()
        handed_on = self.equations.x == self.equations.y
        if self.equations.forward if self.parts else not handed_on:
            yield self

    def step(self, t: int) -> dict[str, np.ndarray]:
        """What a layer over time computed at step t, from 0, by name.

        Raises:
          ModelError: where there is no such step.
        """
        axis = 0 if self.batch is None else 1
        values = {name: v for name, v in self.values.items() if name not in self.gradients}
        of_steps = {name: v for name, v in values.items() if v.ndim > axis + 1}
        count = max((v.shape[axis] for v in of_steps.values()), default=0)
        if whole("step: t", t, 0) >= count:
            raise ModelError(f"step: t: {self.name} takes a step below {count}, got {t}")
        return {name: v.take(t, axis) for name, v in of_steps.items()}

    def __str__(self) -> str:
        return fitted(*_table(self))

    __repr__ = __str__

    def __rich__(self) -> Any:
        return rich_table(*_table(self))


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What one pass computed: ``found[2]`` is the chain's third layer, ``found["δ²"]`` an array.

    ``str`` is a table that fits the terminal; where it is long, layers with parts are folded, and
    ``print(found[2])`` unfolds one. A notebook shows the arrays themselves.

    Attributes:
      cost: C of the example, or the mean of the batch.
      outputs: the model's outputs.
      gradient: ∂C/∂θ, the tree of the parameters.
      model: what was computed at the model's layers.
      loss: the loss's equations.
      batch: the number of examples, where a whole batch was inspected; else None.
    """

    cost: Any
    outputs: Tree
    gradient: Tree
    model: Inspected
    loss: LayerEquations
    batch: int | None

    def __getitem__(self, index: int | tuple[int, ...] | str) -> Any:
        """A layer, by its place in the model, ``[2]`` or ``[2, 0]``; or an array, by what the
        equations call it, ``["δ²"]`` or ``["δ2"]``."""
        if not isinstance(index, str):
            return _at(self._parts, index)
        values = self.values
        for name in (index, index.translate(RAISED)):
            if name in values:
                return values[name]
        raise KeyError(f"{index}: has {', '.join(values)}")

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Inspected]:
        return iter(self._parts)

    @property
    def _parts(self) -> tuple[Inspected, ...]:
        """The model's layers, with the indices of its parameters and results."""
        model = self.model
        while model.equations.name in ("tied", "at"):  # which have those of their layer
            model = model.parts[0]
        return model.parts or (model,)

    @property
    def layers(self) -> tuple[Inspected, ...]:
        """The layers that made a value, from the first to the last, those of parts included."""
        return tuple(self.model.walk())

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every array by its name, ∂C/∂ the model's input among them."""
        x = self.model.equations.x
        ends = _arrays({x: self.model.input, f"∂C/∂{x}": self.model.d_input})
        return ends | {name: v for layer in self.layers for name, v in layer.values.items()}

    def __str__(self) -> str:
        of = "one example" if self.batch is None else f"{self.batch} examples, means over them"
        return f"C = {numbers(self.cost)}: {self.loss.name}, {of}\n{self.model}"

    __repr__ = __str__

    def __rich__(self) -> Any:
        return self.model.__rich__()

    def _repr_html_(self) -> str | None:
        try:
            import treescope
        except ImportError:
            return None  # the notebook shows the table
        with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
            folded = _folded(self.model)
            return treescope.render_to_html({f"C = {numbers(self.cost)}": folded})


def sides_of(model: LayerEquations, loss: LayerEquations) -> dict[str, str]:
    """What each value is equal to. Of what several layers send back, the one that joins them says
    it last; what comes back through time is added."""
    sides: dict[str, str] = {}
    for of in (loss, *model.walk(backward=True)):
        for e in (*of.forward, *of.backward):
            bare = re.sub(r"_[tj]$", "", e.left)
            right = e.right
            if e.sign == "←":
                above = (sides.get(e.left) or sides.get(bare, "")).partition("  (")[0]
                at_end = f"({above} at t = T)"  # of a layer that gives the last step alone
                right = right.replace(e.left, above if e.left in sides else at_end, 1)
            side = f"{right}  ({e.tag})" if e.tag else right
            sides |= {name: side for name in (e.left, bare)}
    return sides


def _at(parts: tuple[Inspected, ...], index: int | tuple[int, ...]) -> Inspected:
    """A part, or a part of a part."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if not -len(parts) <= first < len(parts):
        raise IndexError(f"takes a layer's place, 0 to {len(parts) - 1}, got {first}")
    return parts[first][tuple(rest)] if rest else parts[first]


def _table(of: Inspected) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Equations, shapes, norms, share of zeros, and numbers; of a batch the means over its
    examples. Where that is long, what has parts is one of its rows."""
    rows = _rows(list(of.walk()))
    if len(rows) > MOST_ROWS and of.parts:
        rows = _rows(list(of.parts))
    norm = "‖·‖" if of.batch is None else "mean ‖·‖"
    return ("", "shape", norm, "zeros", "numbers"), rows


def _rows(layers: Sequence[Inspected]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        rows.append((layer.name, "", "", "", ""))
        for name, value in layer.values.items():
            gradient = name in layer.gradients
            examples = value[None] if layer.batch is None or gradient else value
            norm = np.linalg.norm(examples.reshape(len(examples), -1), axis=1).mean()
            cells = (str(value.shape), numbers(norm), f"{np.mean(value == 0):.0%}")
            over_time = layer.over_time is not None and not gradient
            rows.append((_said(layer, name), *cells, _few(examples, over_time=over_time)))
    return rows


def _said(layer: Inspected, name: str) -> str:
    """A value's name and what it is equal to; a batch's gradient is a mean over n."""
    side = layer.sides.get(name)
    mean = "mean over n of " if layer.batch is not None and name in layer.gradients else ""
    return f"  {name} = {mean}{side}" if side else f"  {name}"


def _few(examples: np.ndarray, *, over_time: bool) -> str:
    """The first numbers of a vector; over time, the norms of the first and the last step."""
    if over_time and examples.ndim == 3:
        norms = np.linalg.norm(examples, axis=2).mean(0)
        return f"‖·‖ by t: {numbers(norms[0])} … {numbers(norms[-1])}"
    mean = examples.mean(0)
    if mean.size > 3 and mean.ndim != 1:
        return ""
    return numbers(mean.ravel()[:3]) + (" …" if mean.size > 3 else "")


def _folded(layer: Inspected) -> dict[str, Any]:
    """A nested dict of a layer's arrays, each under its name and equation."""
    own = {
        _said(layer, name).strip(): value
        for name, value in layer.values.items()
        if not layer.parts or layer.equations.forward
    }
    return {**{part.name: _folded(part) for part in layer.parts}, **own}


def _arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Those that are arrays of numbers; of a sequence with its length, the sequence."""
    values = {k: v["x"] if isinstance(v, dict) and "x" in v else v for k, v in values.items()}
    return {k: np.asarray(v) for k, v in values.items() if hasattr(v, "dtype")}
