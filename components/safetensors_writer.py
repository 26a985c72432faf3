"""Safetensors files written tensor by tensor: memory holds one tensor, whatever the size of the file.

Source: the format's own description (github.com/huggingface/safetensors, README): eight bytes of header length, a JSON header, then
the tensors' bytes end to end.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from components.named_tensors import TensorInfo

CHUNK = 16 * 2**20
"""Numbers that are converted at a time."""

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


Read = Callable[[str], Iterable[Tensor]]
"""A name in, the pieces of the tensor out, which lie end to end."""


def write_safetensors(folder: Path, tensors: dict[str, TensorInfo], read: Read, shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    """Tensors in, `model.safetensors` out, or several shards of it and their index.

    Args:
        folder: Where the files are written.
        tensors: Names, shapes and number formats to be written, in order; float32, float16 or bfloat16.
        read: Gives the pieces of a tensor, in any number format, by its name; called once for each.
        shard_bytes: Most bytes of a file, > 0; a larger tensor has a file of its own.

    Returns:
        The SHA-256 of every file, by its name.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + _bytes(info) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += _bytes(info)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {file: _write(folder / file, shard, read) for file, shard in zip(files, shards, strict=True)}


def _write(file: Path, tensors: dict[str, TensorInfo], read: Read) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        start, end = end, end + _bytes(info)
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for start_of_file in (len(text).to_bytes(8, "little"), text):
            digest.update(start_of_file)
            out.write(start_of_file)
        for name, info in tensors.items():
            left = torch.Size(info.shape).numel()
            for piece in read(name):
                left -= piece.numel()
                for part in piece.reshape(-1).split(CHUNK):
                    data = part.to(info.dtype).contiguous().view(torch.uint8).numpy().data
                    digest.update(data)
                    out.write(data)
            if left:
                raise ValueError(f"{name} was announced with the shape {info.shape}, and {-left} numbers more came.")
    return digest.hexdigest()


def _bytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize
