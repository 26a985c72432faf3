"""GPUs that runs are planned for and measured against.

Source: data sheets of the GPUs for peaks, links and watts; memory as the CUDA driver reports it to PyTorch.
"""

from dataclasses import dataclass

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""Dense bf16 peak of a device by a word of its name, in TFLOP/s."""


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Args:
        name: As the command line spells it.
        memory_gib: Memory that a process can use, in GiB.
        peak_flops: Dense bf16 peak, in FLOP/s.
        nvlink: Rate at which one GPU takes part in a collective inside its node, in bytes/s: a third of the sum of both directions
            that the data sheet states, which is what ring collectives reach.
        watts: Power under load, in W.
    """

    name: str
    memory_gib: float
    peak_flops: float
    nvlink: float
    watts: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 39.4, PEAK_TFLOPS["A100"] * 1e12, 200e9, 400.0),
        Gpu("a100-80gb", 79.1, PEAK_TFLOPS["A100"] * 1e12, 200e9, 400.0),
        Gpu("h100-80gb", 79.1, PEAK_TFLOPS["H100"] * 1e12, 300e9, 700.0),
        Gpu("h200-141gb", 139.7, PEAK_TFLOPS["H200"] * 1e12, 300e9, 700.0),
    )
}
"""GPUs by the names of the command line."""

GPU = "a100-80gb"
"""What is planned for where a recipe trains on GPUs and nobody says on which."""
