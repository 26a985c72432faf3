"""The lengths of the mean sample that a recipe states."""

import pytest

from components.errors import RecipeError
from components.plan.assumptions import Assumptions
from components.run_folder import changes


@pytest.mark.parametrize(
    "stated",
    [
        {"text_tokens": 0.0},
        {"text_tokens": 10.0, "supervised_tokens": 11.0},
        {"text_tokens": 10.0, "supervised_tokens": 0.0},
        {"text_tokens": 10.0, "images_per_sample": -1.0},
        {"supervised_tokens": 5.0},
        {"images_per_sample": 1.0},
    ],
)
def test_values_that_no_sample_has_are_refused(stated):
    with pytest.raises(RecipeError, match=next(iter(stated))):
        Assumptions(**stated)


def test_all_or_text_alone_may_be_stated():
    Assumptions()
    Assumptions(text_tokens=64.0)
    Assumptions(text_tokens=64.0, supervised_tokens=64.0, images_per_sample=0.0)


def test_a_run_continues_with_other_assumptions():
    before = {"max_steps": 3}
    assert changes(before, {"max_steps": 3, "plan": {"text_tokens": 64.0}}) == []
    assert changes(before, {"max_steps": 3, "plans": {"text_tokens": 64.0}}) != []
