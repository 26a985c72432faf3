"""The processes that the tests of this folder share: to start them takes longer than most tests."""

from collections.abc import Iterator

import pytest
from pair import Processes


@pytest.fixture(scope="session")
def pair() -> Iterator[Processes]:
    """Two processes, started by the first test that runs something on them."""
    yield from _shared(2)


@pytest.fixture(scope="session")
def quartet() -> Iterator[Processes]:
    """Four of them."""
    yield from _shared(4)


def _shared(number: int) -> Iterator[Processes]:
    processes = Processes(number)
    yield processes
    processes.close()
