"""What a recipe will cost before it runs: memory, communication, time, and the schedules that do the same work."""

from components.plan.communication import Collective, Communication, collectives, communication_of
from components.plan.estimates import Estimate, equivalents, estimate
from components.plan.machine import GPUS, Gpu, Machine
from components.plan.memory import Memory, memory_of
from components.plan.schedule import Schedule
from components.plan.workload import Blocks, Parameter, Part, Unit, Workload, workload_of

__all__ = [
    "GPUS",
    "Blocks",
    "Collective",
    "Communication",
    "Estimate",
    "Gpu",
    "Machine",
    "Memory",
    "Parameter",
    "Part",
    "Schedule",
    "Unit",
    "Workload",
    "collectives",
    "communication_of",
    "equivalents",
    "estimate",
    "memory_of",
    "workload_of",
]
