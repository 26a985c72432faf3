"""The two processes that the tests of this folder share: to start them takes longer than most tests."""

from collections.abc import Iterator

import pytest
from pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()
