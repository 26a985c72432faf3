"""What a recipe will cost before it runs: memory, communication, time, and the schedules that do the same work."""

from components.plan.communication import Collective, Communication
from components.plan.machine import GPUS, Gpu, Machine
from components.plan.memory import Memory
from components.plan.schedule import Estimate, Schedule
from components.plan.workload import Blocks, Parameter, Part, Workload

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
    "Workload",
]
