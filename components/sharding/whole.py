"""What is asked of all of a tensor, of which a rank may hold a shard.

FSDP2's shards are DTensors, which know the whole. FSDP1's are pieces of a line: `FullyShardedV1` notes at each parameter what it is
a piece of.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def note(parameter: nn.Parameter, shape: torch.Size, group: ProcessGroup) -> None:
    """Note at a parameter of which shape it is a piece, and which ranks have the other pieces."""
    parameter.whole_shape, parameter.shard_group = shape, group  # type: ignore[attr-defined]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that may be sharded."""
    return getattr(parameter, "whole_shape", parameter.shape)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The norm of all gradients of a model, the same on every rank. Called on all ranks.

    Args:
        parameters: All of the model, whole or sharded, with a gradient on this rank or without.
    """
    everything = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in everything if parameter.grad is not None])
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    group = getattr(everything[0], "shard_group", None)
    if group is None:
        return norm
    square = norm.to(everything[0].device).square()  # the zero of a rank without gradients is on the CPU
    torch.distributed.all_reduce(square, group=group)
    return square.sqrt()
