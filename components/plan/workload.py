"""Workload: what a recipe trains, in numbers, read from a model on the meta device."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from typing import Any

from torch import nn

from components.decoder import Decoder
from components.errors import RecipeError
from components.flops import gradients_flow, matmul_parameters, part_flops, query_dim, recomputed_flops
from components.sharding.units import units
from components.vlm import VisionLanguageModel

Number = int | float


@dataclass(frozen=True, eq=False)  # known by identity, which makes sums over them quick to look up
class Parameter:
    """One tensor of weights.

    Args:
        shape: As it is before sharding.
        trained: Whether it has a gradient.
    """

    shape: tuple[int, ...]
    trained: bool

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    def padded(self, shards: int) -> int:
        """Numbers in it when its rows are filled up to a multiple of `shards`, as FSDP2 holds and sends it."""
        return -(-self.shape[0] // shards) * shards * prod(self.shape[1:])


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together and whose gradients are reduced together.

    Args:
        name: Where in the model it is; that of the root is `model`.
        parameters: All of them.
        gradients_flow: Whether a backward pass goes through it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    gradients_flow: bool

    @cached_property
    def trained(self) -> "Unit":
        """The part of it that trains."""
        return replace(self, parameters=tuple(parameter for parameter in self.parameters if parameter.trained))

    @property
    def is_root(self) -> bool:
        """Whether it holds what the decoder has outside its blocks, which stays gathered from forward to backward."""
        return self.name == "model"

    @cache  # noqa: B019 - a plan asks for the same few sums thousands of times
    def padded(self, shards: int) -> int:
        """Numbers of an all-gather."""
        return sum(parameter.padded(shards) for parameter in self.parameters)

    @cache  # noqa: B019
    def padded_trained(self, shards: int) -> int:
        """Numbers of a reduce-scatter; 0 where nothing trains."""
        return self.trained.padded(shards)


@dataclass(frozen=True)
class Part:
    """Vision tower, projector or decoder, in numbers of parameters.

    Args:
        parameters: All of them.
        trained_parameters: Those that train.
        blocks: Blocks.
        block_parameters: Those of its largest block; 0 without blocks.
        rest_parameters: Those outside the blocks.
        trained: Whether it has a learning rate.
        gradients_flow: Whether gradients pass through it, on their way to itself or to a part before it.
    """

    parameters: int
    trained_parameters: int
    blocks: int
    block_parameters: int
    rest_parameters: int
    trained: bool
    gradients_flow: bool


@dataclass(frozen=True)
class Blocks:
    """Shape of a stack of transformer blocks.

    Args:
        layers: Blocks.
        width: Width of the residual stream.
        mlp_dim: Width inside the MLP.
        query_dim: Width of the queries: heads times their width.
        key_dim: Width of the keys, and of the values.
    """

    layers: int
    width: int
    mlp_dim: int
    query_dim: int
    key_dim: int


@dataclass(frozen=True)
class Adapters:
    """Widths of the adapters of a block, each summed over the layers that have one.

    Args:
        inputs: What they read.
        ranks: What they make of it.
        outputs: What they add to the results of their layers.
        dropout: Whether they miss some of their inputs in training.
    """

    inputs: int
    ranks: int
    outputs: int
    dropout: bool


@dataclass(frozen=True)
class Workload:
    """What a recipe trains.

    Args:
        parts: `vision_tower`, `projector` and `decoder`.
        units: What of them is gathered and reduced together.
        tower: Shape of the tower's blocks.
        decoder: Shape of the decoder's blocks.
        vocab_size: Width of the logits.
        image_size: Side of a picture, in pixels.
        num_patches: Patch features of a picture.
        tokens_per_image: Visual tokens of a picture.
        images_per_sample: Pictures of the mean sample.
        text_tokens: Text tokens of the mean sample.
        target_tokens: Supervised tokens of the mean sample.
        global_batch_size: Samples of an optimizer step.
        max_steps: Optimizer steps of the run.
        flops: FLOPs of the mean sample, forward and backward, of `vision_tower`, `projector`, `decoder` and `head`.
        recomputed_flops: FLOPs that full activation checkpointing adds to the mean sample.
        adapters: Those of a block of the decoder; None: it has none.
    """

    parts: dict[str, Part]
    units: tuple[Unit, ...]
    tower: Blocks
    decoder: Blocks
    vocab_size: int
    image_size: int
    num_patches: int
    tokens_per_image: int
    images_per_sample: Number
    text_tokens: Number
    target_tokens: Number
    global_batch_size: int
    max_steps: int
    flops: dict[str, float]
    recomputed_flops: float
    adapters: Adapters | None = None

    @property
    def tokens(self) -> float:
        """Tokens of the mean sample, visual ones and text."""
        return float(self.images_per_sample * self.tokens_per_image + self.text_tokens)

    @property
    def flops_per_sample(self) -> float:
        """FLOPs of the mean sample, forward and backward, without recomputation."""
        return sum(self.flops.values())

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.global_batch_size * self.max_steps


def workload_of(
    model: VisionLanguageModel,
    *,
    text_tokens: Number,
    target_tokens: Number,
    images_per_sample: Number,
    global_batch_size: int,
    max_steps: int,
) -> Workload:
    """What a built model trains: its layers exist, on the meta device or elsewhere, and its adapters are inserted.

    Args:
        model: After `build` and `adapt`.
        text_tokens: Text tokens of the mean sample, >= 1.
        target_tokens: Supervised tokens of the mean sample, in [0, text_tokens].
        images_per_sample: Pictures of the mean sample, >= 0.
        global_batch_size: Samples of an optimizer step, >= 1.
        max_steps: Optimizer steps of the run, >= 1.

    Raises:
        RecipeError: A number is out of range.
    """
    if text_tokens < 1 or not 0 <= target_tokens <= text_tokens or images_per_sample < 0:
        raise RecipeError(
            f"The mean sample has {text_tokens} text tokens, {target_tokens} supervised tokens and {images_per_sample} pictures. "
            "State at least 1 text token, at most as many supervised ones, and no fewer than 0 pictures."
        )
    if global_batch_size < 1 or max_steps < 1:
        raise RecipeError(f"max_steps is {max_steps}, data.global_batch_size {global_batch_size}: state at least 1 of each.")
    tower, decoder = model.vision_tower, model.decoder
    flows = gradients_flow(model)
    config: Any = decoder.lm.config
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tokens_per_image = model.projector.num_tokens(tower.num_patches)
    tokens = images_per_sample * tokens_per_image + text_tokens
    sizes = matmul_parameters(model)
    flops = part_flops(model, sizes, tokens, tokens**2, target_tokens, images_per_sample)
    return Workload(
        parts={name: _part(model, name, flows[name]) for name in model.parts},
        units=_units(model),
        tower=Blocks(
            layers=len(tower.blocks()),
            width=tower.feature_dim,
            mlp_dim=_mlp_dim(tower.blocks()[0]),
            query_dim=tower.feature_dim,
            key_dim=tower.feature_dim,
        ),
        decoder=Blocks(
            layers=len(decoder.blocks()),
            width=decoder.embed_dim,
            mlp_dim=_mlp_dim(decoder.blocks()[0]),
            query_dim=query_dim(decoder),
            key_dim=query_dim(decoder) // config.num_attention_heads * key_heads,
        ),
        vocab_size=decoder.vocab_size,
        image_size=tower.image_size,
        num_patches=tower.num_patches,
        tokens_per_image=tokens_per_image,
        images_per_sample=images_per_sample,
        text_tokens=text_tokens,
        target_tokens=target_tokens,
        global_batch_size=global_batch_size,
        max_steps=max_steps,
        flops={name: float(number) for name, number in flops.items()},
        recomputed_flops=recomputed_flops(model, sizes, tokens, tokens**2, images_per_sample),
        adapters=_adapters(decoder),
    )


def _adapters(decoder: Decoder) -> Adapters | None:
    if decoder.lora is None:
        return None
    shapes = [parameter.shape for parameter in decoder.blocks()[0].parameters() if parameter.requires_grad]
    down, up = shapes[::2], shapes[1::2]
    return Adapters(
        inputs=sum(width for _, width in down),
        ranks=sum(rank for rank, _ in down),
        outputs=sum(width for width, _ in up),
        dropout=decoder.lora.dropout > 0,
    )


def _part(model: VisionLanguageModel, name: str, flows: bool) -> Part:
    part = model.parts[name]
    parameters = sum(parameter.numel() for parameter in part.parameters())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in part.blocks()]
    return Part(
        parameters=parameters,
        trained_parameters=sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad),
        blocks=len(blocks),
        block_parameters=max(blocks, default=0),
        rest_parameters=parameters - sum(blocks),
        trained=getattr(model.learning_rates, name) is not None,
        gradients_flow=flows,
    )


def _units(model: VisionLanguageModel) -> tuple[Unit, ...]:
    blocks = [block for part in model.parts.values() for block in part.blocks()]
    return tuple(
        Unit(unit.name, tuple(Parameter(tuple(p.shape), p.requires_grad) for p in unit.parameters), unit.gradients_flow)
        for unit in units(model, blocks)
    )


def _mlp_dim(block: nn.Module) -> int:
    """The widest input of a matrix in a block: that of the layer that leaves the MLP."""
    return max(parameter.shape[1] for parameter in block.parameters() if parameter.ndim == 2)
