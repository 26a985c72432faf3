"""The recipes of published runs, resolved, show the published values."""

import pytest
import torch
from recipe_book import COMMANDS, flat, instantiate, resolve
from torch.optim import AdamW

SHARDED = "components.sharding.HybridSharding"
OPEN_CLIP = "components.vision_tower.OpenClipTower"
MLP = "components.projector.MLP"

REFERENCE = {
    "max_steps": 292_969,
    "trainer.max_steps": 292_969,
    "trainer.num_nodes": 16,
    "trainer.devices": 8,
    "trainer.accumulate_grad_batches": 16,
    "trainer.precision": "32-true",
    "trainer.gradient_clip_val": None,
    "trainer.strategy.class_path": SHARDED,
    "trainer.strategy.init_args.replicas": 16,
    "trainer.strategy.init_args.shards": 8,
    "trainer.strategy.init_args.param_dtype": "bfloat16",
    "trainer.strategy.init_args.reduce_dtype": "float32",
    "model.vision_tower.class_path": OPEN_CLIP,
    "model.vision_tower.init_args.model_name": "ViT-L-14-quickgelu",
    "model.vision_tower.init_args.pretrained": "openai",
    "model.vision_tower.init_args.feature_layer": -2,
    "model.projector.class_path": MLP,
    "model.projector.init_args.depth": 2,
    "model.decoder.init_args.weights": "meta-llama/Llama-2-13b-hf",
    "model.decoder.init_args.tokenizer": "meta-llama/Llama-2-13b-hf",
    "model.learning_rates.vision_tower": None,
    "model.learning_rates.projector": 1e-5,
    "model.learning_rates.decoder": 1e-5,
    "model.initial_weights": None,
    "data.global_batch_size": 2048,
    "data.template": "plain",
    "warmup.steps": 1000,
    "warmup.fraction": None,
    "warmup.floor": 0.0,
}
"""The reference run: 600M pairs, CLIP ViT-L/14 at 224 pixels, LLaMA-2 13B, 16 nodes of 8 A100."""


def llava(size: str, stage: str) -> dict[str, object]:
    """Source: haotian-liu/LLaVA, commit c121f0432, scripts/v1_5/pretrain.sh and finetune.sh; sizes differ in the decoder."""
    pretrain = stage == "pretrain"
    rate = 1e-3 if pretrain else 2e-5
    return {
        "max_steps": 2181 if pretrain else 5198,
        "trainer.gradient_clip_val": None,
        "model.vision_tower.init_args.model_name": "ViT-L-14-336-quickgelu",
        "model.vision_tower.init_args.pretrained": "openai",
        "model.vision_tower.init_args.feature_layer": -2,
        "model.projector.class_path": MLP,
        "model.projector.init_args.depth": 2,
        "model.decoder.init_args.weights": f"lmsys/vicuna-{size}-v1.5",
        "model.decoder.init_args.tokenizer": f"lmsys/vicuna-{size}-v1.5",
        "model.learning_rates.vision_tower": None,
        "model.learning_rates.projector": rate,
        "model.learning_rates.decoder": None if pretrain else rate,
        "model.weight_decay": 0.0,
        "model.betas": (0.9, 0.999),
        "model.initial_weights": None if pretrain else f"runs/llava15_{size}_pretrain",
        "data.global_batch_size": 256 if pretrain else 128,
        "data.template": "plain" if pretrain else "vicuna_v1",
        "data.image_mode": "crop" if pretrain else "pad",
        "data.decoding": "llava",
        "data.max_length": 2048,
        "warmup.fraction": 0.03,
        "warmup.steps": None,
        "warmup.floor": 0.0,
    }


LLAVA = {f"llava15_{size}_{stage}": llava(size, stage) for size in ("7b", "13b") for stage in ("pretrain", "finetune")}
LLAVA["llava15_7b_lora_finetune"] = {
    **llava("7b", "finetune"),
    "model.learning_rates.decoder": 2e-4,
    "model.decoder.init_args.lora.rank": 128,
    "model.decoder.init_args.lora.alpha": 256,
    "model.decoder.init_args.lora.dropout": 0.05,
    "model.decoder.init_args.lora.target_modules": "all-linear",
}
"""Source: the same, scripts/v1_5/finetune_lora.sh."""


@pytest.mark.parametrize(("key", "value"), REFERENCE.items(), ids=str)
def test_the_reference_run(key, value):
    assert flat(resolve(COMMANDS["meta_llava_13b_pretrain"]))[key] == value


@pytest.mark.parametrize("run", LLAVA)
def test_llava_1_5(run):
    resolved = flat(resolve(COMMANDS[run]))
    assert {key: resolved[key] for key in LLAVA[run]} == LLAVA[run]


@pytest.mark.parametrize("run", ["meta_llava_13b_pretrain", *LLAVA])
def test_a_published_run_is_adamw_on_a_cosine(run):
    max_steps = resolve(COMMANDS[run]).max_steps
    with torch.device("meta"):
        parts = instantiate(COMMANDS[run])
        parts.model.build()
        parts.model.adapt()
    optimizer = parts.model.configure_optimizers()
    assert isinstance(optimizer, AdamW)
    trained = {group["name"].removesuffix("_no_decay") for group in optimizer.param_groups}
    assert trained == ({"projector"} if run.startswith("llava15") and "pretrain" in run else {"projector", "decoder"})
    steps = {"meta_llava_13b_pretrain": 1000, "llava15_7b_pretrain": 66, "llava15_13b_pretrain": 66}.get(run, 156)
    factor = parts.warmup.factor
    assert factor(steps // 2, max_steps) == pytest.approx(0.5)
    assert factor(steps, max_steps) == 1
    assert factor(steps + (max_steps - steps) // 2, max_steps) == pytest.approx(0.5, abs=1e-3)
    assert factor(max_steps, max_steps) == pytest.approx(0)


def test_the_reference_run_holds_micro_batches_of_one_picture_of_256_tokens():
    resolved = resolve(COMMANDS["meta_llava_13b_pretrain"])
    trainer = resolved.trainer
    assert resolved.data.global_batch_size == trainer.num_nodes * trainer.devices * trainer.accumulate_grad_batches
    layout = instantiate(COMMANDS["meta_llava_13b_pretrain"]).model.sample_format()
    assert (layout.image_size, layout.tokens_per_image) == (224, 256)
