"""The FSDP strategy: a mesh of replicas and shards for `fully_shard`, with fp32 shards, bf16 compute and fp32 reduction.

Source: PyTorch FSDP2 through Lightning's ModelParallelStrategy. Differs: the mesh may be hybrid (shard inside a node, replicate
across), and gradients cross the nodes once per optimizer step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from components.errors import RecipeError
from components.sharding.layout import Dtype, Layout


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
        self.layout = Layout(replicas, shards, param_dtype, reduce_dtype)

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        replicas, shards = self.layout.replicas, self.layout.shards
        if self.layout.ranks != self.num_nodes * self.num_processes:
            raise RecipeError(
                f"trainer.strategy lays {replicas} replicas x {shards} shards = {self.layout.ranks} ranks, but "
                f"the trainer has {self.num_nodes} nodes x {self.num_processes} devices. Make the two products equal."
            )
        super().setup_environment()
        mesh = init_device_mesh(
            self.root_device.type, (replicas, shards, 1), mesh_dim_names=("replicate", "shard", "tensor_parallel")
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


def layout_of(model: LightningModule) -> Layout:
    """The layout of the strategy that a model with a device mesh is trained by.

    Raises:
        RecipeError: The strategy is another one with a device mesh.
    """
    strategy = model.trainer.strategy
    if not isinstance(strategy, HybridSharding):
        raise RecipeError(
            f"trainer.strategy is {type(strategy).__name__}, which does not say how to shard this model. "
            "Give components.sharding.HybridSharding with replicas and shards, as recipes/trainer/fsdp_8xa100.yaml does."
        )
    return strategy.layout


def shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, layout: Layout) -> None:
    """Shard every block, then the rest of the model, and let `generate` gather it as `forward` does.

    Args:
        model: The root, fully built, perhaps on the meta device.
        blocks: Modules inside it that are gathered one after another.
        mesh: Its dimensions are named `replicate` and `shard`.
        layout: What to do to the model.
    """
    mesh = mesh["replicate", "shard"] if layout.replicas > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, layout.param_dtype), reduce_dtype=getattr(torch, layout.reduce_dtype))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")  # the steps call forward
