"""The FSDP strategy: a mesh of replicas and shards for `fully_shard`, with fp32 shards, bf16 compute and fp32 reduction.

Source: PyTorch FSDP2 through Lightning's ModelParallelStrategy. Differs: the mesh may be hybrid (shard inside a node, replicate
across), and gradients cross the nodes once per optimizer step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from components.errors import RecipeError

Dtype = Literal["float32", "bfloat16"]


class HybridSharding(ModelParallelStrategy):
    """FSDP2 over replicas x shards ranks: parameters are sharded within a group of `shards` ranks and replicated across groups.

    Args:
        replicas: Groups that hold the whole model each, >= 1; the number of nodes, or 1 to shard over all ranks.
        shards: Ranks that one copy of the model is spread over, >= 1; the GPUs of a node, or all ranks.
        param_dtype: Dtype of the computation. The shards themselves, and the optimizer state, stay float32.
        reduce_dtype: Dtype in which gradients are reduced.
        timeout_minutes: How long a collective may take before the run is ended, > 0.

    Raises:
        RecipeError: replicas x shards is not the number of ranks.
    """

    def __init__(
        self,
        replicas: int,
        shards: int,
        param_dtype: Dtype = "bfloat16",
        reduce_dtype: Dtype = "float32",
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(data_parallel_size=replicas * shards, tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))
        self.replicas = replicas
        self.shards = shards
        self.policy = MixedPrecisionPolicy(param_dtype=getattr(torch, param_dtype), reduce_dtype=getattr(torch, reduce_dtype))

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        if self.replicas * self.shards != self.num_nodes * self.num_processes:
            raise RecipeError(
                f"trainer.strategy lays {self.replicas} replicas x {self.shards} shards = {self.replicas * self.shards} ranks, but "
                f"the trainer has {self.num_nodes} nodes x {self.num_processes} devices. Make the two products equal."
            )
        super().setup_environment()
        mesh = init_device_mesh(
            self.root_device.type, (self.replicas, self.shards, 1), mesh_dim_names=("replicate", "shard", "tensor_parallel")
        )
        mesh["replicate", "shard"]._flatten("data_parallel")  # the name under which Lightning looks for the data ranks
        self._device_mesh = self.lightning_module._device_mesh = mesh

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around every micro-batch of an optimizer step but the last: gradients cross the groups once per step."""
        model: Any = self.model
        model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)


def shard(model: LightningModule, blocks: list[nn.Module]) -> None:
    """Shard every block, then the rest of the model, and let `generate` gather it as `forward` does.

    Args:
        model: The root, fully built, with a trainer whose strategy is `HybridSharding`.
        blocks: Modules inside it that are gathered one after another.

    Raises:
        RecipeError: The strategy is another one with a device mesh.
    """
    strategy = model.trainer.strategy
    if not isinstance(strategy, HybridSharding):
        raise RecipeError(
            f"trainer.strategy is {type(strategy).__name__}, which does not say how to shard this model. "
            "Give components.sharding.HybridSharding with replicas and shards, as recipes/trainer/fsdp_8xa100.yaml does."
        )
    mesh: Any = model.device_mesh
    mesh = mesh["replicate", "shard"] if strategy.replicas > 1 else mesh["shard"]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=strategy.policy)
    register_fsdp_forward_method(model, "generate")  # the steps call forward
