"""A model's own equations, forward and back, from those that its rules declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from ..checks import ModelError, arrays_of, told
from ..layer import Layer, shapes_of
from ..losses.definition import Loss
from ..recursion import paired
from .notation import Equation, latex
from .reading import LayerEquations, read

Tree = Any


@dataclass(frozen=True)
class ModelEquations:
    """A model's equations: ``str`` is text, ``latex`` LaTeX; a notebook shows the latter.

    Attributes:
      model: the layer's equations, with those of its parts.
      loss: the loss's.
    """

    model: LayerEquations
    loss: LayerEquations

    @property
    def forward(self) -> tuple[LayerEquations, ...]:
        """Layers that have equations, from the first to the loss."""
        return tuple(filter(_says, (*self.model.walk(), self.loss)))

    @property
    def backward(self) -> tuple[LayerEquations, ...]:
        """Layers that have equations, from the loss to the first."""
        return tuple(filter(_says, (self.loss, *self.model.walk(backward=True))))

    def __str__(self) -> str:
        lines = ["δ^l = ∂C/∂z^l"]
        for title, layers in self._sides():
            lines += ["", title]
            for of, equations in layers:
                lines += [f"  {_headed(of, title)}"]
                lines += [f"      {e}  ({e.tag})" if e.tag else f"      {e}" for e in equations]
                lines += [f"      {note}" for note in of.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def _sides(self) -> tuple[tuple[str, list[tuple[LayerEquations, tuple[Equation, ...]]]], ...]:
        forward = [(of, of.forward) for of in self.forward]
        return ("Forward", forward), ("Backward", [(of, of.backward) for of in self.backward])

    @property
    def latex(self) -> str:
        """All equations as one LaTeX ``aligned`` block, to be put into mathematics."""
        lines = [r"\delta^l &= \partial C/\partial z^l"]
        for _, layers in self._sides():
            for of, equations in layers:
                head = _headed(of, title="").replace("_", r"\_").replace("…", "...")
                lines.append(rf"&\text{{{head}}}")
                lines += [_tagged(e).replace(" = ", " &= ", 1) for e in equations]
        return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"

    def _repr_markdown_(self) -> str:
        lines = [r"$\delta^l = \partial C/\partial z^l$"]
        for title, layers in self._sides():
            lines.append(f"**{title}**")
            for of, equations in layers:
                lines.append(f"`{_headed(of, title)}`")
                lines += [f"$$ {_tagged(e)} $$" for e in equations]
                lines += of.notes
        return "\n\n".join(lines)


def equations(model: Layer, loss: Loss, x: Tree, *, params: Tree = None) -> ModelEquations:
    """A model's own forward and backward equations, layer by layer, with its shapes.

    They are those that its rules declare, ``layer.equations``, the same that ``help`` shows, with
    each symbol numbered: l counts the layers that have parameters, as in the derivation, and
    δ^l = ∂C/∂z^l. The indices in brackets are those of parameters and results. A rule that declares
    none is there with its name and shapes. Nothing is computed: shapes alone are traced.

    Args:
      model, loss: a layer and a loss.
      x: one example's input, or its ``ShapeDtypeStruct``.
      params: the parameters, or their shapes, for a model that does not make its own.

    Returns:
      A ``ModelEquations``: ``print`` it, or take its ``latex``.

    Raises:
      ModelError: with the layer's place, where the example does not fit the model.

    Example:
      >>> model = bp.chain(bp.dense(3), bp.sigmoid)
      >>> print(bp.equations(model, bp.losses.squared_error, jnp.ones(2)))
      δ^l = ∂C/∂z^l
      <BLANKLINE>
      Forward
        [0] dense(3): (2,) to (3,), b¹ (3,), W¹ (3, 2)
            z¹ = W¹ x + b¹
        [1] sigmoid: (3,) to (3,)
            a¹ = 1 / (1 + e^{−z¹})
        loss squared_error
            C = ½ Σ_j (a¹_j − y_j)²
      <BLANKLINE>
      Backward
        loss squared_error
            ∂C/∂a¹ = a¹ − y
        [1] sigmoid
            δ¹ = ∂C/∂a¹ ⊙ a¹ ⊙ (1 − a¹)  (BP1)
        [0] dense(3)
            ∂C/∂x = (W¹)ᵀ δ¹  (BP2, before ⊙ σ′)
            ∂C/∂b¹ = δ¹  (BP3)
            ∂C/∂W¹ = δ¹ xᵀ  (BP4)
    """
    if not isinstance(model, Layer):
        raise ModelError(
            f"equations: takes a layer and a loss, got {told(model)}; what bp.explain tells of a "
            "function is how its parameters meet an example"
        )
    model, loss = paired(model, loss)
    x = shapes_of(x)
    if params is not None:
        arrays_of("equations: params", params)
    if params is None:
        params = jax.eval_shape(model.init, jax.random.key(0), x)
    return ModelEquations(*read(model, loss, x, params))


def _says(layer: LayerEquations) -> bool:
    return bool(layer.forward or layer.backward or layer.notes)


def _tagged(equation: Equation) -> str:
    return equation.latex + (rf"\quad ({latex(equation.tag)})" if equation.tag else "")


def _headed(of: LayerEquations, title: str) -> str:
    """A layer's place and name, and on the way forward its shapes."""
    name = f"{of.place} {of.name}".strip()
    if of.times > 1:
        way = f"1 … {of.times}" if title == "Forward" else f"{of.times} … 1"
        return f"{name}: {of.times} layers, {of.index} = {way}"
    if title != "Forward" or of.place == "loss":
        return name
    parameters = [f"{name} {shape}" for name, shape in of.parameters.values()]
    return ", ".join([f"{name}: {of.x_shape} to {of.y_shape}", *parameters])
