"""What a recipe trains, against the arithmetic of the papers and counts made by hand."""

import pytest
from reference import ALIGN, FULL, model, workload
from tiny import LLAMA, tiny_model

from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.plan import workload_of
from components.plan.workload import Adapters
from components.tokenizer import WordTokenizer
from components.vlm import LearningRates

# TFLOP of a sample: tower, projector, decoder, head, all
TABLE = {
    "align 224, 32": (224, ALIGN, 32, 32, (0.16, 0.05, 14.72, 0.02), 14.9),
    "align 224, 64": (224, ALIGN, 64, 64, (0.16, 0.05, 16.37, 0.04), 16.6),
    "align 336, 64": (336, ALIGN, 64, 64, (0.37, 0.10, 32.98, 0.04), 33.5),
    "full 224, 32": (224, FULL, 32, 32, (0.16, 0.05, 22.03, 0.03), 22.3),
    "full 224, 64": (224, FULL, 64, 64, (0.16, 0.05, 24.49, 0.06), 24.8),
    "full 224, 128": (224, FULL, 128, 128, (0.16, 0.05, 29.41, 0.13), 29.7),
    "full 336, 64": (336, FULL, 64, 64, (0.37, 0.11, 49.22, 0.06), 49.8),
    "full 336, 128": (336, FULL, 128, 128, (0.37, 0.11, 54.20, 0.13), 54.8),
    "instruct 336, 350": (336, FULL, 350, 175, (0.37, 0.11, 71.5, 0.2), 72.2),
}
# + full activation checkpointing, if it computed all of the decoder's blocks again
AGAIN = {224: {32: 7.3, 64: 8.2, 128: 9.8}, 336: {64: 16.4, 128: 18.1, 350: 24.0}}


@pytest.mark.parametrize(("image_size", "rates", "text", "targets", "parts", "total"), TABLE.values(), ids=TABLE)
def test_flops_of_a_sample(image_size, rates, text, targets, parts, total):
    work = workload(image_size, rates, text, targets)
    assert work.tokens == {224: 256, 336: 576}[image_size] + text
    for name, expected in zip(("vision_tower", "projector", "decoder", "head"), parts, strict=True):
        # the table rounds to hundredths, the last row to tenths; it knows that a projector's first layer needs no input gradient
        assert work.flops[name] / 1e12 == pytest.approx(expected, rel=0.01, abs=0.03 if text == 350 else 0.009)
    assert work.flops_per_sample / 1e12 == pytest.approx(total, rel=0.01)
    # PyTorch does not compute down_proj again, whose result backward does not need
    saved = 2 * work.tokens * 40 * 5120 * 13824
    assert (work.recomputed_flops + saved) / 1e12 == pytest.approx(AGAIN[image_size][text], rel=0.01)


def test_parameters_of_the_reference_run():
    work = workload()
    tower, projector, decoder = (work.parts[name] for name in ("vision_tower", "projector", "decoder"))
    width, mlp, vocabulary = 5120, 13824, 32000
    block = 4 * width**2 + 3 * width * mlp + 2 * width
    assert (decoder.blocks, decoder.block_parameters, decoder.rest_parameters) == (40, block, 2 * vocabulary * width + width)
    assert decoder.parameters == decoder.trained_parameters == 13_015_864_320
    assert projector.trained_parameters == 1024 * width + width**2 + 2 * width
    assert (projector.blocks, projector.block_parameters, projector.rest_parameters) == (0, 0, projector.parameters)
    assert (tower.blocks, tower.trained_parameters) == (23, 0)
    assert tower.parameters == tower.rest_parameters + 23 * tower.block_parameters
    assert [part.trained for part in work.parts.values()] == [False, True, True]
    assert [part.gradients_flow for part in work.parts.values()] == [False, True, True]
    assert work.samples == 292969 * 2048


def test_units_hold_every_parameter_once():
    work = workload()
    assert work.units[0].name == "vision_tower.visual.transformer.resblocks.0"
    assert [unit.name for unit in work.units[62:]] == ["decoder.lm.model.layers.39", "vision_tower", "projector", "model"]
    assert [unit.is_root for unit in work.units] == 65 * [False] + [True]
    assert sum(parameter.size for unit in work.units for parameter in unit.parameters) == sum(
        part.parameters for part in work.parts.values()
    )


@pytest.mark.parametrize(
    ("rates", "flow"),
    [
        (FULL, [False, True, True]),
        (ALIGN, [False, True, True]),
        (LearningRates(vision_tower=1e-5), [True, True, True]),
        (LearningRates(decoder=1e-5), [False, False, True]),
    ],
)
def test_where_gradients_flow(rates, flow):
    work = workload(rates=rates)
    assert [part.gradients_flow for part in work.parts.values()] == flow
    by_part = {name: {unit.gradients_flow for unit in work.units if unit.name.startswith(name)} for name in work.parts}
    assert list(by_part.values()) == [{flows} for flows in flow]


def test_padding_fills_the_last_shard():
    tables = [parameter for unit in workload().units for parameter in unit.parameters if parameter.shape == (257, 1024)]
    assert [table.padded(8) for table in tables] == [264 * 1024]
    assert [table.padded(1) for table in tables] == [257 * 1024]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_tokens": 0}, "0 text tokens"),
        ({"target_tokens": 65}, "65 supervised"),
        ({"target_tokens": -1}, "-1 supervised"),
        ({"images_per_sample": -1}, "-1 pictures"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
    ],
)
def test_numbers_out_of_range(changes, says):
    sample = {"text_tokens": 64, "target_tokens": 64, "images_per_sample": 1, "global_batch_size": 8, "max_steps": 1}
    with pytest.raises(RecipeError, match=says):
        workload_of(model(224), **{**sample, **changes})


def test_adapters():
    shown = {}
    for dropout in (0.0, 0.1):
        lora = LoRA(rank=3, alpha=1.0, dropout=dropout, target_modules=["k_proj", "down_proj"])
        adapted = tiny_model(decoder=HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=lora))
        adapted.build()
        adapted.adapt()
        work = workload_of(adapted, text_tokens=8, target_tokens=8, images_per_sample=1, global_batch_size=2, max_steps=1)
        shown[dropout] = work.adapters
    # keys are half as wide as the model
    assert shown == {dropout: Adapters(inputs=32 + 48, ranks=3 + 3, outputs=16 + 32, dropout=dropout > 0) for dropout in shown}
    assert workload().adapters is None
