"""Matmul FLOPs of a training step: two per multiply-add, causal attention counted at half, recomputation left out.

A frozen part costs its forward pass; a frozen part that gradients flow through, the gradients of its activations too; a trained
part, also those of its weights. Adapters are a trained part inside a frozen one. Attention has no weights, so its backward is
twice its forward wherever gradients flow.

Source: arXiv 2204.02311 (PaLM), appendix B, for the definition of MFU. Differs: attention is causal and inside documents only, and
only the positions that are computed count (the head runs on supervised positions alone). Left out, as about 1 % of a large model:
the patch embedding, class tokens, and a resampler's reading of the patches.
"""

from torch import Tensor

from components.vlm import VisionLanguageModel

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""Dense bf16 peak of a device by a word of its name, in TFLOP/s."""


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device in bf16, or None when it is not known."""
    return next((peak * 1e12 for word, peak in PEAK_TFLOPS.items() if word in device_name), None)


def matmul_parameters(model: VisionLanguageModel) -> dict[str, int]:
    """Weights of each part that are multiplied with every token, and of the head and adapters, in numbers of parameters."""
    sizes = {name: sum(p.numel() for p in part.parameters() if p.ndim == 2) for name, part in (("projector", model.projector),)}
    for name, part in (("vision_tower", model.vision_tower), ("decoder", model.decoder)):
        sizes[name] = sum(p.numel() for block in part.blocks() for p in block.parameters() if p.ndim == 2)
    # what an adapted layer trains, it multiplies in addition to its own weights
    sizes["adapters"] = sum(p.numel() for p in model.decoder.trainable_parameters()) if model.decoder.lora else 0
    sizes["decoder"] -= sizes["adapters"]
    sizes["head"] = model.decoder.embed_dim * model.decoder.vocab_size
    return sizes


def step_flops(
    model: VisionLanguageModel, sizes: dict[str, int], tokens: int, squared_lengths: float | Tensor, targets: int, images: int
) -> float | Tensor:
    """FLOPs of the forward and backward passes over packed rows.

    Args:
        model: Says what trains, and the shapes of the attention.
        sizes: From `matmul_parameters`.
        tokens: Tokens of the rows.
        squared_lengths: Sum over the documents of their length squared.
        targets: Supervised tokens.
        images: Pictures.
    """
    rates = model.learning_rates
    trains = {"vision_tower": rates.vision_tower, "projector": rates.projector, "decoder": rates.decoder}
    tower, patches = model.vision_tower, model.vision_tower.num_patches
    visual = model.projector.num_tokens(patches)
    forward = {
        "vision_tower": 2.0 * sizes["vision_tower"] * images * patches,
        "projector": 2.0 * sizes["projector"] * images * visual,
        "decoder": 2.0 * ((sizes["decoder"] + sizes["adapters"]) * tokens + sizes["head"] * targets),
    }
    weight_gradients = forward if model.decoder.lora is None else {**forward, "decoder": 2.0 * sizes["adapters"] * tokens}
    attention = {
        "vision_tower": 4.0 * len(tower.blocks()) * images * patches**2 * tower.feature_dim,
        "projector": 0.0,
        "decoder": 2.0 * len(model.decoder.blocks()) * squared_lengths * model.decoder.embed_dim,
    }
    total: float | Tensor = 0.0
    gradients_flow = False
    for part in ("vision_tower", "projector", "decoder"):
        trained = trains[part] is not None
        gradients_flow = gradients_flow or trained
        total = total + forward[part] * (1 + gradients_flow) + weight_gradients[part] * trained
        total = total + attention[part] * (3 if gradients_flow else 1)
    return total
