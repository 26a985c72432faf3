"""Reading weights: of a checkpoint, whole or sharded, or of a released model; what does not fit is told exactly."""

import warnings
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load

from components.decoder import LoRA, Merged
from components.errors import RecipeError
from components.hub import fetch
from components.huggingface.initial import fill, load_llava
from components.huggingface.layout import PROJECTOR_FILE
from components.named_tensors import NamedTensors, TensorInfo, TorchFiles, differences, listed
from components.run_folder import RECIPE, RUNS, STATE, find_checkpoint

INITIAL = "model.initial_weights"


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Load the weights of an earlier run, or of a released LLaVA model, into a built model.

    Args:
        model: The model, built, in memory and not sharded. Parts that a released model leaves out read their own weights.
        source: Run folder, checkpoint folder, folder of a LLaVA model, or its hub id.

    Raises:
        RecipeError: There are no weights, or they do not have the names and shapes of the model's.
    """
    path = Path(source)
    if any((path / name).is_file() for name in ("config.json", PROJECTOR_FILE)):
        load_llava(model, path)
    elif path.exists() or len(path.parts) != 2 or path.parts[0] == str(RUNS):
        checkpoint = find_checkpoint(source, INITIAL)
        weights = merged_weights(checkpoint)
        demand_fit(model, weights, checkpoint, INITIAL)
        fill(model, weights)
    else:
        load_llava(model, fetch(source, INITIAL))


def load_weights(model: nn.Module, checkpoint: Path, key: str) -> None:
    """Copy the weights of a checkpoint into a model; every name and every shape must agree."""
    weights = checkpoint_weights(checkpoint)
    demand_fit(model, weights, checkpoint, key)
    fill(model, weights)


def demand_fit(model: nn.Module, weights: NamedTensors, checkpoint: Path, key: str) -> None:
    """Every name and every shape of a checkpoint is that of the model, which may be on the meta device.

    Raises:
        RecipeError: With the list of what differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if problems := differences(expected, {name: info.shape for name, info in weights.infos.items()}):
        raise RecipeError(
            f"{key}: the weights in {checkpoint} do not fit this model:\n  {listed(problems)}\n"
            "Use the vision_tower, projector and decoder files of the run that wrote it (see recipe.yaml beside the weights)."
        )


def checkpoint_weights(checkpoint: Path) -> NamedTensors:
    """The model's weights in a checkpoint, under the names of its state dict."""
    state = checkpoint / STATE
    return TorchFiles([state], section="state_dict") if state.is_file() else ShardedState(state)


def merged_weights(checkpoint: Path) -> NamedTensors:
    """The weights in a checkpoint; adapters, if it has any, are merged into the weights that they adapt."""
    weights = checkpoint_weights(checkpoint)
    recipe = yaml.safe_load((checkpoint / RECIPE).read_text())
    decoder = recipe["model"]["decoder"]["init_args"] if isinstance(recipe.get("model"), dict) else {}
    return Merged(weights, LoRA(**decoder["lora"])) if decoder.get("lora") else weights


class ShardedState(NamedTensors):
    """The model's weights in a sharded checkpoint, each put together from its shards when it is read.

    Args:
        folder: The folder that torch.distributed.checkpoint wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        prefix = "state_dict."
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        self.infos = {
            name.removeprefix(prefix): TensorInfo(tuple(entry.size), entry.properties.dtype)  # type: ignore[union-attr]
            for name, entry in entries.items()
            if name.startswith(prefix)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        info = self.infos[name]
        wanted = {name: torch.empty(info.shape, dtype=info.dtype)}
        with warnings.catch_warnings():
            # every process reads for itself
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({"state_dict": wanted}, storage_reader=FileSystemReader(self.where), no_dist=True)
        return wanted[name]
