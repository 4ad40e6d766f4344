"""A model read while it is traced: what each layer's values are called, and its equations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
from jax import Array

from ..checks import described
from ..freezing import plain_path
from ..layer import Layer, batch_of, one_of
from ..losses.definition import Loss
from ..traced.explain import Row, explain
from ..traced.function import Residuals
from .notation import PARAMETERS, Equation, by, latex, numbered, written

Tree = Any
STACK_INDEX = "lmk"  # of a stack, of a stack in it, and so on


@dataclass(frozen=True)
class LayerEquations:
    """The equations of one layer of a model, or of its loss.

    Attributes:
      place: the indices of its results, ``[2][0]``; empty for the whole model, ``loss`` for a loss.
      layer: the layer; None for a loss.
      name: what it is called.
      x, y: what its input and its output are called.
      x_shape, y_shape: their shapes, of one example.
      parameters: what each parameter is called, by its path, with its shape.
      forward, backward: its equations.
      notes: what else is to be said, a line each.
      parts: the layers that it is made of.
      times, index: of a stack, how many layers lie one after another, and what counts them.
    """

    layer: Layer | None
    place: str
    name: str
    x: str
    y: str
    x_shape: str
    y_shape: str
    parameters: dict[tuple[Any, ...], tuple[str, str]]
    forward: tuple[Equation, ...]
    backward: tuple[Equation, ...]
    notes: tuple[str, ...] = ()
    parts: tuple[LayerEquations, ...] = ()
    times: int = 1
    index: str = ""

    def walk(self, *, backward: bool = False) -> Iterator[LayerEquations]:
        """The layer and its parts, from the first to the last, or back.

        What joins its parts comes after them, and a stack, which says how often, before."""
        if self.times > 1:
            yield self
        for part in self.parts[::-1] if backward else self.parts:
            yield from part.walk(backward=backward)
        if self.times == 1:
            yield self


def read(model: Layer, loss: Loss, x: Tree, params: Tree) -> tuple[LayerEquations, LayerEquations]:
    """A model's equations and its loss's, from one example and parameters, or their shapes."""
    reading = _Reading()
    watched = model.on_layers(reading.watched)
    jax.eval_shape(watched.forward, params, batch_of(2, x), jax.random.key(0))
    of_model = reading.tree(model)
    return of_model, _of_loss(loss, of_model, str(reading.count + 1))


@dataclass
class _Reading:
    """A model's values as they are met while it is traced, each called by a name.

    Values are told apart by identity: what a layer hands on as it is keeps its name.
    """

    count: int = 0
    letters: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    names: dict[int, tuple[Any, str]] = field(default_factory=dict)
    read: dict[str, LayerEquations] = field(default_factory=dict)

    def watched(self, layer: Layer, where: str) -> Layer:
        """The layer, which reads its equations when it is traced."""

        def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
            self._name(x, numbered("x", self.letters[-1:]))
            if layer.unrolled is not None:
                self.letters += self._index()
            y, residuals = layer.forward(params, x, key)
            if layer.unrolled is not None:
                self.letters = self.letters[:-1]
            label = self._label(layer, where, params)
            made = any(id(leaf) not in self.names for leaf in jax.tree.leaves(y))
            if made:
                self._name(y, self._output(layer, where, label))
            known = self._known(layer, where, params, x, y)
            if layer.parts:
                known |= self._joined(layer, known, label, made=made)
            elif made:
                known["parameters"], notes = self._parameters(params, label)
                positions = max(leaf.ndim for leaf in jax.tree.leaves((x, y))) > 2
                known |= _ruled(layer, known, label, positions=positions)
                if isinstance(residuals, Residuals):
                    notes += map(_met, explain(layer, params, x).rows)
                known["notes"] = (*notes, *known.get("notes", ()))
            self.read[where] = LayerEquations(**known)
            return y, residuals

        return dataclasses.replace(layer, forward=forward)

    def _index(self) -> str:
        """What counts the layers of a stack that begins here."""
        return STACK_INDEX[len(self.letters) % len(STACK_INDEX)]

    def _label(self, layer: Layer, where: str, params: Tree) -> str:
        """The number of the layer. (A scan may trace it twice, which counts once.)"""
        if where not in self.labels:
            self.count += not layer.parts and bool(jax.tree.leaves(params))
            self.labels[where] = ",".join([str(self.count), *self.letters])
        return self.labels[where]

    def _output(self, layer: Layer, where: str, label: str) -> str:
        if where not in self.outputs:
            stated: Any = layer.equations
            name = numbered("y" if stated is None or layer.parts else stated.y, label)
            while name in self.outputs.values():
                name += "′"
            self.outputs[where] = name
        return self.outputs[where]

    def _name(self, tree: Tree, name: str) -> None:
        """Calls what has no name yet; the x of a dict has that of the whole."""
        for path, leaf in jax.tree.leaves_with_path(tree):
            part = jax.tree_util.keystr(path, simple=True, separator=".")
            below = "" if part in ("", "x") else f"_{part}"
            self.names.setdefault(id(leaf), (leaf, name + below))

    def called(self, tree: Tree) -> str:
        """What a value is called."""
        if isinstance(tree, dict) and "x" in tree:
            tree = tree["x"]
        names = [self.names[id(leaf)][1] for leaf in jax.tree.leaves(tree)]
        return names[0] if len(names) == 1 else f"({', '.join(names)})"

    def _known(self, layer: Layer, where: str, params: Tree, x: Tree, y: Tree) -> dict[str, Any]:
        """What is known of a layer besides its equations."""
        kind = layer.name.partition("(")[0] if layer.parts else layer.name
        times = 1
        if layer.unrolled is not None:
            times = max((leaf.shape[0] for leaf in jax.tree.leaves(params)), default=1)
        return {
            "layer": layer,
            "place": where,
            "name": kind,
            "x": self.called(x),
            "y": self.called(y),
            "x_shape": _shape(one_of(x)),
            "y_shape": _shape(one_of(y)),
            "parameters": {},
            "forward": (),
            "backward": (),
            "times": times,
        }

    def _joined(
        self, layer: Layer, known: dict[str, Any], label: str, *, made: bool
    ) -> dict[str, Any]:
        """The equations of a combinator that makes a value of its parts', or splits its input."""
        of_parts = [self.read[f"{known['place']}[{i}]"].x for i in range(len(layer.parts))]
        if not made and of_parts.count(known["x"]) < 2:
            return {}
        if layer.unrolled is not None:
            last = self.read[f"{known['place']}[0]"].y
            index = self._index()
            return {
                "index": index,
                "forward": (
                    _equation(numbered("x", "1"), known["x"]),
                    _equation(numbered("x", f"{index}+1"), last),
                    _equation(known["y"], numbered("x", str(known["times"] + 1))),
                ),
            }
        if layer.equations is None:
            return {}
        more = self._of_parts(known["place"], known["y"])
        found = _written(layer.equations, known, label, positions=True, more=more)
        return found if made else {"backward": found["backward"]}

    def _of_parts(self, where: str, y: str) -> dict[str, str]:
        """What a combinator's equations call what its parts give and send back."""
        symbols: dict[str, str] = {}
        for i, (word, arrow) in enumerate((("layer", "→h"), ("shortcut", "←h"))):
            if (part := self.read.get(f"{where}[{i}]")) is None:
                break
            symbols |= {f"{word}(x)": part.y, arrow: part.y}
            first = next(place for place in self.read if place.startswith(part.place))
            symbols[f"through {word}"] = f"through {first}"
            if part.x == part.y:  # handed on
                symbols[f"∂C/∂x through {word}"] = f"∂C/∂{y}"
        return symbols

    def _parameters(
        self, params: Tree, label: str
    ) -> tuple[dict[tuple[Any, ...], tuple[str, str]], list[str]]:
        """What a layer's parameters are called, with their shapes, and which are another's too."""
        called, notes = {}, []
        for path, leaf in jax.tree.leaves_with_path(params):
            keys = plain_path(path)
            if id(leaf) in self.names:
                name = self.names[id(leaf)][1]
                notes.append(
                    f"{name} is that of another layer: ∂C/∂{name} is the sum over its uses"
                )
            else:
                name = numbered(_symbol(keys), label)
                self.names[id(leaf)] = leaf, name
            called[keys] = name, str(tuple(leaf.shape))
        return called, notes

    def _takes(self, of: LayerEquations) -> bool:
        """Whether a layer does something with its input; what hands it on does so beside others,
        in a combinator that joins them."""
        if of.x != of.y:
            return not of.layer.parts  # type: ignore[union-attr]
        around = self.read.get(of.place.rpartition("[")[0])
        return around is not None and around.x == of.x != around.y and bool(around.forward)

    def tree(self, layer: Layer, where: str = "") -> LayerEquations:
        """What was read of a layer, with its parts."""
        parts = tuple(self.tree(part, f"{where}[{i}]") for i, part in enumerate(layer.parts))
        read = dataclasses.replace(self.read[where], parts=parts)
        if layer.parts:
            return read
        tag = ("BP1" if read.y == self.read[""].y else "BP2") if layer.elementwise else ""
        tag = tag if by(read.x).startswith("δ") else ""
        used = [of.x for of in self.read.values() if self._takes(of)]
        shared = by(read.x) if used.count(read.x) > 1 else None
        backward = tuple(_one_of_uses(e, shared, where, tag) for e in read.backward)
        return dataclasses.replace(read, backward=backward)


