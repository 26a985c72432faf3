"""A slice of LLaMA-2 13B behind a slice of CLIP ViT-L/14, and the shapes of their tensors, written by hand."""

from math import prod

from tiny import TOWER_FROZEN

from components.decoder import HuggingFaceDecoder
from components.plan.simulate import MeanSample
from components.projector import MLP
from components.sharding import Layout
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import VisionLanguageModel

LAYERS = {"tower": 1, "decoder": 2}
LLAMA_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": LAYERS["decoder"],
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
VIT_LARGE = {"image_size": 224, "patch_size": 14, "width": 1024, "layers": LAYERS["tower"], "head_width": 64}
SAMPLE = MeanSample(text_tokens=64, target_tokens=64)
TOKENS = 64 + 256

BLOCK = [(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)] + [(5120,)] * 2
PROJECTOR = [(5120, 1024), (5120,), (5120, 5120), (5120,)]
ROOT = [(32000, 5120)] * 2 + [(5120,)]  # the decoder's embeddings, head and norm
TOWER_BLOCK = [(3072, 1024), (3072,), (1024, 1024), (1024,), (4096, 1024), (4096,), (1024, 4096), (1024,)] + [(1024,)] * 4
TOWER_REST = [(1024, 3, 14, 14), (1024,), (257, 1024), (1024,), (1024,)]

FULL_SHARD = Layout(replicas=1, shards=128)
HYBRID = Layout(replicas=16, shards=8)


def model_13b(rates=TOWER_FROZEN, **decoder):
    """A slice of LLaMA-2 13B behind a slice of CLIP ViT-L/14."""
    return VisionLanguageModel(
        OpenClipTower(config=VIT_LARGE, feature_layer=-1),
        MLP(depth=2),
        HuggingFaceDecoder({**LLAMA_13B, **decoder}, WordTokenizer()),
        rates,
    )


def numbers(shapes, shards=128):
    """Numbers in tensors of these shapes, as they are sent: the rows are filled up to a multiple of the shards."""
    padded = [(-(-rows // shards) * shards, *rest) for rows, *rest in shapes]
    return sum(prod(shape) for shape in padded)
