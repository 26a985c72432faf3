"""Sums and their intervals, against values worked out by hand and against resampling written another way."""

import numpy as np
import pytest

from components.benchmarks.tally import RESAMPLES, interval, ratio, tally

SCORES = {"a": (3, 1), "b": (2, 2), "c": (5, 0), "d": (1, 1), "e": (4, 3)}
"""Units with questions and right answers."""


def five(stratum="", names=SCORES):
    return [(stratum, name, {"questions": float(asked), "right": float(right)}) for name, (asked, right) in names.items()]


def test_counts_of_a_unit_are_added_up_whatever_the_order():
    once = tally(five())
    entries = [("", name, {"questions": 1.0}) for name, (asked, _) in SCORES.items() for _ in range(asked)]
    entries += [("", name, {"right": float(right)}) for name, (_, right) in reversed(SCORES.items())]
    twice = tally(entries)
    assert once.units == twice.units == list(SCORES)
    assert once.totals() == twice.totals() == {"questions": 15.0, "right": 7.0}
    assert all((once.resampled(50)[name] == twice.resampled(50)[name]).all() for name in ("questions", "right"))


def test_resamples_are_sums_over_as_many_units_drawn_with_replacement():
    resampled = tally(five()).resampled()
    assert {name: values.shape for name, values in resampled.items()} == {"questions": (RESAMPLES,), "right": (RESAMPLES,)}
    possible = {(0, 0)}
    for _ in SCORES:
        possible = {(q + asked, r + right) for q, r in possible for asked, right in SCORES.values()}
    drawn = set(zip(resampled["questions"].astype(int).tolist(), resampled["right"].astype(int).tolist(), strict=True))
    assert drawn <= possible
    assert len(drawn) > 50
    # the mean over resamples is that of the units, and the spread that of a mean of five
    asked, right = np.array(list(SCORES.values())).T
    for name, values in (("questions", asked), ("right", right)):
        assert resampled[name].mean() == pytest.approx(values.sum(), abs=5 * values.std() * (5 / RESAMPLES) ** 0.5)
        assert resampled[name].std() == pytest.approx(values.std() * 5**0.5, rel=0.1)


def test_a_stratum_keeps_its_size():
    entries = [("x", name, {"x": 1.0}) for name in "abc"] + [("y", name, {"y": 1.0, "odd": float(name == "a")}) for name in "abcd"]
    resampled = tally(entries).resampled(200)
    assert set(resampled["x"]) == {3.0}
    assert set(resampled["y"]) == {4.0}
    assert set(resampled["odd"]) == {0.0, 1.0, 2.0, 3.0, 4.0} or set(resampled["odd"]) == {0.0, 1.0, 2.0, 3.0}


def test_many_units_are_drawn_in_parts_that_do_not_show(monkeypatch):
    whole = tally(five()).resampled(101)
    monkeypatch.setattr("components.benchmarks.tally._CHUNK", 10 * len(SCORES))
    parts = tally(five()).resampled(101)
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Accuracy over pictures whose questions are right together: an interval over questions would be far too narrow."""
    random = np.random.default_rng(0)
    covered, too_narrow = 0, 0
    for _ in range(200):
        pictures = random.random(60) < 0.6
        entries = [("", str(number), {"questions": 5.0, "right": 5.0 * right}) for number, right in enumerate(pictures)]
        questions = [
            ("", str(number), {"questions": 1.0, "right": float(right)}) for number, right in enumerate(pictures.repeat(5))
        ]
        for kind, one in (("picture", entries), ("question", questions)):
            resampled = tally(one).resampled(200)
            low, high = interval(ratio(resampled["right"], resampled["questions"]))
            if kind == "picture":
                covered += low <= 0.6 <= high
            else:
                too_narrow += not low <= 0.6 <= high
    assert 180 <= covered <= 199
    assert too_narrow > 60


def test_ratio_without_a_denominator():
    assert ratio(1.0, 4.0) == 0.25
    assert np.isnan(ratio(0.0, 0.0))
    assert ratio(0.0, 0.0, empty=0.0) == 0.0
    assert ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]), empty=-1.0).tolist() == [0.5, -1.0]


def test_interval_leaves_out_what_has_no_value():
    assert interval(np.array([np.nan, *np.linspace(0, 1, 1001)])) == (pytest.approx(0.025), pytest.approx(0.975))
