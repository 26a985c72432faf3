"""The reference run in numbers: CLIP ViT-L/14, an MLP and LLaMA-2 13B on the meta device."""

from functools import cache

import torch

from components.decoder import HuggingFaceDecoder
from components.plan import Machine, Schedule, Workload, workload_of
from components.projector import MLP
from components.sharding import Layout
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates, VisionLanguageModel

LLAMA_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "tie_word_embeddings": False,
}
TOWERS = {224: "ViT-L-14-quickgelu", 336: "ViT-L-14-336-quickgelu"}
FULL = LearningRates(projector=1e-5, decoder=1e-5)
ALIGN = LearningRates(projector=1e-5)


@cache
def model(image_size: int) -> VisionLanguageModel:
    built = VisionLanguageModel(
        OpenClipTower(TOWERS[image_size]), MLP(depth=2), HuggingFaceDecoder(LLAMA_13B, WordTokenizer()), FULL
    )
    with torch.device("meta"):
        built.build()
        built.adapt()
    return built


def workload(
    image_size: int = 224, rates: LearningRates = FULL, text_tokens: int = 64, target_tokens: int | None = None, batch: int = 2048
) -> Workload:
    """600M pairs, in steps of 2048."""
    trained = model(image_size)
    trained.learning_rates = rates
    trained.set_trainable()
    return workload_of(
        trained,
        text_tokens=text_tokens,
        target_tokens=text_tokens if target_tokens is None else target_tokens,
        images_per_sample=1,
        global_batch_size=batch,
        max_steps=292969,
    )


def machine(interconnect: str = "1.6Tb/s", nodes: int = 16, gpu: str = "a100-80gb") -> Machine:
    return Machine.of(nodes, 8, gpu, interconnect)


def schedule(micro_batch: int = 1, accumulation: int = 16, replicas: int = 1, shards: int = 128, **options) -> Schedule:
    return Schedule(Layout(replicas, shards, **options), micro_batch, accumulation)
