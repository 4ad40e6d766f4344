"""What a run recorded, and the run as far as it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Tree = Any


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """What a run recorded, as NumPy arrays.

    Attributes:
      loss: ``(steps,)``, the mean cost of each step's batch, before the step.
      weight: ``(steps,)``, Σₙ wₙ of that batch: its number of examples, if they have no weights.
      epoch: ``(steps,)``, the epoch that the step belongs to, from 0.
      evaluated: ``(evaluations,)``, the number of steps done at each evaluation.
      evaluation: ``"loss"`` and each metric over the evaluation data, ``(evaluations,)`` each.
    """

    loss: np.ndarray
    weight: np.ndarray
    epoch: np.ndarray
    evaluated: np.ndarray
    evaluation: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"History({self.told()})"

    def told(self) -> str:
        """In a line: how many steps there were, the last cost and the last evaluation."""
        steps = len(self.loss)
        told = f"{steps:,} step{'s' * (steps != 1)}"
        if steps:
            told += f", last cost {self.loss[-1]:.4g}"
        if len(self.evaluated):
            told += f"; evaluated after {self.evaluated[-1]:,}: " + ", ".join(
                f"{name} {values[-1]:.4g}" for name, values in self.evaluation.items()
            )
        return told

    @property
    def epoch_loss(self) -> np.ndarray:
        """``(epochs,)``, the mean cost over each epoch's examples, Σ w C / Σ w."""
        cost = np.bincount(self.epoch, self.loss * self.weight)
        weight = np.bincount(self.epoch, self.weight)
        return cost / np.where(weight == 0, 1, weight)

    def with_steps(self, epoch: int, losses: Sequence[np.ndarray]) -> History:
        """With further steps of an epoch; arrays ``(steps, 2)`` have their losses and weights."""
        loss, weight = np.concatenate([np.zeros((0, 2)), *losses]).T
        return dataclasses.replace(
            self,
            loss=np.append(self.loss, loss),
            weight=np.append(self.weight, weight),
            epoch=np.append(self.epoch, np.full(len(loss), epoch)),
        )

    def with_evaluation(self, step: int, values: Mapping[str, float]) -> History:
        """With what was evaluated after so many steps."""
        before = self.evaluation
        return dataclasses.replace(
            self,
            evaluated=np.append(self.evaluated, step),
            evaluation={k: np.append(before.get(k, np.zeros(0)), v) for k, v in values.items()},
        )

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> History:
        """From its arrays by name, as a checkpoint has them."""
        of_run = {name: array for name, array in arrays.items() if "." not in name}
        evaluation = {
            name.removeprefix("evaluation."): array
            for name, array in arrays.items()
            if name not in of_run
        }
        return dataclasses.replace(UNTRAINED, **of_run, evaluation=evaluation)


UNTRAINED = History(np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros(0, int), {})


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A training run as far as it has come: what ``bp.fit`` returns and gives to callbacks.

    Attributes:
      params: the parameters, frozen ones in their places.
      opt_state: the optimiser's state.
      step: steps done.
      epoch: epochs completed.
      history: losses and evaluations so far.
      ema: the parameters' moving averages, with frozen ones and state in their places; None where
        the run keeps none.
    """

    params: Tree
    opt_state: Tree
    step: int
    epoch: int
    history: History
    ema: Tree = None

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        epochs = f"{self.epoch:,} epoch{'s' * (self.epoch != 1)}"
        return f"Run({epochs}, {self.history.told()}; {count:,} parameters)"
