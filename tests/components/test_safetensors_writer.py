"""Our safetensors files, read by the safetensors library."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from components import safetensors_writer
from components.named_tensors import TensorInfo, weights_in
from components.safetensors_writer import write_safetensors

SHAPES = {"matrix": (7, 5), "vector": (3,), "number": (), "cube": (2, 3, 4), "nothing": (0, 4)}


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_what_was_written(dtype, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "CHUNK", 4)
    given = tensors(dtype)
    infos = {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in given.items()}
    sums = write_safetensors(tmp_path, infos, lambda name: [given[name]], shard_bytes)
    found = {name: tensor for file in sums for name, tensor in load_file(tmp_path / file).items()}
    assert found.keys() == given.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], tensor) for name, tensor in given.items())
    assert sums == {file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in sums}
    if len(sums) == 1:
        assert list(sums) == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(given) and set(index["weight_map"].values()) == set(sums)
        assert all((tmp_path / file).stat().st_size <= 1000 for file in sums)
    read = weights_in(tmp_path)
    assert torch.equal(read.read("matrix"), given["matrix"])


def test_numbers_are_converted_and_pieces_joined(tmp_path):
    whole = torch.randn(6, 3, dtype=torch.float64)
    write_safetensors(tmp_path, {"x": TensorInfo((6, 3), torch.bfloat16)}, lambda name: iter([whole[:4], whole[4:].float()]))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], whole.float().to(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_values_than_announced(rows, tmp_path):
    with pytest.raises(ValueError, match="announced with the shape"):
        write_safetensors(tmp_path, {"x": TensorInfo((2, 3), torch.float32)}, lambda name: [torch.zeros(rows, 3)])
