"""Every recipe, and every overlay on every recipe it names, becomes a model on the meta device, a trainer and callbacks."""

import math
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from recipe_book import COMMANDS, ROOT, TELLING, flat, instantiate, resolve

from callbacks.warmup import Warmup
from components.data import InstructionData
from components.shapes_world import WORDS
from components.tokenizer import WordTokenizer, load_tokenizer
from components.vlm import VisionLanguageModel

RUNS = sorted(COMMANDS)
ON_THIS_MACHINE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
}

CLIP_224, CLIP_336, CLIP_336_WHOLE, SIGLIP = 290_581_504, 290_909_184, 303_505_408, 397_745_440
LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320
LORA_7B = 319_815_680
SIZES = {
    "quickstart": (244_032, 46_272, 401_952, 4),
    "quickstart+projector_depth_3": (244_032, 55_584, 401_952, 4),
    "quickstart+projector_linear": (244_032, 9_312, 401_952, 16),
    "quickstart+projector_mlp": (244_032, 18_624, 401_952, 16),
    "quickstart+projector_resampler_16": (244_032, 234_336, 401_952, 16),
    "shapes_world_exam": (245_952, 18_624, 401_952, 36),
    "own_pictures": (267_072, 46_272, 430_752, 64),
    "own_conversations": (267_072, 46_272, 430_752, 64),
    "llava15_7b": (CLIP_336, 20_979_712, LLAMA_7B, 576),
    "llava15_7b_lora": (CLIP_336, 20_979_712, LLAMA_7B + LORA_7B, 576),
    "llava15_7b+feature_layer_last": (CLIP_336_WHOLE, 20_979_712, LLAMA_7B, 576),
    "llava15_7b+projector_depth_3": (CLIP_336, 37_761_024, LLAMA_7B, 576),
    "llava15_7b+projector_linear": (CLIP_336, 4_198_400, LLAMA_7B, 576),
    "llava15_7b+projector_pixel_shuffle": (CLIP_336, 33_562_624, LLAMA_7B, 144),
    "llava15_7b+projector_resampler_64": (CLIP_336, 29_454_336, LLAMA_7B, 64),
    "llava15_7b+resolution_224": (CLIP_224, 20_979_712, LLAMA_7B, 256),
    "llava15_7b+start_from_llava_hf": (CLIP_336, 20_979_712, LLAMA_7B + 2 * 64 * 4096, 576),  # 64 rows more in both tables
    "llava15_7b+tower_siglip": (SIGLIP, 21_504_000, LLAMA_7B, 729),
    "llava15_13b": (CLIP_336, 31_467_520, LLAMA_13B, 576),
    "meta_llava_13b": (CLIP_224, 31_467_520, LLAMA_13B, 256),
    "meta_llava_13b+resolution_336": (CLIP_336, 31_467_520, LLAMA_13B, 576),
}
"""Parameters of tower, projector and decoder, and visual tokens of a picture. Both stages of a model have one row; an overlay
without a row has its recipe's. The tower has 23 of CLIP's 24 blocks: 303,507,456 parameters less a block and the last norm.
Adapters of rank 128 have 128 x (inputs + outputs) of each layer: 32 x 128 x (4 x 8192 + 3 x 15104)."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a recipe was built over the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def opened_files():
    """Every file that is opened, as the interpreter reports it."""
    opened: list[str] = []
    listening = True

    def listen(event, arguments):
        if listening and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(listen)  # cannot be removed, only told to be silent
    yield opened
    listening = False


@pytest.mark.parametrize("run", [pytest.param(run, marks=[] if run in TELLING else [pytest.mark.slow]) for run in RUNS])
def test_every_command_builds_without_files_or_network(run, opened_files):
    opened_files.clear()
    with torch.device("meta"):
        parts = instantiate(COMMANDS[run])
        model = parts.model
        model.build()
        model.adapt()
    interpreter = [Path(folder).resolve() for folder in (sys.prefix, sys.base_prefix, "/dev", "/proc")]
    allowed = [ROOT, *interpreter]
    strangers = [path for path in map(Path, opened_files) if not any(path.resolve().is_relative_to(folder) for folder in allowed)]
    assert strangers == []

    assert isinstance(model, VisionLanguageModel) and isinstance(parts.data, InstructionData)
    assert all(isinstance(parts[section], Callback) for section in ("warmup", "checkpoint", "validation", "throughput"))
    assert all(parameter.is_meta for parameter in model.parameters())
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in model.parts.values()]
    model_name = re.sub("_(pretrain|finetune)", "", run)
    expected = SIZES.get(model_name, SIZES[model_name.partition("+")[0]])
    assert (*sizes, model.sample_format().tokens_per_image) == expected

    callbacks = [parts.warmup, parts.checkpoint, parts.validation, parts.throughput]
    trainer = Trainer(**{**parts.trainer, **ON_THIS_MACHINE, "callbacks": callbacks})
    assert trainer.max_steps == resolve(COMMANDS[run]).max_steps
    assert trainer.world_size == 1


@pytest.mark.parametrize("run", RUNS)
def test_batch_and_machine_agree(run):
    resolved = resolve(COMMANDS[run])
    trainer = resolved.trainer
    ranks = trainer.devices * trainer.num_nodes
    if trainer.strategy != "auto":
        strategy = trainer.strategy.init_args
        assert strategy.replicas * strategy.shards == ranks
        assert strategy.shards in (trainer.devices, ranks), "a copy of the model lies inside a node, or over all"
    assert resolved.data.global_batch_size % (ranks * trainer.accumulate_grad_batches) == 0
    assert trainer.use_distributed_sampler is False


@pytest.mark.parametrize("run", RUNS)
def test_the_warmup_ends(run):
    resolved = resolve(COMMANDS[run])
    schedule, max_steps = Warmup(**resolved.warmup), resolved.max_steps
    warmup = schedule.num_steps(max_steps)
    assert 0 < warmup <= max_steps / 8
    assert schedule.factor(warmup, max_steps) == 1
    assert schedule.factor(max_steps, max_steps) == pytest.approx(schedule.floor)


@pytest.mark.parametrize("run", [run for run in RUNS if "finetune" in run and "no_alignment" not in run])
def test_a_stage_continues_the_model_of_its_first_stage(run):
    later = resolve(COMMANDS[run])
    folder, first_run = later.model.initial_weights.split("/")
    if folder == "llava-hf":  # a released model in place of a first stage
        assert later.model.decoder.init_args.tokenizer == later.model.initial_weights
        return
    assert folder == "runs" and first_run in COMMANDS
    first = resolve(COMMANDS[first_run])
    for part in ("vision_tower", "projector", "decoder"):
        before, after = ({k: v for k, v in flat(stage.model[part]).items() if "lora" not in k} for stage in (first, later))
        assert before == after


@pytest.mark.parametrize("run", [run for run in RUNS if "llava" not in run])
def test_a_model_from_scratch_fits_its_words_and_pictures(run):
    parts = instantiate(COMMANDS[run])
    decoder = parts.model.decoder
    assert isinstance(decoder.tokenizer, WordTokenizer)
    assert len(load_tokenizer(decoder.tokenizer)) <= decoder.vocab_size
    assert decoder.weights is None and parts.model.vision_tower.pretrained is None
    for setting in [source.setting for source in parts.data.sources.values() if hasattr(source, "setting")]:
        assert tuple(decoder.tokenizer.words) == WORDS
        assert setting.image_size == parts.model.vision_tower.image_size
        assert {benchmark.setting for benchmark in parts.validation.benchmarks.values()} == {setting}


def test_steps_are_whole_epochs():
    pairs = {"meta_llava_13b_pretrain": 600e6, "llava15_7b_pretrain": 558_128, "llava15_7b_finetune": 665_298}
    pairs |= {"llava15_13b_pretrain": 558_128, "llava15_13b_finetune": 665_298, "meta_llava_13b_finetune": 3 * 157_712 / 0.75}
    for run, samples in pairs.items():
        resolved = resolve(COMMANDS[run])
        assert resolved.max_steps == math.ceil(samples / resolved.data.global_batch_size), run
