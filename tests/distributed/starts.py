"""Starts of tiny models over two ranks, from released weights and from earlier runs."""

import torch
import yaml
from lightning import Callback
from safetensors.torch import save_file
from tiny import LLAMA, TOWER, TOWER_FROZEN, Prepared, fill, tiny_batch, tiny_trainer
from training_runs import hybrid

from callbacks.checkpoint import Checkpoint
from components.decoder import HuggingFaceDecoder, LoRA
from components.projector import MLP
from components.run_folder import RECIPE
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import VisionLanguageModel

FSDP, HYBRID = hybrid(1, 2), hybrid(2, 1)
UNEVEN = {**LLAMA, "vocab_size": 261, "intermediate_size": 49}
TIED = {**UNEVEN, "tie_word_embeddings": True}
EXPERTS = {**UNEVEN, "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ADAPTED = LoRA(rank=3, alpha=6.0)


def model_of(
    config=UNEVEN, pretrained=None, weights=None, lora=None, rates=TOWER_FROZEN, initial_weights=None, tower=TOWER, layer=-1
):
    return VisionLanguageModel(
        vision_tower=OpenClipTower(config=tower, pretrained=pretrained, feature_layer=layer),
        projector=MLP(depth=2),
        decoder=HuggingFaceDecoder(config, WordTokenizer(), weights, lora),
        learning_rates=rates,
        initial_weights=initial_weights,
    )


def release(folder, config=UNEVEN, dtype=torch.float32, **options):
    """Weights of a tower and of a decoder, as a recipe names them."""
    model = model_of(config)
    model.configure_model()
    fill(model)
    model.to(dtype)
    save_file(model.vision_tower.visual.state_dict(), folder / "tower.safetensors")
    model.decoder.lm.save_pretrained(folder / "decoder", **options)
    return {"config": config, "pretrained": str(folder / "tower.safetensors"), "weights": str(folder / "decoder")}


def started(strategy, arguments, callbacks=(), **options):
    """The model of this rank as a run starts with it."""
    model = model_of(**arguments)
    trainer = tiny_trainer(steps=0, callbacks=list(callbacks), devices=2, strategy=strategy(), **options)
    trainer.fit(model, datamodule=Prepared([tiny_batch()]))
    return model


def first_stage(folder, strategy, arguments, steps=1):
    """A checkpoint of the start of a run, sharded where a strategy is given, with adapters that are not zero."""
    model = model_of(**arguments)

    class Changes(Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                for number, parameter in enumerate(pl_module.parameters()):
                    parameter.add_(0.01 * (number % 7))

    options = {"devices": 2, "strategy": strategy()} if strategy else {}
    callbacks = [Changes(), Checkpoint(1)]
    trainer = tiny_trainer(steps=steps, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder, **options)
    trainer.fit(model, datamodule=Prepared([tiny_batch()] * steps))


def write_stage(folder, lora):
    """The recipe of a run folder, for the checkpoints of `first_stage`."""
    init_args = {"lora": vars(lora) if lora else None}
    (folder / RECIPE).write_text(yaml.safe_dump({"model": {"decoder": {"init_args": init_args}}}))
