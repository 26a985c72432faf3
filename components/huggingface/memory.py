"""How much memory this process has held at most."""

import resource
import sys


def peak_mib() -> float:
    """The peak so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
