"""Simulate: one optimizer step of one rank, by the real model and the real sharding, on tensors that have shapes but no memory.

A process group of any size whose collectives do nothing, and fake tensors: nothing is sent, and nothing of the model is allocated.
The ranks of a data-parallel run all do the same, so one of them is exact for collectives, FLOPs and what is held between steps. The
peak of memory is that of the CPU's kernels without an allocator's fragmentation: near what a GPU shows, not equal to it.

Source: torch.testing._internal.distributed.fake_pg, torch._subclasses.fake_tensor, torch.distributed._tools.fsdp2_mem_tracker.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from components.batch import IGNORE_INDEX, Batch, Document, pack
from components.errors import RecipeError
from components.plan.communication import Collective, Kind
from components.plan.schedule import Schedule
from components.sharding import HybridSharding, Layout, shard
from components.vlm import VisionLanguageModel

_KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
_ADAM_BYTES = 8  # of a trained parameter: two moments in float32


@dataclass(frozen=True)
class MeanSample:
    """The mean sample of a step in whole numbers: its pictures first, then its text.

    Args:
        text_tokens: Tokens of its text, >= 1.
        target_tokens: How many of them, from the end, are supervised; in [0, text_tokens].
        images: Pictures, >= 0.
    """

    text_tokens: int
    target_tokens: int
    images: int = 1


@dataclass(frozen=True)
class Simulation:
    """What one rank did in one optimizer step.

    Args:
        collectives: Calls, and bytes of the unsharded side, by kind: all_gather, reduce_scatter, all_reduce.
        flops: Matmul FLOPs of the step, causal attention at half, recomputation included.
        micro_batch_flops: Those of one micro-batch.
        peak_memory: Bytes by category at the moment of the largest sum.
        shard_bytes: Parameters that the rank holds between steps.
        ran: Micro-batches that ran; the middle ones of a step are alike, so that one stands for all of them.
    """

    collectives: dict[str, Collective]
    flops: int
    micro_batch_flops: int
    peak_memory: dict[str, int]
    shard_bytes: int
    ran: int


def simulate(model: VisionLanguageModel, schedule: Schedule, sample: MeanSample, progress: bool = False) -> Simulation:
    """Run one optimizer step of rank 0, forward and backward.

    Args:
        model: As a recipe makes it; it stays as it is.
        schedule: Blocks are not compiled here even if its layout says so, which changes no collective and no matmul.
        sample: What the micro-batches are full of.
        progress: Whether to show a progress bar.

    Raises:
        RecipeError: This process takes part in a distributed run.
    """
    layout = replace(schedule.layout, compile_blocks=False)
    # the first micro-batch meets no gradients, the last one exchanges what was put off, and all between are alike
    stands_for = [1] * schedule.accumulation if schedule.accumulation <= 3 else [1, schedule.accumulation - 2, 1]
    calls, sent = Counter[str](), Counter[str]()
    flops: list[int] = []
    model = _built(model)
    batch = _batch(model, sample, schedule.micro_batch)
    with (
        tqdm(total=1 + 2 * len(stands_for), disable=not progress, leave=False) as bar,
        torch.random.fork_rng(devices=[]),
        _ranks(layout) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        bar.set_description(f"rank 0 of {layout.ranks} is sharded")
        model.to_empty(device="cpu")
        shard(model, [block for part in model.parts.values() for block in part.blocks()], mesh, layout)
        strategy = HybridSharding(layout.replicas, layout.shards)
        strategy.layout, strategy.model = layout, model
        bar.update()
        with _memory_tracker(model) as tracker:
            for index, times in enumerate(stands_for):
                bar.set_description(f"micro-batch {index + 1} of {len(stands_for)}")
                is_last = index + 1 == len(stands_for)
                log, counter = CollectiveLog(), FlopCounterMode(display=False, custom_mapping=_FLOPS)
                with nullcontext() if is_last else strategy.block_backward_sync(), log, counter:
                    loss = model.loss_sum(batch)
                    bar.update()
                    loss.backward()
                    bar.update()
                flops.append(counter.get_total_flops())
                for kind in log.calls:
                    calls[kind] += times * log.calls[kind]
                    sent[kind] += times * log.bytes[kind]
                tracker.reset_mod_stats()
    return Simulation(
        collectives={kind: Collective(calls[kind], sent[kind]) for kind in sorted(calls)},
        flops=sum(times * count for times, count in zip(stands_for, flops, strict=True)),
        micro_batch_flops=flops[-1],
        peak_memory=_peak_memory(tracker, model),
        shard_bytes=sum(_local(parameter).nbytes for parameter in model.parameters()),
        ran=len(stands_for),
    )


class CollectiveLog(TorchDispatchMode):
    """Counts the collectives inside it, and the bytes of their unsharded sides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Log the operator if it is a collective, and run it."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind = _KINDS.get(name, name)
            self.calls[kind] += 1
            self.bytes[kind] += max(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def _ranks(layout: Layout) -> Iterator[DeviceMesh]:
    """The mesh of a process group that has no other processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        raise RecipeError(
            "A simulation plays all ranks in one process, but this one is a rank of a run. Start it without torchrun."
        )
    distributed.init_process_group("fake", rank=0, world_size=layout.ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (layout.replicas, layout.shards), mesh_dim_names=("replicate", "shard"))
    finally:
        distributed.destroy_process_group()


def _built(model: VisionLanguageModel) -> VisionLanguageModel:
    """A copy of the model with its layers, on the meta device, in the modes of training."""
    model = copy.deepcopy(model)
    with torch.device("meta"):
        model.build()
        model.adapt()
    model.set_modes()
    return model


class _Known(Tensor):
    """A tensor whose values are read while fake tensors have none: the ends of the documents."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


def _batch(model: VisionLanguageModel, sample: MeanSample, samples: int) -> Batch:
    """A micro-batch of equal samples."""
    shape = model.sample_format()
    slots = sample.images * shape.tokens_per_image
    input_ids = np.array([shape.image_token_id] * slots + [0] * sample.text_tokens)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[len(labels) - sample.target_tokens :] = 0
    pixels = np.zeros((sample.images, 3, shape.image_size, shape.image_size), dtype=np.uint8)
    batch = pack([Document(str(number), input_ids, labels, pixels) for number in range(samples)])
    return replace(batch, cumulative_lengths=batch.cumulative_lengths.as_subclass(_Known))


def _memory_tracker(model: nn.Module) -> Any:
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    tracker = FSDPMemTracker(model)
    # it looks for sharded parameters only
    tracker.track_inputs(tuple(parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)))
    return tracker


