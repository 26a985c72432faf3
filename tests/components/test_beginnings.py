"""Prompts that begin alike: computed once, the same answers, whatever the architecture, and nothing computed that is not needed."""

import numpy as np
import pytest
import torch
from test_decoder import built, left_padded
from tiny import TOKENS_PER_IMAGE, Numbers, built_model, tiny_document
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Document
from components.decoder.beginnings import STEP, ReservedLayer, fill_beginnings, reserved_cache
from components.prompts import shared_beginnings

STEPS, END = 4, 2


def ids(length, seed):
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed))


def alike():
    """Seven prompts: three and two that begin alike, one that shares nothing and is the shortest, one alone with its beginning."""
    first, second = ids(9, 0), ids(7, 1)
    endings = [(first, 4), (first, 1), (second, 3), (first, 2), (second, 5)]
    prompts = [torch.cat([beginning, ids(length, 2 + length)]) for beginning, length in endings]
    return [*prompts, ids(3, 9), ids(12, 8)], [(0, 9), (0, 9), (2, 7), (0, 9), (2, 7), (5, 0), (6, 11)]


LENGTHS = {
    "llama": {"max_position_embeddings": 14, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "phi3": {
        "original_max_position_embeddings": 14,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    },
}
"""Rotary frequencies of up to 14 positions, and others of more."""


@pytest.mark.parametrize("name", LENGTHS)
def test_frequencies_of_the_whole_prompt_are_those_of_its_beginning(name):
    decoder, of_one_kind = built(name, **LENGTHS[name]), built(name)
    beginning, others = ids(9, 0), []
    for seed in range(5):
        prompts = left_padded(decoder, [torch.cat([beginning, ids(10, 2 * seed + number)]) for number in (1, 2)])
        answers = decoder.generate(*prompts, STEPS, END)
        assert decoder.generate(*prompts, STEPS, END, beginnings=[(0, 9), (0, 9)]).tolist() == answers.tolist()
        others.append(answers.tolist() != of_one_kind.generate(*prompts, STEPS, END).tolist())
    assert any(others)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_some_window", "phi3"])
def test_answers_equal_those_of_each_prompt_alone(name):
    decoder = built(name)
    prompts, beginnings = alike()
    together = decoder.generate(*left_padded(decoder, prompts), STEPS, END, beginnings=beginnings)
    alone = [decoder.generate(*left_padded(decoder, [prompt]), STEPS, END)[0].tolist() for prompt in prompts]
    assert together.tolist() == [row + [END] * (STEPS - len(row)) for row in alone]
    assert len({tuple(row) for row in alone}) > 4


def test_sampling_draws_the_same():
    decoder = built()
    prompts, beginnings = alike()
    drawn = []
    for stated in (None, beginnings):
        torch.manual_seed(0)
        drawn.append(decoder.generate(*left_padded(decoder, prompts), STEPS, END, 1.0, 0.9, stated).tolist())
    assert drawn[0] == drawn[1]


def test_each_beginning_is_computed_once():
    decoder = built()
    prompts, beginnings = alike()
    widths = []
    decoder.lm.base_model.layers[0].register_forward_hook(lambda module, given, output: widths.append(tuple(output.shape[:2])))
    decoder.generate(*left_padded(decoder, prompts[:5]), 1, END, beginnings=beginnings[:5])
    # of the longest, 9 + 4, the last five tokens are not in the cache: the longest ending
    assert widths == [(1, 8 + 7), (5, 5)]
    widths.clear()
    decoder.generate(*left_padded(decoder, prompts[5:]), 1, END, beginnings=beginnings[5:6] + [(1, 11)])
    assert widths == [(2, 12)], "nothing is shared: the plain way"


@pytest.mark.parametrize("beginnings", [[(0, 0), (1, 0)], [(0, 0), (1, 1)], [(0, 0), (0, 0)]])
def test_a_rank_without_beginnings_gathers_the_weights_as_often(beginnings):
    """Where weights are sharded, every rank runs every block as often as the others."""
    decoder = built()
    passes = []
    decoder.lm.base_model.layers[0].register_forward_hook(lambda module, given, output: passes.append(output.shape[1]))
    cache = reserved_cache(decoder.lm, 5)
    fill_beginnings(decoder.lm, *left_padded(decoder, [ids(4, 0), ids(2, 1)]), beginnings, cache)
    assert passes == [1]
    assert cache.get_seq_length() == 0


def test_memory_grows_with_the_answers_up_to_what_they_may_need():
    generator = torch.Generator().manual_seed(0)
    layer, plain, reserved = ReservedLayer(2 * STEP), DynamicLayer(), []
    for new in [5, 20] + [1] * (2 * STEP - 25):
        states = [torch.randn(2, 3, new, width, generator=generator) for width in (4, 6)]
        for ours, theirs in zip(layer.update(*states), plain.update(*states), strict=True):
            assert torch.equal(ours[:, :, -new:], theirs[:, :, -new:])
        assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)
        reserved.append(layer.memory[0].shape[2])
    assert list(dict.fromkeys(reserved)) == [5 + STEP, 2 * STEP]


