"""The second strategy: FSDP1, which lays the parameters of a block end to end and gives each rank a piece of the line.

Source: PyTorch FullyShardedDataParallel through Lightning's FSDPStrategy. Differs: the parts say what a block is; gradients are
reduced in a number format of their own; `forward` and `generate` gather the shards wherever they are called; checkpoints are laid
out as those of FSDP2. Gradients are reduced after every micro-batch, every rank reads the weights whole, and a run continues on the
mesh that it began with: where that is too little, `HybridSharding` does more.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed import checkpoint as sharded
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from components.errors import RecipeError
from components.sharding.layout import Dtype, Layout
from components.sharding.whole import note

INSTEAD = "components.sharding.HybridSharding, as recipes/trainer/fsdp_8xa100.yaml does"


class FullyShardedV1(FSDPStrategy):
    """FSDP1 over replicas x shards ranks: parameters are sharded within a group of `shards` ranks and replicated across groups.

    Prefer HybridSharding (FSDP2), which can do all of this and more. This is for clusters and comparisons that need FSDP1.

    Args:
        replicas: Groups that hold the whole model each, >= 1; the number of nodes, or 1 to shard over all ranks.
        shards: Ranks that one copy of the model is spread over, >= 2; the GPUs of a node, or all ranks.
        param_dtype: Dtype of the computation. The shards themselves, and the optimizer state, stay float32.
        reduce_dtype: Dtype in which gradients are reduced.
        activation_checkpointing: `full` computes the inside of every block again in the backward pass, `none` keeps it.
        timeout_minutes: How long a collective may take before the run is ended, > 0.

    Raises:
        RecipeError: replicas x shards is not the number of ranks, or nothing would be sharded.
    """

    def __init__(
        self,
        replicas: int,
        shards: int,
        param_dtype: Dtype = "bfloat16",
        reduce_dtype: Dtype = "float32",
        activation_checkpointing: Literal["none", "full"] = "none",
        timeout_minutes: float = 30,
    ) -> None:
        if shards < 2:  # torch would take such groups for runs of their own, and reduce no gradient across them
            raise RecipeError(f"trainer.strategy: FSDP1 needs shards = {shards} to be at least 2. Otherwise give {INSTEAD}.")
        super().__init__(
            timeout=timedelta(minutes=timeout_minutes),
            mixed_precision=MixedPrecision(getattr(torch, param_dtype), getattr(torch, reduce_dtype)),
            sharding_strategy="HYBRID_SHARD" if replicas > 1 else "FULL_SHARD",
            device_mesh=(replicas, shards),
            state_dict_type="sharded",
        )
        self.layout = Layout(replicas, shards, param_dtype, reduce_dtype, activation_checkpointing=activation_checkpointing)

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        replicas, shards = self.layout.replicas, self.layout.shards
        if self.layout.ranks != self.num_nodes * self.num_processes:
            raise RecipeError(
                f"trainer.strategy lays {replicas} replicas x {shards} shards = {self.layout.ranks} ranks, but "
                f"the trainer has {self.num_nodes} nodes x {self.num_processes} devices. Make the two products equal."
            )
        self.kwargs.pop("device_mesh")  # of which Lightning would make a mesh of GPUs, wherever it is
        super().setup_environment()
        mesh = init_device_mesh(self.root_device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
        self.kwargs["device_mesh"] = mesh if replicas > 1 else mesh["shard"]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Shard every block, then the rest of the model."""
        parts: Any = model.parts
        blocks = {block for part in parts.values() for block in part.blocks()}
        shapes = [(parameter, parameter.shape) for parameter in model.parameters()]
        root = FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(blocks.__contains__),
            mixed_precision=self.mixed_precision,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        for parameter, shape in shapes:
            note(parameter, shape, root.process_group)
        if self.layout.activation_checkpointing == "full":
            apply_activation_checkpointing(root, check_fn=blocks.__contains__)
        model.forward = _gathered(root, model.forward, root)
        model.generate = _gathered(root, model.generate, partial(self._forward_redirection, root, model, "generate"))  # type: ignore[operator]
        return root

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards of the weights, under the names that they have without sharding."""
        return get_model_state_dict(self.model, options=StateDictOptions(cpu_offload=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards of the optimizer's state, by the names of the weights."""
        inner = getattr(optimizer, "_optimizer", optimizer)  # Lightning hands over one of its own
        return get_optimizer_state_dict(self.model, inner, options=StateDictOptions(cpu_offload=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the shards of all ranks, and what is not sharded, into a folder."""
        folder = Path(self.broadcast(filepath))
        folder.mkdir(parents=True, exist_ok=True)
        optimizers = {f"optimizer_{number}": state for number, state in enumerate(checkpoint.pop("optimizer_states", []))}
        sharded.save({"state_dict": checkpoint.pop("state_dict"), **optimizers}, checkpoint_id=folder)
        if self.is_global_zero:
            torch.save(checkpoint, folder / _METADATA_FILENAME)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's shards from such a folder, and return what is not sharded."""
        folder = Path(self.broadcast(checkpoint_path))
        weights = get_model_state_dict(self.model)
        sharded.load({"state_dict": weights}, checkpoint_id=folder)
        set_model_state_dict(self.model, weights)
        for number, optimizer in enumerate(self.optimizers):
            state = get_optimizer_state_dict(self.model, optimizer)
            sharded.load({f"optimizer_{number}": state}, checkpoint_id=folder)
            set_optimizer_state_dict(self.model, optimizer, state)
        return torch.load(folder / _METADATA_FILENAME, weights_only=weights_only)


def _gathered(root: FullyShardedDataParallel, method: Callable, through_root: Callable) -> Callable:
    """A method of the model that `root` wraps, called through the root, which gathers the shards, unless it is at it already."""

    def call(*arguments: Any, **options: Any) -> Any:
        inside = root.training_state is TrainingState.FORWARD_BACKWARD
        return (method if inside else through_root)(*arguments, **options)

    return call
