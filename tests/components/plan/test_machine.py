"""Machines from the words of a command line."""

import pytest

from components.errors import RecipeError
from components.flops import peak_flops
from components.plan import GPUS, Machine


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200Gb/s", 25e9), ("1.6Tb/s", 200e9), ("1.6 Tb/s", 200e9), ("400Gbps", 50e9), ("25GB/s", 25e9), (" 0.2Tb/s ", 25e9)],
)
def test_interconnects(text, expected):
    assert Machine.of(16, 8, "a100-80gb", text).interconnect == expected


@pytest.mark.parametrize("text", ["fast", "", "200", "200G", "200 gb/s", "-1Tb/s", "0Gb/s", "1.6.1Tb/s", "200Gb/sec"])
def test_what_is_no_interconnect(text):
    with pytest.raises(RecipeError, match="such as 200Gb/s or 1.6Tb/s"):
        Machine.of(16, 8, "a100-80gb", text)


def test_gpus():
    assert Machine.of(2, 4, "h200-141gb", "1.6Tb/s").gpus == 8
    for name, gpu in GPUS.items():
        model, size = name.split("-")
        assert gpu.peak_flops == peak_flops(f"NVIDIA {model.upper()}")
        # a GPU's GB are of 10^9 bytes, except that NVIDIA's 40 and 80 are GiB, and the driver keeps a little
        assert 0.9 * int(size.removesuffix("gb")) < gpu.memory_gib < int(size.removesuffix("gb"))


def test_unknown_gpu():
    with pytest.raises(RecipeError, match="'b300' is not known. State one of a100-40gb"):
        Machine.of(1, 8, "b300", "1.6Tb/s")


@pytest.mark.parametrize(("nodes", "gpus"), [(0, 8), (1, 0), (-1, 8)])
def test_no_machine(nodes, gpus):
    with pytest.raises(RecipeError, match="State at least 1"):
        Machine.of(nodes, gpus, "a100-80gb", "1.6Tb/s")
