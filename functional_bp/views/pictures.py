"""Pictures of what a pass or a run computed; each function gives a matplotlib ``Figure``.

They need matplotlib, the extra ``plot``. ``figure.savefig(path)`` writes a figure; a notebook shows
it. A picture of one panel can be drawn into ``axes`` that you made. Inspect a whole batch
(``example=None``) where you can: norms are then means over its examples.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..checks import ModelError, function, number, told
from ..docstrings import shown
from ..training.history import History, Run
from .inspection import Inspection

__all__ = ["activations", "delta_norms", "deltas", "history", "norms", "through_time"]
__dir__ = shown(globals())

Figure = Any  # matplotlib's, which is not imported until something is drawn
Axes = Any
Several = Inspection | Mapping[str, Inspection]


def deltas(found: Inspection) -> Figure:
    """The errors δ of every layer as heatmaps: red raises the cost, blue lowers it.

    One example's δ^l is a column of units; through time, units by steps (of gates: i, f, g, o of
    an lstm, one below the other). A batch's is units by examples; through time, the mean over
    them, units by steps. Each panel has its own scale, which its title says.

    Raises:
      ModelError: unless it is a ``bp.Inspection`` of a model that has δ.

    Example:
      >>> figure = bp.pictures.deltas(found)  # doctest: +SKIP
    """
    panels = _deltas(found)
    figure, axes = _panels(len(panels), size=(2.2, 3.6))
    for panel, (name, delta) in zip(axes, panels.items()):
        over_time = delta.ndim > (1 if found.batch is None else 2)
        shown = delta.mean(0) if over_time and found.batch else delta
        image = np.atleast_2d(shown.reshape(-1, shown.shape[-1])).T
        most = float(np.abs(image).max()) or 1.0
        extent = (0.5, image.shape[1] + 0.5, image.shape[0] - 0.5, -0.5) if over_time else None
        panel.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", extent=extent)
        panel.set_title(f"{name}, up to {most:.2g}", fontsize="medium")
        panel.yaxis.get_major_locator().set_params(integer=True)
        across = "step t" if over_time else "example" if found.batch else ""
        panel.set(xlabel=across, ylabel="unit")
        if not across:
            panel.set_xticks([])
    figure.suptitle("δ = ∂C/∂z. Red: a greater z raises the cost. Blue: it lowers it.")
    return figure


def delta_norms(found: Several, *, axes: Axes = None) -> Figure:
    """How large the errors of each layer are: ‖δ^l‖ over l, on a logarithmic scale.

    Args:
      found: an inspection, or several by name, to compare them.

    Raises:
      ModelError: unless they are inspections of models that have δ.

    Example:
      >>> figure = bp.pictures.delta_norms({"before": first, "after": last})  # doctest: +SKIP
    """
    figure, (panel,) = _panels(1, size=(6, 4), axes=axes)
    for name, one in _several(found).items():
        norms = {layer[1:]: _norm(delta, one) for layer, delta in _deltas(one).items()}
        panel.semilogy(list(norms), list(norms.values()), marker="o", label=name)
    panel.set(xlabel="layer l, from the input on", ylabel="‖δ$^l$‖ = ‖∂C/∂z$^l$‖")
    panel.set_title("How much error each layer is sent back")
    return _finished(figure, panel)


def through_time(found: Several, *, axes: Axes = None) -> Figure:
    """How much of the final error reaches step t: ‖∂C/∂h_t‖ of each recurrent layer.

    Args:
      found: an inspection, or several by name, to compare them.

    Raises:
      ModelError: unless they are inspections of models that have recurrent layers.

    Example:
      >>> figure = bp.pictures.through_time({"lstm": of_lstm, "rnn": of_rnn})  # doctest: +SKIP
    """
    figure, (panel,) = _panels(1, size=(6, 4), axes=axes)
    for name, one in _several(found).items():
        recurrent = [layer for layer in one.layers if layer.over_time is not None]
        if not recurrent:
            raise ModelError("through_time: takes a model with a recurrent layer, got none in it")
        for layer in recurrent:
            norms = np.linalg.norm(layer.d_output, axis=-1)
            norms = norms if one.batch is None else norms.mean(0)
            which = f"{name} {layer.name}".strip() if len(recurrent) > 1 or not name else name
            panel.semilogy(np.arange(1, len(norms) + 1), norms, linewidth=2, label=which)
    panel.set(xlabel="step t", ylabel="‖∂C/∂h$_t$‖")
    panel.set_title("How much of the final error reaches step t")
    return _finished(figure, panel, whole_x=True)


def activations(found: Inspection) -> Figure:
    """What every activation gives: a histogram each, with its dead units.

    A unit is dead where it gives 0 for every example of the batch: no error passes it. One example
    tells which are 0 for it.

    Raises:
      ModelError: unless it is a ``bp.Inspection`` of a model that has activations.

    Example:
      >>> figure = bp.pictures.activations(found)  # doctest: +SKIP
    """
    layers = [layer for layer in _inspection(found).layers if layer.sigma_prime is not None]
    if not layers:
        raise ModelError("activations: takes a model with an activation, got none in it")
    figure, axes = _panels(len(layers), size=(3, 3))
    for panel, layer in zip(axes, layers):
        panel.hist(np.ravel(layer.output), bins=40)
        units = np.reshape(layer.output, (-1, np.shape(layer.output)[-1]))
        dead = int((units == 0).all(0).sum())
        said = "dead" if found.batch else "are 0"
        panel.set_title(f"{layer.name}: {dead} of {units.shape[1]} units {said}", fontsize="medium")
        panel.set(xlabel=layer.equations.y, ylabel="how often")
    return figure


def history(history: History | Run, *, rate: Any = None) -> Figure:
    """What a run recorded: its costs, its metrics, and the learning rate.

    Args:
      history: ``run.history``, or the run.
      rate: the optimiser's schedule, ``step -> rate``, where it is to be drawn.

    Raises:
      ModelError: unless it is a ``bp.History``.

    Example:
      >>> figure = bp.pictures.history(run.history)  # doctest: +SKIP
    """
    history = history.history if isinstance(history, Run) else history
    if not isinstance(history, History):
        raise ModelError(f"history: takes a bp.History, got {told(history)}")
    function("history: rate", rate, or_none=True)
    metrics = {name: v for name, v in history.evaluation.items() if name != "loss"}
    figure, axes = _panels(1 + len(metrics) + (rate is not None), size=(5, 4))
    cost, *others = axes
    steps = np.arange(1, len(history.loss) + 1)
    cost.plot(steps, history.loss, color="0.82", linewidth=0.8, label="each step's batch")
    if len(history.epoch_loss) > 1:
        ends = np.flatnonzero(np.diff(history.epoch, append=-1)) + 1
        cost.plot(ends, history.epoch_loss, label="training, mean of an epoch")
    if "loss" in history.evaluation:
        cost.plot(history.evaluated, history.evaluation["loss"], label="evaluation")
    if (history.loss > 0).all():
        cost.set_yscale("log")
    cost.set(title="Cost", xlabel="step")
    for panel, (name, values) in zip(others, metrics.items()):
        panel.plot(history.evaluated, values, marker=".", color="C1")
        panel.set(title=f"{name}: {values[-1]:.4g} at the end", xlabel="step")
    if rate is not None:
        others[-1].plot(steps, [float(rate(step - 1)) for step in steps], color="C2")
        others[-1].set(title="Learning rate", xlabel="step")
    for panel in axes:
        _finished(figure, panel)
    return figure


def norms(norms: Sequence[float], *, max_norm: float | None = None, axes: Axes = None) -> Figure:
    """How large the gradients of single examples are.

    Args:
      norms: ``(n,)``, of ``bp.per_example_grad_norms``.
      max_norm: what they are clipped to, drawn with the share of examples above.

    Raises:
      ModelError: unless they are numbers on one axis.

    Example:
      >>> figure = bp.pictures.norms(norms, max_norm=1.0)  # doctest: +SKIP
    """
    values = np.asarray([] if isinstance(norms, Mapping) else norms)
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not values.size:
        raise ModelError(f"norms: takes one number per example, (n,), got {told(norms)}")
    if max_norm is not None:
        number("norms: max_norm", max_norm, above=0)
    figure, (panel,) = _panels(1, size=(6, 4), axes=axes)
    least, most = values[values > 0].min(initial=np.inf), values.max()
    wide = most > 100 * max(least, most / 1e12) and (values > 0).all()
    panel.hist(values, bins=np.geomspace(least, most, 41) if wide else 40)
    panel.set_xscale("log" if wide else "linear")
    panel.set(xlabel="‖∂Cₙ/∂θ‖", ylabel="examples", title="Gradient norms of single examples")
    if max_norm is not None:
        above = float((values > max_norm).mean())
        panel.axvline(max_norm, color="C3", label=f"clipped at {max_norm:g}: {above:.0%} are above")
    return _finished(figure, panel)


def _panels(count: int, *, size: tuple[float, float], axes: Axes = None) -> tuple[Figure, Any]:
    """A figure of panels side by side, or the one that ``axes`` lies in."""
    if axes is not None:
        if not hasattr(axes, "figure"):
            raise ModelError(f"axes: takes matplotlib's Axes, got {told(axes)}")
        return axes.figure, (axes,)
    figure = _shown_figure()(figsize=(size[0] * count, size[1]), layout="constrained")
    return figure, np.ravel(figure.subplots(1, count))


@functools.cache
def _shown_figure() -> Any:
    """matplotlib's ``Figure``, which notebooks also show where nobody has set up pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures: takes matplotlib: pip install 'functional_bp[plot]'"
        ) from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    Shown.__name__ = "Figure"
    return Shown


def _finished(figure: Figure, panel: Axes, *, whole_x: bool = False) -> Figure:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    if any(panel.get_legend_handles_labels()[1]):
        panel.legend(frameon=False)
    if whole_x:
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _inspection(found: Any) -> Inspection:
    if not isinstance(found, Inspection):
        raise ModelError(f"pictures: takes a bp.Inspection, got {told(found)}")
    return found


def _several(found: Several) -> dict[str, Inspection]:
    if isinstance(found, Mapping):
        return {str(name): _inspection(one) for name, one in found.items()}
    return {"": _inspection(found)}


def _deltas(found: Inspection) -> dict[str, np.ndarray]:
    """Every δ by name, from the first layer to the last."""
    values = {name: v for name, v in _inspection(found).values.items() if name.startswith("δ")}
    if not values:
        raise ModelError("pictures: takes a model that has δ, as dense and recurrent layers do")
    return values


def _norm(delta: np.ndarray, found: Inspection) -> float:
    """‖δ‖ of the example, or its mean over those of a batch."""
    rows = delta.reshape(found.batch or 1, -1)
    return float(np.linalg.norm(rows, axis=1).mean())
