"""The FSDP strategy: a mesh of replicas and shards for `fully_shard`, with fp32 shards, bf16 compute and fp32 reduction.

Source: PyTorch FSDP2 through Lightning's ModelParallelStrategy. Differs: the mesh may be hybrid (shard inside a node, replicate
across), and gradients cross the nodes once per optimizer step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from components.errors import RecipeError
from components.sharding.layout import Checkpointing, Dtype, Layout, demand_fit
from components.sharding.materialize import agreed, demand_finite
from components.sharding.recomputation import compile_block, recompute
from components.sharding.units import flowing_modules, keep_frozen_whole, units


class HybridSharding(ModelParallelStrategy):
    """FSDP2 over replicas x shards ranks: parameters are sharded within a group of `shards` ranks and replicated across groups.

    Args:
        replicas: Groups that hold the whole model each, >= 1; the number of nodes, or 1 to shard over all ranks.
        shards: Ranks that one copy of the model is spread over, >= 1; the GPUs of a node, or all ranks.
        param_dtype: Dtype of the computation. The shards themselves, and the optimizer state, stay float32.
        reduce_dtype: Dtype in which gradients are reduced, and in which they wait where their reduction is put off.
        reshard_after_forward: Whether the gathered parameters of a block are freed after its forward pass and gathered again for
            its backward pass. false saves a quarter of the traffic and holds the whole model, in `param_dtype`, on every rank.
        defer_reduce_scatter: Whether the gradients of all micro-batches of an optimizer step are reduced at once, with the last.
            Until then every rank holds the gradients of the whole model, in `reduce_dtype`. false: they are reduced within each
            group after every micro-batch, and across groups with the last. Where shards is 1 a rank holds them whole anyway.
        activation_checkpointing: What the backward pass computes again, in the blocks that it goes through. `none`: nothing.
            `selective`: all but the results of matrix products and of attention. `full`: all but the input of a block.
        compile_blocks: Whether torch.compile compiles the blocks that a backward pass goes through. It decides for itself what else
            of them is computed again, so that it cannot be had together with `selective`.
        replicate_frozen: Whether parameters that do not train are held whole, in `param_dtype`, by every rank, and never sent;
            checkpoints then hold them in that dtype.
        timeout_minutes: How long a collective may take before the run is ended, > 0.

    Raises:
        RecipeError: A value out of range, or one without effect; replicas x shards is not the number of ranks.
    """

    def __init__(
        self,
        replicas: int,
        shards: int,
        param_dtype: Dtype = "bfloat16",
        reduce_dtype: Dtype = "float32",
        reshard_after_forward: bool = True,
        defer_reduce_scatter: bool = False,
        activation_checkpointing: Checkpointing = "none",
        compile_blocks: bool = False,
        replicate_frozen: bool = False,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(data_parallel_size=replicas * shards, tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))
        self.layout = Layout(
            replicas,
            shards,
            param_dtype,
            reduce_dtype,
            reshard_after_forward,
            defer_reduce_scatter,
            activation_checkpointing,
            compile_blocks,
            replicate_frozen,
        )

    def setup_environment(self) -> None:
        """Start the process group and lay the mesh over it."""
        replicas, shards = self.layout.replicas, self.layout.shards
        trainer: Any = self.lightning_module.trainer  # type: ignore[union-attr]
        demand_fit(self.layout, trainer)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # in which FSDP2 fails to put together what it gathers where shards is 1
        super().setup_environment()
        mesh = init_device_mesh(
            self.root_device.type, (replicas, shards, 1), mesh_dim_names=("replicate", "shard", "tensor_parallel")
        )
        mesh["replicate", "shard"]._flatten("data_parallel")  # the name under which Lightning looks for the data ranks
        self._device_mesh = self.lightning_module._device_mesh = mesh

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the model from a checkpoint. It may have had no values before: then all of them must have come from there."""
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        with agreed(self.world_size):
            demand_finite(self.lightning_module)  # type: ignore[arg-type]
        return loaded

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights where they are: Lightning would copy those that every rank holds whole to the memory of each rank's CPU."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around every micro-batch of an optimizer step but the last: gradients cross the groups once per step."""
        model: Any = self.model
        # without a group to send them to, gradients wait in float32 where they were computed, and are copied once
        waits = self.layout.defer_reduce_scatter or _keeps_gradients(self.layout)
        exchange = model.set_requires_gradient_sync if waits else model.set_requires_all_reduce
        exchange(False)
        try:
            yield
        finally:
            exchange(True)


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
    """Shard every unit of the model, and let `generate` gather the root as `forward` does.

    Args:
        model: A `VisionLanguageModel`, fully built, perhaps on the meta device.
        blocks: Modules inside it that are gathered, recomputed and compiled one by one.
        mesh: Its dimensions are named `replicate` and `shard`.
        layout: What to do to the model.

    Raises:
        RecipeError: `replicate_frozen` where nothing is frozen, or a unit that trains in part.
    """
    mesh = mesh["replicate", "shard"] if layout.replicas > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, layout.param_dtype), reduce_dtype=getattr(torch, layout.reduce_dtype))
    whole = keep_frozen_whole(model, getattr(torch, layout.param_dtype)) if layout.replicate_frozen else set()
    flowing = flowing_modules(model)
    for block in blocks:
        if block in flowing and layout.compile_blocks:
            compile_block(block)
        if block in flowing and layout.activation_checkpointing != "none":
            recompute(block, layout.activation_checkpointing)
    for unit in units(model, blocks, whole):
        # backward begins with the root's parameters; a frozen part's are not needed again after forward
        reshard = unit.module is not model and (layout.reshard_after_forward or not unit.gradients_flow)
        unit.module.register_forward_hook(_own_memory)
        sharded = fully_shard(unit.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
        sharded.set_unshard_in_backward(unit.gradients_flow)
        if _keeps_gradients(layout):
            sharded.set_custom_reduce_scatter(Alone())  # type: ignore[arg-type]  # its base class is private
    register_fsdp_forward_method(model, "generate")  # the steps call forward


def _keeps_gradients(layout: Layout) -> bool:
    """Whether a rank's gradients need no place of their own for being reduced; in bfloat16 they are added up better elsewhere."""
    return layout.shards == 1 and layout.reduce_dtype == "float32"


class Alone:
    """Memory for the gradients of a unit that one rank holds whole: what FSDP2 would copy to itself stays where it is.

    Source: the `ReduceScatter` of `FSDPModule.set_custom_reduce_scatter`. For a group of one rank FSDP2 asks it for an input and
    then, on a stream of its own, for an output, and copies one to the other. That stream's memory is lost to all other tensors.
    """

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input; and the same tensor as output."""
        given, self._given = self._given, None
        if given is None or given.shape != tuple(size) or given.dtype != dtype:
            self._given = torch.empty(*size, dtype=dtype, device=device)
            return self._given
        if given.is_cuda:  # which is not to be given away while that stream still reads it
            given.record_stream(torch.cuda.current_stream(given.device))
        return given


def _own_memory(module: nn.Module, arguments: Any, output: Any) -> Any:
    """FSDP2 gathers for the backward pass when it reaches the output of a unit, which it may miss if that is a view."""
    is_view = isinstance(output, torch.Tensor) and output.requires_grad and output._is_view()
    return output.clone() if is_view else output
