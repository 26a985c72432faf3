"""FLOPs of a training step and its MFU: the one formula of `train/mfu`, of `plan` and of the benchmarks.

    MFU = FLOPs of the step / (seconds * peak),    HFU = (FLOPs of the step + recomputed FLOPs) / (seconds * peak)

FLOPs are those of matrix products, two per multiply-add: 2 * weights * rows of a linear layer; 4 * width * pairs of attention,
where a picture of n patches has n^2 pairs, and a causal document of n tokens half as many, n^2 / 2. No document sees another, and
the head runs on supervised positions only. All of it counts once forward; where gradients flow, those of the inputs cost as much
again; where a layer trains, those of its weights too. So a part that trains costs 3 times its forward pass; a frozen one that
gradients flow through 2 times, but its attention, which has no weights, 3 times; a frozen tower once, and the projector behind it
is spared the gradients of what it reads. Adapters are a trained part inside a frozen one. Only HFU counts what is computed again.

Source: arXiv 2204.02311 (PaLM), appendix B, for the definitions of MFU and HFU. Differs: attention is causal and inside documents
only (llm-foundry and torchtitan count the whole square), and only the positions that are computed count.
"""

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from components.decoder import Decoder
from components.gpus import PEAK_TFLOPS
from components.sharding import whole_shape
from components.vlm import VisionLanguageModel

Number = int | float