def _ruled(
    layer: Layer, known: dict[str, Any], label: str, *, positions: bool
) -> dict[str, tuple[Any, ...]]:
    """The equations of a layer that is no combination of others; else its name."""
    if layer.equations is not None:
        return _written(layer.equations, known, label, positions=positions)
    given = "; ".join([known["x"], *(name for name, _ in known["parameters"].values())])
    said = _equation(known["y"], f"{layer.name}({given})")
    return {"forward": (said,), "notes": ("its rule declares no equations",)}


def _written(
    stated: Any,
    known: dict[str, Any],
    label: str,
    *,
    positions: bool,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, tuple[Equation, ...]]:
    """The equations as a rule states them, with the names of this layer's values, and ``more``."""
    symbols = {stated.y: known["y"], **more}
    symbols |= {_symbol(keys): name for keys, (name, _) in known["parameters"].items()}
    first: tuple[Equation, ...] = ()
    if known["x"].startswith("("):
        first = (_equation(f"({stated.x}_1, {stated.x}_2, …)", known["x"]),)
    else:
        symbols[stated.x] = known["x"]
    if known["parameters"]:
        own = stated.y == "z" or re.search(r"δ(_t|\^\w)?( =|,| by)", stated.backward)
        symbols["δ"] = numbered("δ", label) if own else f"∂C/∂{known['y']}"
    if "z_t =" in stated.forward:  # of a recurrent layer, whose gates have a z of their own
        symbols["z_t"] = f"{numbered('z', label)}_t"
    forward = written(stated.forward, symbols, positions=positions)
    backward = written(stated.backward, symbols, positions=positions)
    if stated.latex is not None:
        forward, backward = map(_in_latex, (forward, backward), stated.latex)
    return {"forward": (*first, *forward), "backward": tuple(backward)}


