"""Answers of batches against transformers' LLaVA one question at a time: the same tokens, several times as many a second."""

import statistics
import time

import pytest
import torch
from test_llava import THEIR_IMAGE_TOKEN, load_ours_into, theirs
from tiny import LLAMA, built_model, tiny_document

from components.batch import IMAGE_TOKEN_ID

__all__ = ["theirs"]  # a fixture

BATCH, NEW_TOKENS, ROUNDS, TARGET = 16, 12, 3, 3.0
END = LLAMA["vocab_size"] - 1


@pytest.fixture
def prompts():
    """Three batches of questions of unequal length, each about a picture."""
    return [tiny_document(4 + number % 9, (0,), seed=number) for number in range(3 * BATCH)]


def in_batches(model, prompts):
    starts = range(0, len(prompts), BATCH)
    batches = (prompts[start : start + BATCH] for start in starts)
    return [ids for batch in batches for ids in model.generate_ids(batch, NEW_TOKENS, end_token_id=END)]


def one_at_a_time(theirs, inputs):
    answers = []
    for given in inputs:
        ids = theirs.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=END, pad_token_id=END)
        answers.append(ids[0, given["input_ids"].shape[1] :].tolist())
    return answers


def their_inputs(prompt, tower):
    ids = torch.from_numpy(prompt.input_ids)[None]
    ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, THEIR_IMAGE_TOKEN)
    pixels = torch.from_numpy(prompt.pixels).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": (pixels - mean) / std}


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid")
def test_batches_answer_the_same_and_at_least_three_times_as_fast(theirs, prompts):
    model = built_model().eval()
    load_ours_into(theirs, model)
    theirs.set_attn_implementation("sdpa")
    theirs.eval()
    inputs = [their_inputs(prompt, model.vision_tower) for prompt in prompts]
    ratios = []
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        ours = in_batches(model, prompts)
        middle = time.perf_counter()
        expected = one_at_a_time(theirs, inputs)
        end = time.perf_counter()
        assert ours == expected
        if number:  # the first round warms both up
            ratios.append((end - middle) / (middle - start))
    ratio, ours_a_second, theirs_a_second = (
        statistics.median(ratios),
        len(prompts) / (middle - start),
        len(prompts) / (end - middle),
    )
    print(f"answers/s: {ours_a_second:.0f} in batches of {BATCH}, {theirs_a_second:.0f} one at a time; median ratio {ratio:.1f}")
    assert ratio >= TARGET
