"""Runs one benchmark: `python -m tests.benchmarks NAME [options]`; each is a module here with a `main(arguments)`.

What `main` returns is printed; with `--readme` it also takes the place of the benchmark's last tables in README.md.
"""

import importlib
import sys
from pathlib import Path

from tests.benchmarks import heading, publish

README_FLAG = "--readme"


def main(arguments: list[str]) -> None:
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py") if "\ndef main(" in file.read_text())
    if not arguments or arguments[0] not in names:
        sys.exit(f"python -m tests.benchmarks NAME [{README_FLAG}] [options], NAME one of: {', '.join(names)}")
    name, *options = arguments
    first_line = heading(name)
    print(first_line, flush=True)
    tables = importlib.import_module(f"tests.benchmarks.{name}").main([option for option in options if option != README_FLAG])
    if tables is not None:
        print(tables)
    if README_FLAG in options:
        if tables is None:
            sys.exit(f"{name} prints as it goes and returns no tables for the README.")
        publish(name, f"{first_line.removeprefix('# ')}\n{tables}")


if __name__ == "__main__":
    main(sys.argv[1:])
