"""How long the collectives of a run may take: long while one rank may have to wait for another, short in between."""

from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d


def longest_timeout(strategy: Any) -> timedelta:
    """What a trainer's strategy allows a collective (its `timeout_minutes`)."""
    return getattr(strategy, "_timeout", None) or distributed_c10d.default_pg_timeout


def set_collective_timeout(timeout: timedelta) -> None:
    """Let every collective that begins from now on take so long at most, in all groups of this process."""
    if not torch.distributed.is_initialized():
        return
    # torch 2.14 gave the function a public name
    set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timeout, group)
