"""The start of a large sharded run holds this rank's part of the weights, and little else."""

import re
from pathlib import Path

import pytest
import torch
from pair import Processes
from starts import model_of, started
from training_runs import hybrid

from components.named_tensors import TensorInfo
from components.safetensors_writer import write_safetensors

GIB = 2**30
CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 19,
    "num_attention_heads": 16,
}  # fmt: skip


def write_decoder(folder, dtype):
    """Random weights in files of at most 1 GiB; how many bytes they have in float32."""
    decoder = model_of(CONFIG).decoder
    with torch.device("meta"):
        decoder.build()
    infos = {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in decoder.lm.state_dict().items()}
    folder.mkdir()
    write_safetensors(folder, infos, lambda name: [torch.randn(infos[name].shape) * 0.02], shard_bytes=GIB)
    decoder.lm.config.save_pretrained(folder)
    return sum(4 * tensor.numel() for tensor in decoder.parameters())


def resident(kind):
    """Memory of this process in bytes: VmRSS is what it has now, VmHWM the most that it has had; mapped files count."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def imported():
    """Nothing, but that the modules have been imported."""


def peak_of_a_start(arguments):
    """The most memory above what this process had before, and the bytes of its part of the parameters."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    assert resident("VmHWM") < before + GIB / 8
    model = started(hybrid(1, 2), arguments)
    return resident("VmHWM") - before, sum(parameter.to_local().nbytes for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_of_4_gib_on_two_ranks(dtype, tmp_path):
    size = write_decoder(tmp_path / "decoder", dtype)
    assert size >= 4 * GIB
    processes = Processes(2)
    try:
        processes.run(imported)
        results = processes.run(peak_of_a_start, {"config": CONFIG, "weights": str(tmp_path / "decoder")}, seconds=400)
    finally:
        processes.close()
    for peak, shard in results:
        print(f"{dtype} files: peak {peak / GIB:.2f} GiB for a shard of {shard / GIB:.2f} GiB")
        assert 0.49 * size < shard < peak < 1.3 * shard + GIB
