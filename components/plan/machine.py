"""Machine: the computers a run is planned for."""

import re
from dataclasses import dataclass

from components.errors import RecipeError
from components.gpus import GPUS, Gpu

GIB = 2**30
NETWORK_EFFICIENCY = 0.85
"""Share of an interconnect's nominal rate that collectives reach."""


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal GPUs.

    Args:
        nodes: Computers, >= 1.
        gpus_per_node: GPUs of each, >= 1.
        gpu: Their model.
        interconnect: Nominal rate between the nodes, of each node, in bytes/s.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    interconnect: float

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise RecipeError(f"{self.nodes} nodes of {self.gpus_per_node} GPUs are no machine. State at least 1 of each.")

    @classmethod
    def of(cls, nodes: int, gpus_per_node: int, gpu: str, interconnect: str) -> "Machine":
        """The machine that the words of a command line describe.

        Args:
            nodes: Computers, >= 1.
            gpus_per_node: GPUs of each, >= 1.
            gpu: a100-40gb, a100-80gb, h100-80gb or h200-141gb.
            interconnect: Rate between the nodes, of each node, such as 200Gb/s or 1.6Tb/s (bits), or 25GB/s (bytes).

        Raises:
            RecipeError: A word is not understood.
        """
        if gpu not in GPUS:
            raise RecipeError(f"The GPU '{gpu}' is not known. State one of {', '.join(GPUS)}.")
        return cls(nodes, gpus_per_node, GPUS[gpu], bytes_per_second(interconnect))

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def network(self) -> float:
        """Rate that collectives between nodes reach, of each node, in bytes/s."""
        return NETWORK_EFFICIENCY * self.interconnect


def bytes_per_second(text: str) -> float:
    """`200Gb/s`, `1.6Tb/s` (bits) or `25GB/s` (bytes) in, bytes/s out.

    Raises:
        RecipeError: The text is no rate.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GT])([bB])(?:/s|ps)", text.strip())
    if match is None or not float(match[1]):
        raise RecipeError(
            f"The interconnect '{text}' is no rate. State that of one node, such as 200Gb/s or 1.6Tb/s (bits), or 25GB/s (bytes)."
        )
    number, scale, unit = match.groups()
    return float(number) * {"G": 1e9, "T": 1e12}[scale] / (8 if unit == "b" else 1)
