"""Estimate: what a schedule costs on a machine, and which other schedules of the same optimizer step cost less."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Literal

from components.errors import RecipeError
from components.flops import mfu as mfu_of
from components.plan.communication import Communication, communication_of
from components.plan.machine import Machine
from components.plan.memory import Memory, memory_of
from components.plan.schedule import Schedule
from components.plan.workload import Workload
from components.sharding.layout import Checkpointing, Dtype, Layout, refusal

SELECTIVE_SHARE = 0.03
"""Time that selective checkpointing adds to computing, for norms and activation functions: an estimate."""
UNCOMPILED = 1.29
"""How many times as long a step computes whose blocks are not compiled: measured on one H200, 13B with the projector alone trained,
336 pixels: 60.3 % MFU in place of 78.0 %."""

HEADROOM = 0.1
"""Share of a GPU's memory that a schedule must leave free to be recommended: activations are a forecast."""
OPTION_PRICE = 0.005
"""Share by which a step must become faster for one more option to be worth stating."""


@dataclass(frozen=True)
class Estimate:
    """What a schedule costs on a machine.

    Args:
        schedule: The schedule.
        memory: On one GPU.
        communication: Of an optimizer step.
        compute_seconds: Computing of an optimizer step, with what checkpointing computes again.
        overlapped_seconds: An optimizer step when communication hides behind computing as far as it can.
        serial_seconds: An optimizer step when nothing overlaps.
        overlapped_mfu: MFU of the first, in [0, 1]; what is computed again does not count.
        serial_mfu: MFU of the second.
        tokens_per_second: Of all GPUs, with perfect overlap.
        days: Of all steps, with perfect overlap.
        gpu_hours: Of all steps and GPUs, with perfect overlap.
        bound: What limits the step.
    """

    schedule: Schedule
    memory: Memory
    communication: Communication
    compute_seconds: float
    overlapped_seconds: float
    serial_seconds: float
    overlapped_mfu: float
    serial_mfu: float
    tokens_per_second: float
    days: float
    gpu_hours: float
    bound: Literal["compute", "communication", "memory"]


def estimate(workload: Workload, machine: Machine, schedule: Schedule, mfu: float = 0.5) -> Estimate:
    """What a schedule costs on a machine.

    Args:
        workload: What is trained.
        machine: Where; it has as many GPUs as the layout has ranks.
        schedule: How.
        mfu: MFU of the computing alone with compiled blocks, were there neither communication nor recomputation, in (0, 1].

    Raises:
        RecipeError: The machine has another number of GPUs, or the schedule another global batch.
    """
    layout = schedule.layout
    if layout.ranks != machine.gpus:
        raise RecipeError(
            f"trainer.strategy lays {layout.replicas} replicas x {layout.shards} shards = {layout.ranks} ranks, but there are "
            f"{machine.nodes} nodes x {machine.gpus_per_node} GPUs = {machine.gpus}. Make the two products equal."
        )
    if schedule.global_batch_size != workload.global_batch_size:
        raise RecipeError(
            f"{layout.ranks} ranks x {schedule.micro_batch} samples x {schedule.accumulation} micro-batches are "
            f"{schedule.global_batch_size} samples, but data.global_batch_size is {workload.global_batch_size}. Make them equal."
        )
    peak = machine.gpus * machine.gpu.peak_flops
    flops = workload.flops_per_sample * workload.global_batch_size
    again = workload.recomputed_flops * workload.global_batch_size
    compute = {"none": flops, "selective": flops * (1 + SELECTIVE_SHARE), "full": flops + again}[
        layout.activation_checkpointing
    ] / (peak * mfu)
    if not layout.compile_blocks:
        compute *= UNCOMPILED
    exchanged = communication_of(workload, machine, schedule)
    needed = memory_of(workload, machine, schedule)
    overlapped, serial = max(compute, exchanged.seconds), compute + exchanged.seconds
    run_seconds = overlapped * workload.max_steps
    return Estimate(
        schedule=schedule,
        memory=needed,
        communication=exchanged,
        compute_seconds=compute,
        overlapped_seconds=overlapped,
        serial_seconds=serial,
        overlapped_mfu=mfu_of(flops, overlapped, peak),
        serial_mfu=mfu_of(flops, serial, peak),
        tokens_per_second=workload.tokens * workload.global_batch_size / overlapped,
        days=run_seconds / 86400,
        gpu_hours=run_seconds * machine.gpus / 3600,
        bound="memory" if not needed.fits else "communication" if exchanged.seconds > compute else "compute",
    )


