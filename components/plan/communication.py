"""Communication: the collectives of an optimizer step, counted exactly, and the time they take on a machine.

The counts are those of FSDP2 as `components.sharding` uses it. The time is a lower bound: all data of a collective must enter every
GPU through NVLink and every node through its network, and the two overlap; nobody else uses either.

Source: the ring algorithms of NCCL, without their protocols.

Left out: the reductions of a few numbers (loss, count of targets, norm of the gradients).
"""

from dataclasses import dataclass
from typing import Literal

from components.plan.machine import Machine
from components.plan.schedule import Schedule
from components.plan.workload import Unit, Workload
from components.sharding.layout import Dtype, Layout

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of a number in a format."""

LATENCY = 20e-6
"""Start of a collective inside a node, in s; one that leaves the node takes it twice."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in an optimizer step, as one rank sees them.

    Args:
        calls: How many there are.
        bytes: Sum over the calls of the unsharded side: what an all-gather makes, and a reduce-scatter or all-reduce takes.
    """

    calls: int
    bytes: int


@dataclass(frozen=True)
class Communication:
    """The collectives of an optimizer step.

    Args:
        collectives: Calls and bytes of each kind.
        seconds_by_kind: Time of each kind, one call after another.
    """

    collectives: dict[Kind, Collective]
    seconds_by_kind: dict[Kind, float]

    @property
    def seconds(self) -> float:
        """Time of all collectives, one after another."""
        return sum(self.seconds_by_kind.values())


def communication_of(workload: Workload, machine: Machine, schedule: Schedule) -> Communication:
    """What the ranks of a schedule exchange in an optimizer step, and how long it takes them."""
    found = collectives(workload, schedule)
    layout = schedule.layout
    seconds = {
        kind: (_replica_seconds if kind == "all_reduce" else _shard_seconds)(collective, machine, layout)
        for kind, collective in found.items()
    }
    return Communication(found, seconds)


def collectives(workload: Workload, schedule: Schedule) -> dict[Kind, Collective]:
    """The collectives of an optimizer step.

    Every micro-batch gathers every unit for its forward pass, and for its backward pass those that gradients flow through and that
    were not kept. It reduces the gradients of every unit that trains among the shards, or only the last micro-batch does so; among
    the replicas only the last one does.
    """
    layout, shards = schedule.layout, schedule.layout.shards
    units = sent_units(workload, layout)
    again = [unit for unit in units if unit.gradients_flow and layout.reshard_after_forward and not unit.is_root]
    gathered = [unit.padded(shards) for unit in [*units, *again]]
    reduced = [size for unit in units if (size := unit.padded_trained(shards))]
    return {
        "all_gather": _times(schedule.accumulation if shards > 1 else 0, gathered, layout.param_dtype),
        "reduce_scatter": _times(schedule.reductions if shards > 1 else 0, reduced, layout.reduce_dtype),
        "all_reduce": _times(1 if layout.replicas > 1 else 0, [size // shards for size in reduced], layout.reduce_dtype),
    }


def sent_units(workload: Workload, layout: Layout) -> list[Unit]:
    """The units that are sharded, without the parameters that every rank holds whole."""
    units = [unit.trained if layout.replicate_frozen else unit for unit in workload.units]
    return [unit for unit in units if unit.parameters]


def _times(number: int, sizes: list[int], dtype: Dtype) -> Collective:
    return Collective(number * len(sizes), number * sum(sizes) * BYTES[dtype])


def _shard_seconds(collective: Collective, machine: Machine, layout: Layout) -> float:
    """Time of collectives among the shards of a copy, which are neighbors."""
    ranks, nodes = layout.shards, _nodes(layout.shards, machine)
    inside = collective.bytes * (ranks - 1) / ranks / machine.gpu.nvlink
    between = collective.bytes * (nodes - 1) / nodes / machine.network
    return max(inside, between) + collective.calls * LATENCY * (2 if nodes > 1 else 1)


def _replica_seconds(collective: Collective, machine: Machine, layout: Layout) -> float:
    """Time of all-reduces among the ranks that hold the same shard; those of a node share its network."""
    ranks, nodes = layout.replicas, _nodes(layout.ranks, machine) // _nodes(layout.shards, machine)
    inside = 2 * collective.bytes * (ranks - 1) / ranks / machine.gpu.nvlink if nodes < ranks else 0.0
    neighbors = min(layout.shards, machine.gpus_per_node)
    between = neighbors * 2 * collective.bytes * (nodes - 1) / nodes / machine.network
    return max(inside, between) + collective.calls * LATENCY * (2 if nodes > 1 else 1)


def _nodes(ranks: int, machine: Machine) -> int:
    """Nodes that neighboring ranks lie on."""
    return -(-ranks // machine.gpus_per_node)