def _peak_memory(tracker: Any, model: nn.Module) -> dict[str, int]:
    """What the tracker saw, and the state of the optimizer."""
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    seen = {str(getattr(kind, "value", kind)).lower(): size for kind, size in snapshot.items()}
    del seen["total"]
    seen["replicated param"] = seen.pop("inputs")
    # run inside the tracker, an optimizer step books tensors of global shape
    trained = sum(_local(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    return {**seen, "optstate": _ADAM_BYTES * trained}


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **others: Any) -> int:
    """FLOPs of the CPU's kernel of attention; the queries are the last of the keys where it is causal, as it is with a mask."""
    *heads, queries, width = query
    is_causal = causal or others.get("attn_mask") is not None
    pairs_twice = 2 * queries * key[-2] - is_causal * queries**2
    return prod(heads) * pairs_twice * (width + value[-1])


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, output: Any, sums: Any, dropout: float, causal: bool, **others: Any
) -> int:
    """Twice the forward pass; that the kernel computes the scores again is its own affair."""
    others.pop("out_shape")
    return 2 * _attention(query, key, value, dropout, causal, **others)


def _attention_layer(query: Any, key: Any, value: Any, width: int, heads: int, projections: Any, *others: Any, **more: Any) -> int:
    """FLOPs of the one operator that a frozen tower's attention is, projections included."""
    *images, patches, _ = query
    return prod(images) * (8 * patches * width**2 + 4 * patches**2 * width)


_FLOPS = {  # operators that PyTorch's counter knows nothing of; arguments are shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._native_multi_head_attention: _attention_layer,
}


@dataclass(frozen=True)
class Comparison:
    """A quantity of a step by formula and by simulation.

    Args:
        quantity: Its name, with its unit.
        formula: What the plan says.
        simulated: What the simulation did.
        tolerance: Largest relative difference that is still agreement, >= 0; None: the two are near, not equal, and only shown.
    """

    quantity: str
    formula: int | float
    simulated: int | float
    tolerance: float | None = 0.0

    @property
    def difference(self) -> float:
        """Relative to the simulated one; positive if the formula says more."""
        if self.formula == self.simulated:
            return 0.0
        return self.formula / self.simulated - 1 if self.simulated else float("inf")

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.tolerance is None or abs(self.difference) <= self.tolerance


def compare(
    simulation: Simulation, collectives: Mapping[Kind, Collective], flops: int | float, peak_memory: int | float
) -> list[Comparison]:
    """A simulation and the formulas of a plan in, what they say of each quantity out.

    Args:
        simulation: Of the schedule and the samples of the formulas.
        collectives: Of an optimizer step.
        flops: Of an optimizer step on one rank, with what is recomputed.
        peak_memory: Bytes on one rank, without what an allocator and the libraries add.
    """
    formulas, nothing = {str(kind): collective for kind, collective in collectives.items()}, Collective(calls=0, bytes=0)
    lines = []
    for kind in sorted(formulas | simulation.collectives):
        ours, theirs = (said.get(kind, nothing) for said in (formulas, simulation.collectives))
        lines += [Comparison(f"{kind} calls", ours.calls, theirs.calls), Comparison(f"{kind} bytes", ours.bytes, theirs.bytes)]
    lines.append(Comparison("TFLOP", flops / 1e12, simulation.flops / 1e12, tolerance=0.01))
    total = sum(simulation.peak_memory.values())
    lines.append(Comparison("peak memory in GiB (fake-tensor tracker, no GPU)", peak_memory / 2**30, total / 2**30, tolerance=None))
    return lines
