"""Throughput: samples that lost their last turns are counted for the whole run, and said once."""

from dataclasses import replace

import pytest
from tiny import Prepared, Record, tiny_document, tiny_model, tiny_trainer

from callbacks.throughput import Throughput
from components.batch import pack

CUT, WHOLE = (pack([tiny_document(5), replace(tiny_document(7), truncated=cut)]) for cut in (True, False))
ONCE = "1 of the last 4 samples are longer than data.max_length and lost their last turns; train/truncated_samples goes on"


def run(batches, throughput, accumulate=1):
    record = Record()
    tiny_trainer(accumulate, callbacks=[throughput, record]).fit(tiny_model(), datamodule=Prepared(batches))
    return record.series("train/truncated_samples")


def test_truncated_samples_are_added_up_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([WHOLE, CUT, CUT, WHOLE, CUT, CUT], Throughput(every_n_steps=1), accumulate=2) == [1, 2, 4]
    assert capsys.readouterr().out.count(ONCE) == 1


def test_nothing_is_said_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([WHOLE, WHOLE], Throughput(every_n_steps=1)) == [0, 0]
    assert "max_length" not in capsys.readouterr().out


def test_a_run_that_continues_goes_on_counting(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Throughput(every_n_steps=1), Throughput(every_n_steps=1)
    run([CUT, CUT], first)
    capsys.readouterr()
    second.load_state_dict(first.state_dict())
    assert run([WHOLE, CUT], second) == [2, 3]
    assert "max_length" not in capsys.readouterr().out  # it was said
