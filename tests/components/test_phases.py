"""Phases of a run, as its watchdog sees them."""

import time

import pytest

from components import phases
from components.phases import phase


def test_a_phase_inside_another_one_counts_for_itself_and_the_outer_one_anew():
    phases.enter("step")
    time.sleep(0.05)
    with phase("validation"):
        assert phases.current()[0] == "validation" and phases.current()[1] < 0.05
        with pytest.raises(ZeroDivisionError), phase("checkpoint"):
            assert phases.current()[0] == "checkpoint"
            raise ZeroDivisionError
        assert phases.current()[0] == "validation"
    assert phases.current()[0] == "step" and phases.current()[1] < 0.05


def test_progress_starts_the_clock_anew():
    phases.enter("step")
    time.sleep(0.05)
    assert phases.current()[1] >= 0.05
    phases.get_on()
    assert phases.current()[0] == "step" and phases.current()[1] < 0.05


def test_somebody_hears_of_phases():
    heard = []
    phases.listen(heard.append)
    try:
        phases.enter("step")
        with phase("checkpoint"):
            phases.get_on()
    finally:
        phases.listen(None)
    phases.enter("end")
    assert heard == ["step", "checkpoint", "step"]
