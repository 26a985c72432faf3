"""Matmul FLOPs of a training step: two per multiply-add, causal attention counted at half, recomputation counted apart.

A frozen part costs its forward pass; a frozen part that gradients flow through, the gradients of its activations too; a trained
part, also those of its weights. Adapters are a trained part inside a frozen one. Attention has no weights, so its backward is
twice its forward wherever gradients flow.

Source: arXiv 2204.02311 (PaLM), appendix B, for the definitions of MFU and HFU. Differs: attention is causal and inside documents
only, and only the positions that are computed count (the head runs on supervised positions alone). Left out, as about 1 % of a
large model: the patch embedding, and a resampler's reading of the patches.
"""

from dataclasses import asdict

from torch import Tensor, nn

from components.gpus import PEAK_TFLOPS
from components.sharding import whole_shape
from components.vlm import VisionLanguageModel

Number = int | float

PARTS = ("vision_tower", "projector", "decoder")


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device in bf16, or None when it is not known."""
    return next((peak * 1e12 for word, peak in PEAK_TFLOPS.items() if word in device_name), None)


def matmul_parameters(model: VisionLanguageModel) -> dict[str, int]:
    """Weights of each part that are multiplied with every token, and of the head and adapters, in numbers of parameters."""
    inside: dict[str, list[nn.Module]] = {
        "projector": [model.projector], "vision_tower": model.vision_tower.blocks(), "decoder": model.decoder.blocks(),
    }  # fmt: skip
    sizes = {}
    for name, modules in inside.items():
        shapes = [whole_shape(parameter) for module in modules for parameter in module.parameters()]
        sizes[name] = sum(shape.numel() for shape in shapes if len(shape) == 2)
    # what an adapted layer trains, it multiplies in addition to its own weights
    sizes["adapters"] = sum(whole_shape(p).numel() for p in model.decoder.trainable_parameters()) if model.decoder.lora else 0
    sizes["decoder"] -= sizes["adapters"]
    sizes["head"] = model.decoder.embed_dim * model.decoder.vocab_size
    return sizes


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
    weight_gradients = dict(linear)
    if model.decoder.lora is not None:
        weight_gradients |= {"decoder": 2.0 * sizes["adapters"] * tokens, "head": 0.0}
    rates = asdict(model.learning_rates)
    flows = gradients_flow(model)
    total: dict[str, Number | Tensor] = {}
    for name, forward in linear.items():
        part = "decoder" if name == "head" else name
        total[name] = forward * (1 + flows[part]) + weight_gradients[name] * (rates[part] is not None)
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

    The last matrix of a block is left out: backward needs its input and not its result, so that PyTorch stops before it.
    """
    linear, attention = forward_flops(model, sizes, tokens, squared_lengths, targets=0, images=images)
    total = {**sizes, "decoder": sizes["decoder"] + sizes["adapters"]}
    again = 0.0
    for name, flows in gradients_flow(model).items():
        blocks = model.parts[name].blocks() if flows else []
        needed = sum(p.numel() for block in blocks for p in [p for p in block.parameters() if p.ndim == 2][:-1])
        again += float(linear[name] * needed / total[name] + attention[name] * bool(blocks))
    return again


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
    patches = tower.num_patches + tower.has_class_token
    visual = model.projector.num_tokens(tower.num_patches)
    linear = {
        "vision_tower": 2.0 * sizes["vision_tower"] * images * patches,
        "projector": 2.0 * sizes["projector"] * images * visual,
        "decoder": 2.0 * (sizes["decoder"] + sizes["adapters"]) * tokens,
        "head": 2.0 * sizes["head"] * targets,
    }
    attention = {
        "vision_tower": 4.0 * len(tower.blocks()) * images * patches**2 * tower.feature_dim,
        "projector": 0.0,
        "decoder": 2.0 * len(model.decoder.blocks()) * squared_lengths * model.decoder.embed_dim,
        "head": 0.0,
    }
    return linear, attention
