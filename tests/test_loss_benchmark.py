"""The benchmark of the loss compares before it times, and says what it measured."""

import pytest
import torch

from components import loss
from tests.benchmarks.loss import COLUMNS, GIB, PLAIN, Peak, main, methods

SMALL = ["--positions", "30", "--widths", "16", "--vocabularies", "500", "--rounds", "2"]


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_row_for_every_way():
    header, _, *rows = cells(main([*SMALL, "--most-logits", "4000"]))
    assert header == COLUMNS
    ways = methods(torch.device("cpu"))
    assert [row[3] for row in rows] == [*ways]
    assert {"all at once", "ours", "gradients in forward"} <= ways.keys()
    assert {float(row[-1]) < 1e-5 for row in rows} == {True}
    pieces = {row[3]: row[4] for row in rows}
    assert (pieces[PLAIN], pieces["ours"]) == ("", "4")
    assert loss.MOST_LOGITS == 2**27


def test_what_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr("tests.benchmarks.loss.cross_entropy_sum", lambda head, hidden, targets, width: head(hidden).sum())
    with pytest.raises(SystemExit, match="ours differs from all at once by .*; nothing is timed"):
        main(SMALL)


def test_peak_is_of_what_is_there_at_once():
    with Peak() as peak:
        one = torch.zeros(1000)
        del one
        two = torch.ones(500) + torch.ones(500)
        two.add_(1).view(5, 100)
    assert peak.bytes == 3 * 500 * 4
    assert GIB == 2**30
