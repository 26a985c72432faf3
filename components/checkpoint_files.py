"""Reading weights: of a checkpoint, whole or sharded, or of a released model; what does not fit is told exactly."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from components.decoder import LoRA, Merged, without_adapters
from components.errors import RecipeError
from components.hub import fetch
from components.huggingface.initial import load_llava
from components.huggingface.layout import PROJECTOR_FILE
from components.named_tensors import NamedTensors, TensorInfo, TorchFiles, differences, fill, listed, reading
from components.run_folder import RECIPE, RUNS, STATE, find_checkpoint
from components.sharding import demand_finite

INITIAL = "model.initial_weights"


def load_start(model: Any) -> str:
    """Fill a model with the weights that its recipe names; parts that have none, and adapters, stay as they are.

    Args:
        model: A `VisionLanguageModel`, built and in memory, perhaps sharded. Its `initial_weights` are a run folder, a checkpoint
            folder, the folder of a LLaVA model or its hub id; parts that a released model leaves out read their own weights.

    Returns:
        Which `initial_weights` were read: of a run folder, its newest checkpoint.

    Raises:
        RecipeError: There are no weights, they do not have the names and shapes of the model's, or are not finite.
    """
    read = "none"
    if model.initial_weights is None:
        model.vision_tower.load_weights()
        model.decoder.load_weights()
    else:
        read = _load_initial_weights(model, model.initial_weights)
    demand_finite(model)
    return read


def _load_initial_weights(model: nn.Module, source: str) -> str:
    path = Path(source)
    if any((path / name).is_file() for name in ("config.json", PROJECTOR_FILE)):
        load_llava(model, path)
    elif path.exists() or len(path.parts) != 2 or path.parts[0] == str(RUNS):
        checkpoint = find_checkpoint(source, INITIAL)
        weights = merged_weights(checkpoint)
        state = without_adapters(model.state_dict())
        demand_fit(state, weights, checkpoint, INITIAL)
        fill(state, weights)
        return str(checkpoint)
    else:
        load_llava(model, fetch(source, INITIAL))
    return source


def load_weights(model: nn.Module, checkpoint: Path, key: str) -> None:
    """Copy the weights of a checkpoint into a model; every name and every shape must agree."""
    weights = checkpoint_weights(checkpoint)
    state = model.state_dict()
    demand_fit(state, weights, checkpoint, key)
    fill(state, weights)


def demand_fit(state: dict[str, Tensor], weights: NamedTensors, checkpoint: Path, key: str) -> None:
    """Every name and every shape of a checkpoint is that of the model's state dict, which may be on the meta device.

    Raises:
        RecipeError: With the list of what differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
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

    Raises:
        RecipeError: The folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._reader = FileSystemReader(folder)
        with reading(folder):
            metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        prefix = "state_dict."
        stored = {name: entry for name, entry in metadata.state_dict_metadata.items() if name.startswith(prefix)}
        self._stored: dict[str, tuple[str, Any]] = {name.removeprefix(prefix): (name, entry) for name, entry in stored.items()}
        self.infos = {name: TensorInfo(tuple(entry.size), entry.properties.dtype) for name, (_, entry) in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._read(name, 0, torch.empty(self.infos[name].shape, dtype=self.infos[name].dtype))

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor; shards that hold none of them are not read."""
        (count, *others), dtype = self.infos[name].shape, self.infos[name].dtype
        first, end, _ = rows.indices(count)
        return self._read(name, first, torch.empty(end - first, *others, dtype=dtype))

    def _read(self, name: str, first_row: int, tensor: Tensor) -> Tensor:
        stored_name, entry = self._stored[name]
        offsets = torch.Size([first_row, *[0] * tensor.ndim][: tensor.ndim])
        items = create_read_items_for_chunk_list(stored_name, entry, [ChunkStorageMetadata(offsets, tensor.shape)])
        with reading(Path(self.where)):
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor, whatever part of the stored one it stands for."""
        return self.tensor
