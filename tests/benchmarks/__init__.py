"""Benchmarks: `python -m tests.benchmarks NAME` prints figures, and with `--readme` writes them there. No test asserts a time."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
CLOSING = "<!-- end of benchmark -->"


def heading(name: str) -> str:
    """When, on what and of which commit figures are."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    # the variable is for copies of the files without their history
    commit = os.environ.get("GIT_COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no git"
    load = os.getloadavg()[0]
    return (
        f"# {name}: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} x {processor}, load {load:.1f}, "
        f"Python {platform.python_version()}, commit {commit}"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three digits after the point."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"\n{title}", "", *lines])


def publish(name: str, text: str, readme: Path = README) -> None:
    """Put the tables of a benchmark into the README, between its two comments.

    Args:
        name: Of the benchmark.
        text: Heading and tables, as printed.
        readme: Where.
    """
    before, mark, rest = readme.read_text().partition(opening := f"<!-- benchmark: {name} -->\n")
    old, end, after = rest.partition(CLOSING)
    if not mark or not end or "<!-- benchmark" in old:
        raise SystemExit(f"{readme} has no place for this table: a line {opening.strip()} and below it a line {CLOSING}")
    readme.write_text(f"{before}{mark}{text.strip()}\n{end}{after}")


def private_megabytes() -> float:
    """Memory that this process alone has written, in MB: USS without pages of libraries, which depend on who else runs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / 1e6
