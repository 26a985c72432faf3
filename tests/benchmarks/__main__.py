"""Runs one benchmark: `python -m tests.benchmarks NAME [options]`; each is a module here with a `main(arguments)`."""

import importlib
import pkgutil
import sys
from pathlib import Path

from tests.benchmarks import heading


def main(arguments: list[str]) -> None:
    names = sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if not found.name.startswith("_"))
    if not arguments or arguments[0] not in names:
        sys.exit(f"python -m tests.benchmarks NAME [options], NAME one of: {', '.join(names)}")
    print(heading(arguments[0]), flush=True)
    importlib.import_module(f"tests.benchmarks.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
