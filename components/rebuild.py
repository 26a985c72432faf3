"""A model and its preparation of samples rebuilt from the resolved recipe inside a checkpoint, without a Trainer."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from components.checkpoint_files import load_weights
from components.data import Preparation
from components.run_folder import RECIPE
from components.vlm import VisionLanguageModel


def read_checkpoint_recipe(checkpoint: Path) -> dict[str, Any]:
    """The resolved recipe of a checkpoint."""
    return yaml.safe_load((checkpoint / RECIPE).read_text())


def rebuild(recipe: dict[str, Any]) -> tuple[VisionLanguageModel, Preparation]:
    """A resolved recipe in, its model, without layers yet, and its preparation of samples out.

    Args:
        recipe: Sections `model` and `data` as they stand in a checkpoint.

    Raises:
        ArgumentError: The recipe states something that no longer exists.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VisionLanguageModel, "model")
    parts: Any = parser.instantiate(parser.parse_object({"model": recipe["model"]}))
    stated = recipe["data"]
    return parts.model, Preparation(**{key: stated[key] for key in Preparation.__dataclass_fields__ if key in stated})


def load(checkpoint: Path) -> tuple[VisionLanguageModel, Preparation]:
    """A trained model, ready to answer, and how its samples are prepared.

    Args:
        checkpoint: A checkpoint folder; the recipe inside it says how to build the model.

    Raises:
        RecipeError: The weights do not fit the recipe.
    """
    model, preparation = rebuild(read_checkpoint_recipe(checkpoint))
    model.build()
    model.adapt()
    load_weights(model, checkpoint, "--ckpt")
    return model.eval(), preparation
