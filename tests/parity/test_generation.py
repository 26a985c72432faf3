"""Answers of batches against transformers' LLaVA one question at a time: the same tokens, also where questions share a picture."""

from dataclasses import replace

import pytest
import torch
from test_llava import THEIR_IMAGE_TOKEN, load_ours_into, theirs
from tiny import LLAMA, built_model, tiny_document

from components.batch import IMAGE_TOKEN_ID

__all__ = ["theirs"]  # a fixture

BATCH, NEW_TOKENS = 16, 12
END = LLAMA["vocab_size"] - 1


@pytest.fixture
def prompts():
    """Three batches of questions of unequal length: each about a picture of its own, then three about each, then mixed."""
    asked = [tiny_document(4 + number % 9, (0,), seed=number) for number in range(3 * BATCH)]
    for number, prompt in enumerate(asked):
        if BATCH <= number < 2 * BATCH or number % 5 == 0:
            asked[number] = replace(prompt, pixels=asked[number - number % 3].pixels)
    return asked


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
def test_batches_answer_the_same_as_one_question_at_a_time(theirs, prompts):
    model = built_model().eval()
    load_ours_into(theirs, model)
    theirs.set_attn_implementation("sdpa")
    theirs.eval()
    answers = in_batches(model, prompts)
    assert answers == one_at_a_time(theirs, [their_inputs(prompt, model.vision_tower) for prompt in prompts])
    assert len({tuple(ids) for ids in answers}) > len(prompts) // 2
