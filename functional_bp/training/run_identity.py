"""What a training run is: what must be the same to go on with it, and what may be another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..checks import described
from ..layer import Layer, one_of
from ..losses.definition import Loss
from .parameter_files import named
from .program import contents_of

Tree = Any

_MOST = 24  # differences that are listed


@dataclass(frozen=True)
class Identity:
    """A run in texts.

    Attributes:
      run: what must be the same to go on with the run.
      settings: what may be another. Then it is not the run that never stopped, and that is said.
      fingerprints: of what texts cannot tell apart; ``_FINGERPRINTS`` says what each is.
    """

    run: dict[str, str]
    settings: dict[str, str]
    fingerprints: dict[str, str]

    def refused(self, saved: Identity) -> str:
        """What forbids to go on with a saved run, a line each."""
        lines = [*_different(saved.run, self.run)] or [*self._told(saved, forbidden=True)]
        more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
        return "\n".join(lines[:_MOST] + more)

    def changed(self, saved: Identity) -> str:
        """What is another than in the saved run, and may be, a line each."""
        lines = [*_different(saved.settings, self.settings), *self._told(saved, forbidden=False)]
        return "\n".join(lines)

    def _told(self, saved: Identity, *, forbidden: bool) -> Iterator[str]:
        for name, (refused, needs, says) in _FINGERPRINTS.items():
            ours, theirs = self.fingerprints.get(name), saved.fingerprints.get(name)
            known = None not in (ours, theirs)
            alike = all(
                saved.settings.get(need, "none") == self.settings.get(need, "none")
                for need in needs
            )
            if refused == forbidden and known and alike and ours != theirs:
                yield f"  {says}"


_FINGERPRINTS = {
    # Each with whether it forbids, the settings under which it can be compared, and what is said
    # where it is another.
    "gradient": (
        True,
        ("software", "method", "example", "compute_dtype"),
        "model and loss: of the same names and shapes, they compute something else; a function or "
        "a constant in them is another",
    ),
    "update": (
        False,
        ("software", "compute_dtype"),
        "optimizer: its updates are others, by another learning rate, schedule or option",
    ),
    "hyperparameters": (
        False,
        (),
        "optimizer: the hyperparameters in its state are others; those of the checkpoint are used",
    ),
    "first batch": (
        False,
        ("example", "batch size"),
        "batches: the first batch of the first epoch holds something else, by another order, seed "
        "or data",
    ),
}


def described_run(model: Layer, loss: Loss, kept: Tree, frozen: Tree) -> dict[str, str]:
    """What must be the same to go on with a run.

    Args:
      kept: the run's ``params``, ``opt_state`` and ``key``.
      frozen: the parameters that are not trained, and None for the others.
    """
    key = kept["key"]
    arrays = named({"params": kept["params"]}) | named({"opt_state": kept["opt_state"]})
    return {
        "model": model.name,
        "loss": loss.name,
        "frozen": ", ".join(named(frozen)) or "none",
        "optimizer": ", ".join(kinds_of(kept["opt_state"])),
        "key": "none" if key is None else str(jax.random.key_data(key).tolist()),
    } | {name: f"{leaf.dtype}{tuple(leaf.shape)}" for name, leaf in arrays.items()}


def described_settings(model: Layer, batch: tuple[Tree, Tree, Any]) -> dict[str, str]:
    """What may be another, of the first batch, (x, y, weights), and of what computes with it."""
    examples = batch[:2] if model.mixes_examples else one_of(batch[:2])
    return {
        "software": f"{_versions()}, {jnp.result_type(float)}",
        "example": described(examples),
        "batch size": str(len(batch[2])),
    }


def _versions() -> str:
    versions = [f"jax {jax.__version__}", f"optax {optax.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(f"functional_bp {metadata.version('functional_bp')}")
    return ", ".join(versions)


def hyperparameters(opt_state: Tree) -> str:
    """A fingerprint of those that ``optax.inject_hyperparams`` keeps in an optimiser's state."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "hyperparams")
    return contents_of([value for _, value in found])


def kinds_of(state: Tree) -> list[str]:
    """The names of an optimiser's states, in order: equal arrays may belong to different ones."""
    if not isinstance(state, tuple):
        return []
    name = [type(state).__name__] if hasattr(state, "_fields") else []
    return name + [kind for part in state for kind in kinds_of(part)]


def _different(saved: dict[str, str], run: dict[str, str]) -> Iterator[str]:
    for name in {**run, **saved}:
        ours, theirs = run.get(name, "none"), saved.get(name, "none")
        if ours != theirs:
            yield f"  {name}: it has {theirs}, this run has {ours}"
