"""The second strategy: FSDP1, which lays the parameters of a block end to end and gives each rank a piece of the line.

Source: PyTorch FullyShardedDataParallel through Lightning's FSDPStrategy. Differs: the parts say what a block is; gradients are
reduced in a number format of their own; `forward` and `generate` gather the shards wherever they are called; checkpoints are laid
out as those of FSDP2. Gradients are reduced after every micro-batch, every rank reads the weights whole, and a run continues on the
mesh that it began with: where that is too little, `HybridSharding` does more.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.checkpoint import load
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
from components.sharding.layout import Checkpointing, Dtype, Layout, demand_fit
from components.sharding.materialize import agreed, demand_finite
from components.sharding.recomputation import recompute
from components.sharding.units import flowing_modules
from components.sharding.whole import note

_ON_CPU = StateDictOptions(cpu_offload=True)


class FullyShardedV1(FSDPStrategy):
    """FSDP1 over replicas x shards ranks: parameters are sharded within a group of `shards` ranks and replicated across groups.

    Prefer HybridSharding (FSDP2), which can do all of this and more. This is for clusters and comparisons that need FSDP1.

    Args:
        replicas: Groups that hold the whole model each, >= 1; the number of nodes, or 1 to shard over all ranks.
        shards: Ranks that one copy of the model is spread over, >= 2; the GPUs of a node, or all ranks.
        param_dtype: Dtype of the computation. The shards themselves, and the optimizer state, stay float32.
        reduce_dtype: Dtype in which gradients are reduced.
        activation_checkpointing: What the backward pass computes again, in the blocks that it goes through. `none`: nothing.
            `selective`: all but the results of matrix products and of attention. `full`: all but the input of a block.
        timeout_minutes: How long a collective may take before the run is ended, > 0.

    Raises:
        RecipeError: replicas x shards is not the number of ranks, nothing would be sharded, or a node has too little memory for
            its ranks to read the weights whole.
    """

    def __init__(
        self,
        replicas: int,
        shards: int,
        param_dtype: Dtype = "bfloat16",
        reduce_dtype: Dtype = "float32",
        activation_checkpointing: Checkpointing = "none",
        timeout_minutes: float = 30,
    ) -> None:
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
        trainer: Any = self.lightning_module.trainer  # type: ignore[union-attr]
        demand_fit(self.layout, trainer)
        if shards == 1:  # torch would take each rank for a run of its own, and reduce no gradients
            raise RecipeError(
                "trainer.strategy.init_args: FSDP1 needs shards to be at least 2. Raise it, or give "
                "components.sharding.HybridSharding, as recipes/trainer/fsdp_8xa100.yaml does."
            )
        self._demand_memory()
        self.kwargs.pop("device_mesh")  # of which Lightning would make a mesh of GPUs, wherever it is
        super().setup_environment()
        mesh = init_device_mesh(self.root_device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
        self.kwargs["device_mesh"] = mesh if replicas > 1 else mesh["shard"]

    def _demand_memory(self) -> None:
        """The memory of this node is enough for all of its ranks to read the weights whole."""
        model: Any = self.lightning_module
        model.build(on_meta=set(model.parts))  # to be counted; it is built anew when it is read
        needed = self.num_processes * sum(4 * parameter.numel() for parameter in model.parameters())
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise RecipeError(
                f"trainer.strategy: with FSDP1 every rank reads the weights whole, and the {self.num_processes} ranks of this node "
                f"need {needed / 2**30:.3g} GiB of memory, of {there / 2**30:.3g}. Give components.sharding.HybridSharding, as "
                "recipes/trainer/fsdp_8xa100.yaml does, which reads only what a rank keeps."
            )

    def _setup_model(self, model: Any) -> nn.Module:
        """Shard every block, then the rest of the model."""
        blocks = {block for part in model.parts.values() for block in part.blocks()}
        if self.layout.activation_checkpointing != "none":
            for block in blocks & flowing_modules(model):
                recompute(block, self.layout.activation_checkpointing)
        shapes = [(parameter, parameter.shape) for parameter in model.parameters()]
        root: Any = FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(blocks.__contains__),
            mixed_precision=self.mixed_precision,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        for parameter, shape in shapes:
            note(parameter, shape, root.process_group)
        model.forward = _gathered(root, model.forward, root)
        model.generate = _gathered(root, model.generate, partial(self._forward_redirection, root, model, "generate"))
        return root

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards of the weights, under the names that they have without sharding."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=_ON_CPU)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards of the optimizer's state, by the names of the weights."""
        assert self.model is not None
        inner = getattr(optimizer, "_optimizer", optimizer)  # Lightning hands over one of its own
        return get_optimizer_state_dict(self.model, inner, options=_ON_CPU)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the model, which may have had no values before, from a sharded checkpoint; return what is not sharded."""
        assert self.model is not None
        folder = Path(self.broadcast(checkpoint_path))
        weights = get_model_state_dict(self.model)
        load({"state_dict": weights}, checkpoint_id=folder)
        set_model_state_dict(self.model, weights)
        with agreed(self.world_size):
            demand_finite(self.model)
        for number, optimizer in enumerate(self.optimizers):
            state = get_optimizer_state_dict(self.model, optimizer)
            load({f"optimizer_{number}": state}, checkpoint_id=folder)
            set_optimizer_state_dict(self.model, optimizer, state)
        return torch.load(folder / _METADATA_FILENAME, weights_only=weights_only)


def _gathered(root: FullyShardedDataParallel, method: Callable, through_root: Callable) -> Callable:
    """A method of the model that `root` wraps, called through the root, which gathers the shards, unless it is at it already."""

    def call(*arguments: Any, **options: Any) -> Any:
        inside = root.training_state is TrainingState.FORWARD_BACKWARD
        return (method if inside else through_root)(*arguments, **options)

    return call
