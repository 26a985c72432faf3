"""The benchmark of starts, very small: what it runs says what it must, and its table has a row for each command."""

from pathlib import Path

import pytest

from tests.benchmarks import start


def test_a_row_for_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "IMPORT", "import yaml")  # that of Lightning alone takes longer than a test should
    tables = start.main(["--repeats", "1", "--only", "missing recipe", "not YAML", "--before", str(start.ROOT)])
    head, _, *rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[1:5]] == ["command", "wall s now", "processor s now", "x bare import now"]
    assert [row.split("|")[1].strip() for row in rows] == ["bare import", "missing recipe", "not YAML"]
    assert all(len(row.split("|")) == 9 for row in rows)


def test_what_does_not_say_what_it_must_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(start.COMMANDS, "--help", (["--help"], 0, "no such words"))
    with pytest.raises(SystemExit, match="did not say 'no such words'"):
        start.run("--help", start.ROOT)
    monkeypatch.setitem(start.COMMANDS, "--help", (["--help"], 2, ""))
    with pytest.raises(SystemExit, match="ended with 0, not 2"):
        start.run("--help", start.ROOT)