def test_rows_that_would_leave_the_memory_behind_are_refused():
    cache = DynamicCache()
    cache.layers = [ReservedLayer(9)]
    cache.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), 0)
    for other_rows in (cache.reorder_cache, cache.batch_select_indices):
        with pytest.raises(NotImplementedError, match="one answer a prompt"):
            other_rows(torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match="one answer a prompt"):
        cache.batch_repeat_interleave(2)


# --- of documents


def about(pictures, words, seed=0):
    """A question of some words after the pictures of a document."""
    slots = np.full(TOKENS_PER_IMAGE * len(pictures), IMAGE_TOKEN_ID)
    spoken = np.random.default_rng([seed, words]).integers(3, 250, words)
    input_ids = np.concatenate([[1], slots, spoken]).astype(np.int64)
    return Document(f"{words} words", input_ids, np.full_like(input_ids, IGNORE_INDEX), pictures)


def questions():
    """About one picture, another and both; without any; one that ends with its picture."""
    one, other = (tiny_document(3, (0,), seed).pixels for seed in (1, 2))
    both = np.concatenate([one, other])
    asked = [about(one, 5), about(one, 2), about(other, 3), about(one, 9), about(both, 4), about(other, 6), about(both, 2)]
    return [*asked, tiny_document(6), tiny_document(4, (2,), seed=5), about(one, 0), about(one, 0)]


def test_what_is_shared_ends_with_the_last_picture():
    one, two = 1 + TOKENS_PER_IMAGE, 1 + 2 * TOKENS_PER_IMAGE
    assert shared_beginnings(questions()) == [
        (0, one), (0, one), (2, one), (0, one), (4, two), (2, one), (4, two), (7, 0), (8, 2 + TOKENS_PER_IMAGE), (9, 0), (10, 0)
    ]  # fmt: skip


def test_other_words_or_another_picture_share_nothing():
    picture = tiny_document(3, (0,), 1).pixels
    almost = picture.copy()
    almost[0, 0, 0, 0] ^= 1
    other_words = about(picture, 3)
    other_words.input_ids[0] = 7
    prompts = [about(picture, 3), about(almost, 3), other_words]
    assert [first for first, _ in shared_beginnings(prompts)] == [0, 1, 2]


def test_every_picture_is_looked_at_once_and_the_answers_are_those_of_one_question_at_a_time():
    model = built_model().eval()
    model.tokenizer = Numbers()
    alone = [model.generate([prompt], max_new_tokens=4, end_token_id=END)[0] for prompt in questions()]
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    assert model.generate(questions(), max_new_tokens=4, end_token_id=END) == alone
    assert seen == [1 + 1 + 2 + 1 + 1 + 1]  # two that end with their picture are not compared
    assert len(set(alone)) > 6