PARTS = ("vision_tower", "projector", "decoder")


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device in bf16, or None when it is not known."""
    return next((peak * 1e12 for word, peak in PEAK_TFLOPS.items() if word in device_name), None)


def mfu(flops: Number, seconds: Number, peak: Number) -> float:
    """Model FLOPs utilization in [0, 1]; with recomputed FLOPs among the first argument, hardware FLOPs utilization.

    Args:
        flops: Of all devices, by `step_flops`.
        seconds: That they took.
        peak: FLOP/s of all devices.
    """
    return float(flops / seconds / peak)


def matmul_parameters(model: VisionLanguageModel) -> dict[str, int]:
    """Weights that are multiplied with every token or patch, in numbers of parameters.

    Of the tower's and the decoder's blocks, of the decoder's head and its adapters, and of the convolution that cuts the patches.
    """
    tower, decoder = model.vision_tower, model.decoder
    sizes = {"vision_tower": _matrices(tower.blocks()), "patch_embedding": _matrices([tower], ndim=4)}
    # what an adapted layer trains, it multiplies in addition to its own weights
    sizes["adapters"] = sum(whole_shape(p).numel() for p in decoder.trainable_parameters()) if decoder.lora else 0
    sizes["decoder"] = _matrices(decoder.blocks()) - sizes["adapters"]
    sizes["head"] = decoder.embed_dim * decoder.vocab_size
    return sizes


def _matrices(modules: list[nn.Module], ndim: int = 2) -> int:
    shapes = [whole_shape(parameter) for module in modules for parameter in module.parameters()]
    return sum(shape.numel() for shape in shapes if len(shape) == ndim)


def query_dim(decoder: Decoder) -> int:
    """Width of all queries of a token: heads times their width."""
    config: Any = decoder.lm.config
    head_dim = getattr(config, "head_dim", None) or decoder.embed_dim // config.num_attention_heads
    return config.num_attention_heads * head_dim


def gradients_flow(model: VisionLanguageModel) -> dict[str, bool]:
    """Whether gradients pass through each part, on their way to its own weights or to those of a part before it."""
    trains = [rate is not None for rate in asdict(model.learning_rates).values()]
    return {part: any(trains[: index + 1]) for index, part in enumerate(PARTS)}


def part_flops(
    model: VisionLanguageModel,
    sizes: dict[str, int],
    tokens: Number,
    squared_lengths: Number | Tensor,
    targets: Number,
    images: Number,
) -> dict[str, Number | Tensor]:
    """FLOPs of the forward and backward passes over packed rows: of each part, and of the decoder's head.

    Args:
        model: Says what trains, and the shapes of the attention.
        sizes: From `matmul_parameters`.
        tokens: Tokens of the rows.
        squared_lengths: Sum over the documents of their length squared.
        targets: Supervised tokens.
        images: Pictures.
    """
    linear, attention = forward_flops(model, sizes, tokens, squared_lengths, targets, images)
    input_gradients, weight_gradients = dict(linear), dict(linear)
    patches = model.vision_tower.num_patches
    # pixels need no gradient, nor do the features of a frozen tower
    input_gradients["vision_tower"] -= 2.0 * sizes["patch_embedding"] * images * patches
    if model.learning_rates.vision_tower is None:
        input_gradients["projector"] -= 2.0 * model.projector.products(patches).first * images
    if model.decoder.lora is not None:
        weight_gradients |= {"decoder": 2.0 * sizes["adapters"] * tokens, "head": 0.0}
    rates = asdict(model.learning_rates)
    flows = gradients_flow(model)
    total: dict[str, Number | Tensor] = {}
    for name, forward in linear.items():
        part = "decoder" if name == "head" else name
        total[name] = forward + input_gradients[name] * flows[part] + weight_gradients[name] * (rates[part] is not None)
        total[name] = total[name] + attention[name] * (3 if flows[part] else 1)
    return total


def step_flops(
    model: VisionLanguageModel, sizes: dict[str, int], tokens: int, squared_lengths: Number | Tensor, targets: int, images: int
) -> Number | Tensor:
    """FLOPs of the forward and backward passes over packed rows; the arguments are those of `part_flops`."""
    return sum(part_flops(model, sizes, tokens, squared_lengths, targets, images).values())


def recomputed_flops(
    model: VisionLanguageModel, sizes: dict[str, int], tokens: Number, squared_lengths: Number, images: Number
) -> float:
    """FLOPs that checkpointing whole blocks adds: their forward pass once more, where gradients flow.

    The last matrix of a block is left out: backward needs its input and not its result, so that PyTorch stops before it. Selective
    checkpointing computes no product again, hence adds nothing.
    """
    _, attention = forward_flops(model, sizes, tokens, squared_lengths, targets=0, images=images)
    tower = model.vision_tower
    again = {
        "vision_tower": 2.0 * _without_last(tower.blocks()) * images * (tower.num_patches + tower.has_class_token),
        "projector": 2.0 * model.projector.products(tower.num_patches).blocks * images,
        "decoder": 2.0 * _without_last(model.decoder.blocks()) * tokens,
    }
    return float(sum((again[name] + attention[name]) * flows for name, flows in gradients_flow(model).items()))


def _without_last(blocks: list[nn.Module]) -> int:
    """Weights of blocks in matrices, but for the last one of each."""
    shapes = [[whole_shape(p) for p in block.parameters() if len(whole_shape(p)) == 2] for block in blocks]
    return sum(shape.numel() for of_block in shapes for shape in of_block[:-1])


def forward_flops(
    model: VisionLanguageModel,
    sizes: dict[str, int],
    tokens: Number,
    squared_lengths: Number | Tensor,
    targets: Number,
    images: Number,
) -> tuple[dict[str, float], dict[str, Number | Tensor]]:
    """FLOPs of the forward pass in the linear layers and in the attention; the arguments are those of `part_flops`."""
    tower = model.vision_tower
    read = tower.num_patches + tower.has_class_token
    projector = model.projector.products(tower.num_patches)
    linear = {
        "vision_tower": 2.0 * (sizes["vision_tower"] * read + sizes["patch_embedding"] * tower.num_patches) * images,
        "projector": 2.0 * projector.linear * images,
        "decoder": 2.0 * (sizes["decoder"] + sizes["adapters"]) * tokens,
        "head": 2.0 * sizes["head"] * targets,
    }
    attention = {
        "vision_tower": 4.0 * len(tower.blocks()) * images * read**2 * tower.feature_dim,
        "projector": 2.0 * projector.attention * images,
        "decoder": 2.0 * len(model.decoder.blocks()) * squared_lengths * query_dim(model.decoder),
        "head": 0.0,
    }
    return linear, attention
