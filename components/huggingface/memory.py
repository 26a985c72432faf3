"""How much memory this process has held at most."""

import re
import resource
import sys
from pathlib import Path


def peak_mib() -> float:
    """The peak so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage counts the process that started this one as well
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
