"""The units of a sharded model: parameters that are gathered together and whose gradients are reduced together."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from components.errors import RecipeError


@dataclass(frozen=True)
class Unit:
    """Some parameters of the model.

    Args:
        name: Where in the model it is: `decoder.lm.model.layers.0`; that of the root is `model`.
        module: What gathers the parameters when it is called.
        parameters: What it holds besides the units inside it.
        gradients_flow: Whether a backward pass goes through it.
    """

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    gradients_flow: bool

    @property
    def is_mixed(self) -> bool:
        """Whether some of its parameters train and others do not."""
        return len({parameter.requires_grad for parameter in self.parameters}) > 1


def units(model: Any, blocks: Collection[nn.Module], apart: Collection[nn.Parameter] = ()) -> list[Unit]:
    """The units of a model, inner ones first: each block, the rest of the tower, the rest of the projector, the rest of all.

    The last is what the decoder has outside its blocks: `embed` and `head` use it, which are no modules. So a part that trains and
    one that does not never share a unit. Adapters do share one with the layers that they lie beside: both are needed at once, and
    only what has a gradient is reduced.

    Args:
        model: A built `VisionLanguageModel`.
        blocks: Modules inside it that are gathered one after another.
        apart: Parameters that belong to no unit. Nor do modules that are left without parameters, but for the root.

    Raises:
        RecipeError: A unit has parameters that train and others that do not.
    """
    names = {module: name for name, module in model.named_modules()}
    taken = set(apart)
    flowing = flowing_modules(model)
    found = []
    for module in [*blocks, model.vision_tower, model.projector, model]:
        parameters = tuple(parameter for parameter in module.parameters() if parameter not in taken)
        taken.update(parameters)
        if parameters or module is model:
            found.append(Unit(names[module] or "model", module, parameters, module in flowing))
    of_decoder = set(model.decoder.parameters())
    for unit in found:
        if unit.is_mixed and not (model.decoder.lora and of_decoder.issuperset(unit.parameters)):
            raise RecipeError(
                f"{unit.name} has parameters that train and others that do not, which cannot be sharded together. Let the blocks() "
                "of its part keep them apart, or train all of them or none."
            )
    return found


def flowing_modules(model: Any) -> set[nn.Module]:
    """The modules through which a backward pass goes: all of the first part that trains and of those after it, and the root."""
    flowing: set[nn.Module] = {model}
    for part in model.parts.values():
        if len(flowing) > 1 or any(parameter.requires_grad for parameter in part.parameters()):
            flowing.update(part.modules())
    return flowing


def keep_frozen_whole(model: nn.Module, dtype: torch.dtype) -> set[nn.Parameter]:
    """Put the parameters that do not train into a number format, and return them.

    Raises:
        RecipeError: All of them train.
    """
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    if not frozen:
        raise RecipeError(
            "trainer.strategy.init_args.replicate_frozen has no effect, since every part has a learning rate. Make it false, or "
            "freeze a part with null in model.learning_rates."
        )
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    return frozen