def _in_latex(equations: list[Equation], text: str) -> list[Equation]:
    """Equations with LaTeX of the rule's own, a line for each."""
    lines = text.splitlines()
    return [e._replace(latex=line) for e, line in zip(equations, lines)] + equations[len(lines) :]


def _of_loss(loss: Loss, model: LayerEquations, label: str) -> LayerEquations:
    known: dict[str, Any] = {
        "layer": None,
        "place": "loss",
        "name": loss.name,
        "x": model.y,
        "y": "C",
    }
    known |= {"x_shape": model.y_shape, "y_shape": "()", "parameters": {}}
    stated: Any = loss.equations
    if stated is None:
        known["forward"] = (_equation("C", f"{loss.name}({model.y}, y)"),)
        return LayerEquations(**known, backward=(), notes=("it declares no equations",))
    if model.y_shape.count(",") < 2 and model.y_shape.endswith(",)"):  # no positions to mean over
        alone = [text.replace("mean over positions of ", "") for text in stated[:2]]
        forward, backward = (re.sub(r"\((.*)\) / positions", r"\1", text) for text in alone)
        stated = stated._replace(forward=forward, backward=backward)
    known |= _written(stated, known, label, positions=True)
    known["backward"] = tuple(
        e._replace(tag="BP1" if e.left.startswith("δ") else "")
        for e in known["backward"]
        if not e.left.startswith("∇")
    )
    return LayerEquations(**known)


def _met(row: Row) -> str:
    """How a traced parameter meets an example."""
    return f"{row.parameter} {row.shape}: {', '.join(row.meets)}; kept as {row.kept}"


def _equation(left: str, right: str) -> Equation:
    return Equation(left, right, "", latex(f"{left} = {right}"))


def _one_of_uses(e: Equation, shared: str | None, where: str, tag: str) -> Equation:
    """The equation with its tag; a value that several layers take has one term from each."""
    if shared is None or e.left.removesuffix("_t") != shared:
        return e._replace(tag=e.tag or tag)
    return _equation(f"{e.left} through {where}", e.right)._replace(tag=e.tag or tag)


def _symbol(keys: tuple[Any, ...]) -> str:
    """What equations call a parameter, by its path."""
    keys = keys[1:] if len(keys) > 1 and keys[0] == "params" else keys  # as Flax has them
    path = ".".join(map(str, keys))
    return PARAMETERS.get(path) or PARAMETERS.get(keys[-1] if keys else "", path or "θ")


def _shape(x: Tree) -> str:
    """The shape of an array; of a sequence with its length, the sequence's."""
    x = x["x"] if isinstance(x, dict) and "x" in x else x
    return str(tuple(x.shape)) if hasattr(x, "shape") else described(x)
