"""Who asks which questions, together with which others, and with which pictures."""

from collections import Counter

import numpy as np
import pytest
from test_validation import LEVELS, Brightness, Data

from callbacks.validation.asking import Prompts, exchange_pictures, share
from components.benchmarks import Question
from components.errors import RecipeError


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
def test_ranks_answer_in_lockstep_and_leave_nothing_out(count, ranks):
    questions = [Question(f"q{number}", "x" * (number % 5), (), "y") for number in range(count)]
    shares = [share(questions, rank, ranks, batch_size=2) for rank in range(ranks)]
    assert len({tuple(len(batch) for batch in batches) for batches in shares}) == 1
    asked = Counter(question.id for batches in shares for batch in batches for question in batch)
    assert asked.keys() == {question.id for question in questions}
    assert asked.total() - count < ranks
    lengths = [len(question.prompt) for batch in shares[0] for question in batch]
    assert lengths == sorted(lengths, reverse=True) or ranks > count


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_questions_about_one_picture_are_asked_together(ranks):
    questions = [Question(f"q{number}", "x" * (7 * number % 10), (f"{number % 8}.png",), "y") for number in range(48)]
    batches = [batch for rank in range(ranks) for batch in share(questions, rank, ranks, batch_size=6)]
    assert sorted(question.id for batch in batches for question in batch) == sorted(question.id for question in questions)
    assert all(len({question.images for question in batch}) == 1 for batch in batches)


def test_a_picture_is_read_once_a_batch():
    read: Counter[str] = Counter()

    class Counted(Brightness):
        def read_image(self, name):
            read[name] += 1
            return super().read_image(name)

    data, benchmark = Data(), Counted()
    asked = benchmark.questions()
    together = Prompts([asked], benchmark, data.preparation, data.tokenizer, data.layout)[0]
    assert read == dict.fromkeys(LEVELS, 1)
    for question, document in zip(asked, together, strict=True):
        (alone,) = Prompts([[question]], benchmark, data.preparation, data.tokenizer, data.layout)[0]
        assert document.sample_id == alone.sample_id == question.id
        assert document.input_ids.tolist() == alone.input_ids.tolist()
        assert np.array_equal(document.pixels, alone.pixels)


def test_every_picture_is_exchanged_for_another():
    asked = Brightness().questions()
    exchanged = exchange_pictures(asked)
    assert exchanged == exchange_pictures(asked)
    assert sorted({name for q in exchanged for name in q.images}) == sorted(LEVELS)
    for before, after in zip(asked, exchanged, strict=True):
        assert (before.id, before.prompt, before.reference) == (after.id, after.prompt, after.reference)
        assert not set(before.images) & set(after.images)
    with pytest.raises(RecipeError, match="at least two different pictures; there are 1"):
        exchange_pictures(asked[:1])
