"""The processes that the tests share: to start them, and to run anything on them for the first time, takes longer than most tests.

Their process groups end with each file, since every group that a test leaves behind has threads that go on looking for messages.
"""

from collections.abc import Iterator

import pytest
from pair import Processes


@pytest.fixture(scope="module")
def pair(_pair: Processes) -> Iterator[Processes]:
    """Two processes, started by the first test that runs something on them."""
    yield _pair
    _pair.leave_groups()


@pytest.fixture(scope="module")
def quartet(_quartet: Processes) -> Iterator[Processes]:
    """Four of them."""
    yield _quartet
    _quartet.leave_groups()


@pytest.fixture(scope="session")
def _pair() -> Iterator[Processes]:
    yield from _shared(2)


@pytest.fixture(scope="session")
def _quartet() -> Iterator[Processes]:
    yield from _shared(4)


def _shared(number: int) -> Iterator[Processes]:
    processes = Processes(number)
    yield processes
    processes.close()
