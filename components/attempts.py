"""Attempts at what may fail for a moment: files on networks.

Source: exponential back-off with jitter, as AWS advises its clients.
"""

import random
import time
from collections.abc import Iterator

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each new attempt."""


def attempts(waits: tuple[float, ...] = WAITS) -> Iterator[bool]:
    """Whether each attempt is the last, with a pause before every new one.

    Args:
        waits: Seconds before each new attempt, which are varied by half so that ranks do not come back all at once.
    """
    for wait in waits:
        yield False
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1.5))  # the run's own random numbers are not touched
    yield True
