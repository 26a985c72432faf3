"""Random numbers by address: what a run draws for one purpose does not depend on what it draws for others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_at(*address: int) -> int:
    """The seed of an address in this run."""
    run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by seed_everything
    return int(np.random.SeedSequence([run_seed, *address]).generate_state(1)[0])


@contextmanager
def random_stream(purpose: str) -> Iterator[None]:
    """What is drawn inside, on the CPU, depends on the run's seed and the purpose alone; what is drawn later is as without it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_at(*purpose.encode()))
        yield