def equivalents(
    workload: Workload,
    machine: Machine,
    schedule: Schedule,
    mfu: float = 0.5,
    reduce_dtype: Dtype | None = None,
    options: Collection[str] | None = None,
) -> list[Estimate]:
    """Schedules that fit and compute the same optimizer step as another one, fastest first.

    Micro-batch, accumulation, mesh, checkpointing, compilation, and what is kept whole or deferred do not change what is learned,
    up to rounding. Neither bound of a step's time is ever met, so that the order is that of their mean, with `OPTION_PRICE` on
    every option that is not the plain one. Listed are those that leave `HEADROOM`, or where there are none, all that fit.

    Args:
        workload: What is trained.
        machine: Where.
        schedule: Its number formats are those of all.
        mfu: As in `estimate`.
        reduce_dtype: Number format in which gradients are reduced instead; another one changes what is learned.
        options: Options of the layout that may differ from the schedule's, but for that number format; None: all.
    """
    layout = replace(schedule.layout, reduce_dtype=reduce_dtype or schedule.layout.reduce_dtype)
    found = [
        estimate(workload, machine, candidate, mfu)
        for candidate in _candidates(workload, machine, layout)
        if options is None or differing(candidate.layout, layout) <= {*options}
    ]
    fitting = [one for one in found if one.memory.fits]
    roomy = [one for one in fitting if one.memory.total <= (1 - HEADROOM) * one.memory.usable]
    return sorted(roomy or fitting, key=_rank)


def differing(one: Layout, other: Layout) -> set[str]:
    """Options in which two layouts differ."""
    return {field.name for field in fields(Layout) if getattr(one, field.name) != getattr(other, field.name)}


def _rank(one: Estimate) -> float:
    layout = one.schedule.layout
    options = (
        (layout.replicas > 1)
        + layout.replicate_frozen
        + (not layout.reshard_after_forward)
        + layout.defer_reduce_scatter
        + (layout.activation_checkpointing != "none")
    )
    return (one.overlapped_seconds + one.serial_seconds) / 2 * (1 + OPTION_PRICE * options)


def _candidates(workload: Workload, machine: Machine, layout: Layout) -> list[Schedule]:
    """All schedules of an optimizer step on a machine, in the number formats of a layout."""
    samples, rest = divmod(workload.global_batch_size, machine.gpus)
    if rest:
        return []
    checkpointings: tuple[Checkpointing, ...] = ("none", "selective", "full")
    meshes = [(1, machine.gpus)]
    if machine.nodes > 1 and machine.gpus_per_node > 1:
        meshes.append((machine.nodes, machine.gpus_per_node))
    has_frozen = any(not parameter.trained for unit in workload.units for parameter in unit.parameters)
    found = []
    for (replicas, shards), kept_whole, checkpointing, compiled, reshard, deferred, accumulation in product(
        meshes, (False, True), checkpointings, (True, False), (True, False), (False, True), range(1, samples + 1)
    ):
        if samples % accumulation or (kept_whole and not has_frozen):
            continue
        changed = replace(
            layout,
            replicas=replicas,
            shards=shards,
            replicate_frozen=kept_whole,
            activation_checkpointing=checkpointing,
            compile_blocks=compiled,
            reshard_after_forward=reshard,
            defer_reduce_scatter=deferred,
        )
        if refusal(changed, accumulation) is None:
            found.append(Schedule(changed, samples // accumulation, accumulation))
    return found
