"""The processes that the tests of a file share: to start them takes longer than most tests.

They end with the file, since every process group that a test leaves behind has threads that go on looking for messages. To end
the groups alone would not do: what DTensor remembers of operators names groups, and names are given again.
"""

from collections.abc import Iterator

import pytest
from pair import Processes


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes, started by the first test that runs something on them."""
    yield from _shared(2)


@pytest.fixture(scope="module")
def quartet() -> Iterator[Processes]:
    """Four of them."""
    yield from _shared(4)


def _shared(number: int) -> Iterator[Processes]:
    processes = Processes(number)
    yield processes
    processes.close()
