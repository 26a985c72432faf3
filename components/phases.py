"""Which phase of a run this process is in, and since when: the watchdog of the run looks here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["start", "step", "validation", "checkpoint", "end"]

_now: tuple[Phase, float] = ("start", time.monotonic())
_listener: Callable[[Phase], None] | None = None


def current() -> tuple[Phase, float]:
    """The phase, and the seconds since it began or last got on."""
    name, since = _now
    return name, time.monotonic() - since


def enter(name: Phase) -> None:
    """A phase begins."""
    global _now
    _now = (name, time.monotonic())
    if _listener is not None:
        _listener(name)


def get_on() -> None:
    """The phase has made progress: its time counts from now."""
    global _now
    _now = (_now[0], time.monotonic())


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """A phase inside another one, whose time counts anew afterwards."""
    outer = _now[0]
    enter(name)
    try:
        yield
    finally:
        enter(outer)


def listen(listener: Callable[[Phase], None] | None) -> None:
    """Call this whenever a phase begins; None: nothing."""
    global _listener
    _listener = listener
