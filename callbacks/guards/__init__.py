"""Guards: a run that is told to end saves, and one that hangs, diverges or goes in circles is stopped and says so."""

from callbacks.guards.callback import Guards
from callbacks.guards.hang_minutes import HangMinutes

__all__ = ["Guards", "HangMinutes"]
