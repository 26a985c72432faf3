"""The benchmark of answers compares them before it times, and says what it measured."""

from pathlib import Path

import pytest

from tests.benchmarks import answers

SMALL = ["--scenes", "2", "--rounds", "1", "--only"]


def test_all_answer_the_same_and_are_in_the_table():
    title, _, columns, _, row = answers.main([*SMALL, "quickstart"]).strip().splitlines()
    assert "processor time of one thread, float32" in title
    assert [column.strip() for column in columns.split("|")[5:-1]] == [
        "ours", "transformers, batches", "transformers, one at a time", "ours over batches", "ours over one at a time"
    ]  # fmt: skip
    name, number, batch, lengths, *figures = (cell.strip() for cell in row.split("|")[1:-1])
    assert (name, number, batch) == ("quickstart", "10", "64")
    assert lengths.endswith("(3)")
    assert all(float(figure.split()[0].replace(",", "")) > 0 for figure in figures)


def test_nothing_is_timed_when_answers_differ(monkeypatch):
    told = answers.Peer.answers
    monkeypatch.setattr(answers.Peer, "answers", lambda self: {name: [*ids, 5] for name, ids in told(self).items()})
    with pytest.raises(SystemExit, match=r"10 of 10 answers differ between ours and transformers, batches, .* Nothing is timed"):
        answers.main([*SMALL, "quickstart"])


def test_a_picture_is_asked_about_as_often_as_said():
    workload = answers.Workload("", answers.workloads(_parsed())[1].model, 3, 2, 4, 1, 1)
    ours = answers.Validation(workload, "cpu")
    assert [len(batch) for batch in ours.batches] == [4, 2]
    assert len({document.pixels.tobytes() for batch in ours.batches for document in batch}) == 3


@pytest.mark.slow
def test_other_code_is_timed_beside():
    rows = answers.main([*SMALL, "quickstart", "--before", str(Path(__file__).parents[1])]).splitlines()
    assert rows[-1].count("|") == rows[3].count("|") == 14
    assert "now over before" in rows[3]


def _parsed():
    return answers.parser().parse_args([])
