"""Workload: what a recipe trains, in numbers."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
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
        """Numbers in it when the first dimension is filled up to a multiple of `shards`, as FSDP2 sends and stores it."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // shards) * shards * prod(self.shape[1:])


@dataclass(frozen=True)
class Part:
    """Vision tower, projector or decoder.

    Args:
        blocks: Parameters of each block, in the order of the blocks.
        rest: Parameters outside the blocks.
        trained: Whether it has a learning rate.
        gradients_flow: Whether gradients pass through it, on their way to itself or to a part before it.
    """

    blocks: tuple[tuple[Parameter, ...], ...]
    rest: tuple[Parameter, ...]
    trained: bool
    gradients_flow: bool

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """All parameters."""
        return tuple(parameter for block in self.blocks for parameter in block) + self.rest

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.size for parameter in self.tensors)

    @property
    def trained_parameters(self) -> int:
        """Numbers in the trained parameters."""
        return sum(parameter.size for parameter in self.tensors if parameter.trained)


@dataclass(frozen=True)
class Blocks:
    """Shape of a stack of transformer blocks.

    Args:
        layers: Blocks.
        width: Width of the residual stream.
        mlp_dim: Width inside the MLP.
        heads: Heads of the queries.
        key_value_heads: Heads of keys and values.
        head_dim: Width of a head.
    """

    layers: int
    width: int
    mlp_dim: int
    heads: int
    key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Workload:
    """What a recipe trains.

    Args:
        parts: `vision_tower`, `projector` and `decoder`.
        tower: Shape of the tower's blocks.
        decoder: Shape of the decoder's blocks.
        vocab_size: Width of the logits.
        image_size: Side of a picture, in pixels.
        num_patches: Patch features of a picture.
        tokens_per_image: Visual tokens of a picture.
        images_per_sample: Pictures of a sample, on average.
        text_tokens: Text tokens of a sample, on average.
        target_tokens: Supervised tokens of a sample, on average.
        global_batch_size: Samples of an optimizer step.
        max_steps: Optimizer steps of the run.
        flops: FLOPs of forward and backward of a sample: `vision_tower`, `projector`, `decoder`, `head`.
        recomputed_flops: FLOPs that full activation checkpointing adds to a sample.
    """

    parts: dict[str, Part]
    tower: Blocks
    decoder: Blocks
    vocab_size: int
    image_size: int
    num_patches: int
    tokens_per_image: int
    images_per_sample: float
    text_tokens: float
    target_tokens: float
    global_batch_size: int
    max_steps: int
    flops: dict[str, float]
    recomputed_flops: float

    @property
    def tokens(self) -> float:
        """Tokens of a sample, visual ones and text."""
        return self.images_per_sample * self.tokens_per_image + self.text_tokens

    @property
    def flops_per_sample(self) -> float:
        """FLOPs of forward and backward of a sample, without recomputation."""
        return sum(self.flops.values())

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.global_batch_size * self.max_steps
