"""Memory for a model that was built on the meta device, and the proof that every number in it has been filled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.errors import RecipeError
from components.named_tensors import listed


@torch.no_grad()
def give_memory(model: nn.Module, device: torch.device) -> None:
    """Give memory to what is on the meta device, of sharded parameters this rank's part; it is NaN until it is filled.

    Args:
        model: The model. Tensors that stand in several places, such as tied embeddings, go on being one.
        device: Where parameters lie. Buffers lie on the CPU, so that they are computed as a run on one process does.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            memory = torch.empty_like(tensor, device=device if isinstance(tensor, nn.Parameter) else "cpu")
            if memory.is_floating_point():
                _here(memory).fill_(torch.nan)
            # in place, since optimizers, FSDP2 and other modules hold the tensor itself
            swapped = nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory
            torch.utils.swap_tensors(tensor, swapped)


def demand_finite(model: nn.Module) -> None:
    """Every number of this rank is finite, and there is memory for all of them.

    Raises:
        RecipeError: With the names of the tensors that are not so.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if bad := [name for name, tensor in named if not _is_finite(tensor.detach())]:
        raise RecipeError(
            f"After the weights were read, these hold NaN or infinite numbers, or nothing at all:\n  {listed(bad)}\n"
            "The file that they come from is damaged, or was written by a run that had diverged. Name another one."
        )


@contextmanager
def agreed(ranks: int) -> Iterator[list[str]]:
    """What fails on one rank fails on all, so that none waits for one that has ended.

    Args:
        ranks: Ranks that do the same, >= 1.

    Yields:
        A list for what must be equal on all ranks, such as the checkpoint that each has found.

    Raises:
        RecipeError: Another rank failed, or has put something else into the list.
    """
    facts: list[str] = []
    failure = None
    try:
        yield facts
    except Exception as error:
        failure = error
    if ranks > 1:
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, (facts, None if failure is None else str(failure) or type(failure).__name__))
        problems = [f"Rank {rank}: {problem}" for rank, (_, problem) in enumerate(told) if problem]
        others = [
            f"Rank {rank} read {theirs}, rank 0 {told[0][0]}" for rank, (theirs, _) in enumerate(told) if theirs != told[0][0]
        ]
        if failure is None and problems:
            failure = RecipeError(problems[0])
        elif failure is None and others:
            failure = RecipeError(f"{others[0]}. Is the run that writes them still training? Name one of its checkpoints.")
    if failure is not None:
        raise failure


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return False
    here = _here(tensor)
    if not here.is_floating_point() or not here.numel():
        return True
    low, high = here.aminmax()  # both are NaN if any number is, and no copy is made
    return bool(low.isfinite() & high.isfinite())
