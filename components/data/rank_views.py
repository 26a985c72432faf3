"""What every rank sees of the data, compared: ranks that would deal differently lose and repeat samples without a word."""

from typing import Any

import torch.distributed as distributed

from components.errors import RecipeError


def check_ranks_agree(problem: str | None, view: dict[str, Any]) -> None:
    """The same data on all ranks, or the same error on all of them. All ranks call it.

    Args:
        problem: Why this rank cannot open its data, or None.
        view: What this rank sees, by what it is; empty where there is a problem.

    Raises:
        RecipeError: A rank has a problem, or sees other data than the first.
    """
    views: list[Any] = [(problem, view)]
    if distributed.is_available() and distributed.is_initialized():
        views = [None] * distributed.get_world_size()
        distributed.all_gather_object(views, (problem, view))
    for rank, (of_rank, _) in enumerate(views):
        if of_rank is not None:
            raise RecipeError(f"On rank {rank}: {of_rank}" if rank else of_rank)
    first = views[0][1]
    for rank, (_, theirs) in enumerate(views):
        if different := [f"  {key}: {first.get(key)} -> {theirs.get(key)}" for key in first if first.get(key) != theirs.get(key)]:
            raise RecipeError(
                f"Rank {rank} sees other data than rank 0, and would train other samples:\n"
                + "\n".join(different)
                + "\nGive all nodes the same files. Measured lengths of annotation files are kept in XDG_CACHE_HOME (~/.cache): "
                "put it on a disk that all nodes share."
            )
