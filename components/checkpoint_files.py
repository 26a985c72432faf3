"""Reading weights out of a checkpoint, whole or sharded, and telling exactly what does not fit."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load

from components.errors import RecipeError
from components.run_folder import STATE, find_checkpoint


def load_initial_weights(model: nn.Module, path: str) -> None:
    """Load all weights of a built model from an earlier run.

    Args:
        model: The model, built and not sharded.
        path: Run folder or checkpoint folder.

    Raises:
        RecipeError: There is no checkpoint, or its weights do not have the names and shapes of the model's.
    """
    checkpoint = find_checkpoint(path, "model.initial_weights")
    load_weights(model, checkpoint, "model.initial_weights")


def load_weights(model: nn.Module, checkpoint: Path, key: str) -> None:
    """Copy the weights of a checkpoint into a model; every name and every shape must agree."""
    expected = model.state_dict()
    shapes = _shapes(checkpoint)
    problems = [f"missing in the checkpoint: {name}" for name in expected if name not in shapes]
    problems += [f"unknown to the model: {name}" for name in shapes if name not in expected]
    problems += [
        f"{name}: {tuple(shapes[name])} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:6] + ([f"... and {len(problems) - 6} more"] if len(problems) > 6 else []))
        raise RecipeError(
            f"{key}: the weights in {checkpoint} do not fit this model:\n  {shown}\n"
            "Use the vision_tower, projector and decoder files of the run that wrote it (see recipe.yaml beside the weights)."
        )
    state = checkpoint / STATE
    if state.is_file():
        model.load_state_dict(torch.load(state, map_location="cpu", mmap=True, weights_only=True)["state_dict"])
    else:
        with warnings.catch_warnings():
            # every process reads for itself
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({"state_dict": expected}, storage_reader=FileSystemReader(state), no_dist=True)  # into the model's own tensors


def _shapes(checkpoint: Path) -> dict[str, torch.Size]:
    state = checkpoint / STATE
    if state.is_file():
        weights: dict[str, Tensor] = torch.load(state, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {name: tensor.shape for name, tensor in weights.items()}
    metadata = FileSystemReader(state).read_metadata().state_dict_metadata
    prefix = "state_dict."
    return {name.removeprefix(prefix): entry.size for name, entry in metadata.items() if name.startswith(prefix)}
