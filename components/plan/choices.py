"""Choices: which of the schedules that compute the same optimizer step to recommend, and the lines of an overlay that give them."""

from dataclasses import asdict, dataclass
from typing import Any

import yaml

from components.plan.estimates import Estimate, differing, equivalents, estimate
from components.plan.machine import Machine
from components.plan.schedule import Schedule
from components.plan.workload import Workload

NEAR = 1.05
"""Schedules whose times differ by less than this are alike, as far as a plan can tell."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "HybridSharding": (
        "replicas",
        "shards",
        "reshard_after_forward",
        "defer_reduce_scatter",
        "activation_checkpointing",
        "compile_blocks",
        "replicate_frozen",
    ),
    "FullyShardedV1": ("replicas", "shards", "activation_checkpointing"),
}
"""What of a layout each strategy lets a recipe choose without changing what is learned; nothing where a strategy is not named."""


@dataclass(frozen=True)
class Choice:
    """A schedule that is faster than the recipe's.

    Args:
        why: What it is the fastest of.
        estimate: What it costs.
        overlay: The lines of an overlay that give it.
        gain: How many times faster than the recipe's.
    """

    why: str
    estimate: Estimate
    overlay: str
    gain: float


def choices_of(workload: Workload, machine: Machine, now: Estimate, mfu: float, strategy: str) -> tuple[Choice, ...]:
    """Faster schedules for the same optimizer step, the recommended one first; none where the recipe's fits and is as fast.

    Args:
        workload: What is trained.
        machine: Where.
        now: The recipe's schedule.
        mfu: As in `estimate`.
        strategy: Name of the recipe's strategy class.
    """
    options = OPTIONS.get(strategy, ())
    if options:
        others = equivalents(workload, machine, now.schedule, mfu, options=options)
    else:
        others = _same_layout(workload, machine, now.schedule, mfu)
    found: list[Choice] = []

    def offer(why: str, candidates: list[Estimate]) -> None:
        if candidates and (not now.memory.fits or _seconds(now) > NEAR * _seconds(candidates[0])):
            found.append(Choice(why, candidates[0], _overlay(candidates[0], now), _seconds(now) / _seconds(candidates[0])))

    offer("the fastest that fits", others)
    if not others or not options:
        return tuple(found)
    first = others[0]
    mesh = first.schedule.layout.replicas
    other_mesh = [one for one in others if one.schedule.layout.replicas != mesh]
    offer("sharded inside each node" if mesh == 1 else "sharded over all GPUs", other_mesh)
    if first.bound == "communication" and now.schedule.layout.reduce_dtype == "float32":
        rounded = equivalents(workload, machine, now.schedule, mfu, reduce_dtype="bfloat16", options=options)
        if rounded and _seconds(first) > NEAR * _seconds(rounded[0]):
            offer("gradients rounded to bf16 on their way, which is not the same step", rounded)
    return tuple(found)


def _seconds(one: Estimate) -> float:
    """An optimizer step, between its bounds."""
    return (one.overlapped_seconds + one.serial_seconds) / 2


def _same_layout(workload: Workload, machine: Machine, schedule: Schedule, mfu: float) -> list[Estimate]:
    """Other micro-batches of a strategy that has no options, those that fit, fastest first."""
    samples = schedule.micro_batch * schedule.accumulation
    found = [
        estimate(workload, machine, Schedule(schedule.layout, samples // accumulation, accumulation), mfu)
        for accumulation in range(1, samples + 1)
        if samples % accumulation == 0
    ]
    return sorted((one for one in found if one.memory.fits), key=_seconds)


def _overlay(one: Estimate, now: Estimate) -> str:
    layout, different = asdict(one.schedule.layout), differing(one.schedule.layout, now.schedule.layout)
    changed: dict[str, Any] = {}
    if one.schedule.accumulation != now.schedule.accumulation:
        changed["accumulate_grad_batches"] = one.schedule.accumulation
    if options := {key: value for key, value in layout.items() if key in different}:
        changed["strategy"] = {"init_args": options}
    return yaml.safe_dump({"trainer": changed}, default_flow_style=True, sort_keys=False, width=float("inf")).strip()[1:-1]
