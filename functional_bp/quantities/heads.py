"""A loss with parameters as a last layer and a loss without, whose outputs a Hessian is by."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from ..checks import ModelError
from ..layer import Layer
from ..layers.chains import chain
from ..losses.definition import Loss
from ..recursion import cost_itself

Tree = Any


def with_head(model: Layer, loss: Loss) -> tuple[Layer, Loss]:
    """The model up to the outputs by which the cost has a Hessian, and the loss of those.

    Raises:
      ModelError: for a loss with parameters that does not state them.
    """
    if loss is cost_itself:
        raise ModelError(
            f"takes a model and a loss, got the cost {model.name}, which has no outputs, and by "
            "itself a Hessian of 0; bp.from_function makes a layer of the model"
        )
    if not loss.has_parameters:
        return model, loss
    if loss.head is None:
        raise ModelError(
            f"{loss.name}: has parameters, and does not state of which outputs its Hessian is; "
            "give head= to bp.losses.loss"
        )
    layer, of_outputs = loss.head

    def forward(params: Tree, x: Tree, key: Array | None = None) -> tuple[Tree, Tree]:
        a, residuals = model.forward(params[0], x, key)  # the key is the model's, as elsewhere
        outputs, of_layer = layer.forward(params[1], a)
        return outputs, (residuals, of_layer)

    return loss.joined(dataclasses.replace(chain(model, layer), forward=forward)), of_outputs
