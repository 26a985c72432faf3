"""Projectors: from patch features to visual tokens of the decoder's width (LLaVA-1.5, arXiv 2310.03744, section 3.3)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from components.errors import RecipeError


@dataclass(frozen=True)
class Products:
    """Multiplications of the forward pass of a picture.

    Args:
        linear: In layers with weights.
        attention: Of queries with keys, and of what they choose with values.
        first: What of `linear` is in a layer that reads the patch features as they are.
        blocks: What of `linear` is in blocks, without the last layer of each.
    """

    linear: int
    attention: int
    first: int
    blocks: int


class Projector(LightningModule, ABC):
    """Patch features in, visual tokens out. Layers exist after `connect`."""

    has_weights = False
    """No projector names weights of its own."""

    @abstractmethod
    def connect(self, *, feature_dim: int, embed_dim: int) -> None:
        """Creates the layers between a tower of width `feature_dim` and a decoder of width `embed_dim`."""

    def num_tokens(self, num_patches: int) -> int:
        """Visual tokens that a picture of `num_patches` patches becomes."""
        return num_patches

    @abstractmethod
    def forward(self, features: Float[Tensor, "images patches feature_dim"]) -> Float[Tensor, "images tokens embed_dim"]:
        """The visual tokens of each picture."""

    def products(self, num_patches: int) -> Products:
        """What a picture of `num_patches` patches costs; here that of linear layers after one another, on every visual token."""
        # the layers know their widths even when their weights are sharded
        layers = [layer.in_features * layer.out_features for layer in self.modules() if isinstance(layer, nn.Linear)]
        tokens = self.num_tokens(num_patches)
        return Products(linear=tokens * sum(layers), attention=0, first=tokens * layers[0], blocks=0)

    def blocks(self) -> list[nn.Module]:
        """Parts large enough to be sharded and checkpointed on their own; none by default."""
        return []


class Linear(Projector):
    """Patch features in, as many visual tokens out: one linear layer.

    Source: LLaVA (arXiv 2304.08485), section 4.1.
    """

    def connect(self, *, feature_dim: int, embed_dim: int) -> None:
        """Creates the layer."""
        self.layers = _mlp(feature_dim, embed_dim, depth=1)

    def forward(self, features: Float[Tensor, "images patches feature_dim"]) -> Float[Tensor, "images tokens embed_dim"]:
        """One token per patch."""
        return self.layers(features)


class MLP(Projector):
    """Patch features in, as many visual tokens out: linear layers with GELU between them.

    Args:
        depth: Number of linear layers, at least 1. 2 is LLaVA-1.5's mlp2x_gelu.

    Raises:
        RecipeError: depth is below 1.

    Source: LLaVA `multimodal_projector/builder.py`; `layers.{0,2}` here is `mm_projector.{0,2}` there.
    """

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        _demand_positive("MLP", depth=depth)
        self.depth = depth

    def connect(self, *, feature_dim: int, embed_dim: int) -> None:
        """Creates the layers."""
        self.layers = _mlp(feature_dim, embed_dim, self.depth)

    def forward(self, features: Float[Tensor, "images patches feature_dim"]) -> Float[Tensor, "images tokens embed_dim"]:
        """One token per patch."""
        return self.layers(features)


class PixelShuffle(Projector):
    """Patch features in, factor x factor times fewer visual tokens out: square neighbourhoods are joined, then an MLP.

    Args:
        factor: Side of the neighbourhood that becomes one token, in patches, at least 1; it must divide the side of the
            tower's patch grid.
        depth: Number of linear layers after it, at least 1.

    Raises:
        RecipeError: factor or depth is below 1, or the patch grid is not square or not divisible by factor.

    Source: InternVL 1.5 (arXiv 2404.16821), section 3.1. Differs: no LayerNorm before the MLP.
    """

    def __init__(self, factor: int = 2, depth: int = 2) -> None:
        super().__init__()
        _demand_positive("PixelShuffle", factor=factor, depth=depth)
        self.factor = factor
        self.depth = depth

    def connect(self, *, feature_dim: int, embed_dim: int) -> None:
        """Creates the layers."""
        self.layers = _mlp(feature_dim * self.factor**2, embed_dim, self.depth)

    def num_tokens(self, num_patches: int) -> int:
        """Neighbourhoods of the patch grid."""
        side = _grid_side(num_patches, "PixelShuffle")
        if side % self.factor:
            divisors = [factor for factor in range(1, side + 1) if side % factor == 0]
            raise RecipeError(
                f"PixelShuffle cannot join {self.factor} x {self.factor} neighbourhoods of a {side} x {side} patch grid. Choose a "
                f"factor of {divisors}, or a tower with another image size."
            )
        return (side // self.factor) ** 2

    def forward(self, features: Float[Tensor, "images patches feature_dim"]) -> Float[Tensor, "images tokens embed_dim"]:
        """One token per neighbourhood, both in reading order."""
        images, patches, feature_dim = features.shape
        rows = math.isqrt(self.num_tokens(patches))
        grid = features.view(images, rows, self.factor, rows, self.factor, feature_dim)
        return self.layers(grid.transpose(2, 3).reshape(images, rows * rows, self.factor**2 * feature_dim))


class Resampler(Projector):
    """Patch features in, a fixed number of visual tokens out: learned queries that attend to the patches, then a linear layer.

    Args:
        num_queries: Visual tokens per picture, at least 1.
        depth: Number of attention blocks, at least 1.
        num_heads: Attention heads; must divide the tower's feature_dim.

    Raises:
        RecipeError: A number is below 1, the tower's feature_dim is no multiple of num_heads and of 4, or its patch grid is
            not square.

    Source: Flamingo's Perceiver resampler (arXiv 2204.14198), section 3.1.1. Differs: patches carry 2D sine positions,
        and queries start at places of the picture.
    """

    def __init__(self, num_queries: int, depth: int, num_heads: int) -> None:
        super().__init__()
        _demand_positive("Resampler", num_queries=num_queries, depth=depth, num_heads=num_heads)
        self.num_queries = num_queries
        self.depth = depth
        self.num_heads = num_heads

    def connect(self, *, feature_dim: int, embed_dim: int) -> None:
        """Creates the queries and the blocks, of the tower's width, and the layer to the decoder's width."""
        for divisor, reason in ((self.num_heads, "its num_heads"), (4, "the four parts of a 2D position")):
            if feature_dim % divisor:
                raise RecipeError(
                    f"The Resampler cannot divide the tower's feature_dim {feature_dim} by {divisor} ({reason}). Choose a "
                    f"num_heads that divides it, and a tower whose width is a multiple of 4."
                )
        # each query starts at a place of the picture; random queries learn slower
        places = _sine_positions(math.ceil(self.num_queries**0.5), feature_dim)[: self.num_queries]
        self.queries = nn.Parameter(places + 0.02 * torch.randn_like(places))
        self.patch_norm = nn.LayerNorm(feature_dim)
        self.attention_blocks = nn.ModuleList(ResamplerBlock(feature_dim, self.num_heads) for _ in range(self.depth))
        self.output_norm = nn.LayerNorm(feature_dim)
        self.output = nn.Linear(feature_dim, embed_dim)

    def num_tokens(self, num_patches: int) -> int:
        """The number of queries, whatever the picture."""
        _grid_side(num_patches, "Resampler")
        return self.num_queries

    def forward(self, features: Float[Tensor, "images patches feature_dim"]) -> Float[Tensor, "images tokens embed_dim"]:
        """One token per query."""
        images, patches, feature_dim = features.shape
        positions = _sine_positions(_grid_side(patches, "Resampler"), feature_dim, features.device)
        context = self.patch_norm(features) + positions.to(features.dtype)
        hidden = self.queries.to(context.dtype).expand(images, -1, -1)
        for block in self.attention_blocks:
            hidden = block(hidden, context)
        return self.output(self.output_norm(hidden))

    def products(self, num_patches: int) -> Products:
        """What a picture of `num_patches` patches costs: keys and values are made of patches and queries, all else of queries."""
        queries, keys, dim = self.num_queries, num_patches + self.num_queries, self.output.in_features
        # the norm before the first layers trains, so that their inputs need gradients
        return Products(
            linear=self.depth * (10 * queries + 2 * keys) * dim**2 + queries * dim * self.output.out_features,
            attention=self.depth * 2 * queries * keys * dim,
            first=0,
            blocks=self.depth * (6 * queries + 2 * keys) * dim**2,
        )

    def blocks(self) -> list[nn.Module]:
        """The attention blocks."""
        return list(self.attention_blocks)


class ResamplerBlock(nn.Module):
    """Queries and patches in, queries out: attention to the patches and to one another, then an MLP, both pre-norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_key.load_state_dict(self.to_query.state_dict())  # equal at the start: a query attends to what is near it
        self.to_value = nn.Linear(dim, dim, bias=False)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, hidden: Float[Tensor, "images queries dim"], context: Float[Tensor, "images patches dim"]
    ) -> Float[Tensor, "images queries dim"]:
        """The queries after attention and MLP."""
        normed = self.attention_norm(hidden)
        seen = torch.cat([context, normed], dim=1)
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.to_query(normed), self.to_key(seen), self.to_value(seen))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention_output(attended)
        return hidden + self.mlp(self.mlp_norm(hidden))


def _mlp(input_dim: int, embed_dim: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(input_dim, embed_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(embed_dim, embed_dim)]
    return nn.Sequential(*layers)


def _grid_side(num_patches: int, projector: str) -> int:
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise RecipeError(
            f"{projector} needs a square patch grid, and the vision tower gives {num_patches} patches. Choose another tower, or an "
            f"MLP projector."
        )
    return side


def _sine_positions(side: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "places dim"]:
    """Sines and cosines of where the cells of a side x side grid lie in the picture, in reading order."""
    # from half a wave to eight waves across the picture, so that every channel tells places apart on grids of 4 to 32
    frequencies = math.pi * 16 ** torch.linspace(0, 1, dim // 4, device=device)
    angles = (torch.arange(side, device=device) + 0.5)[:, None] / side * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _demand_positive(projector: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise RecipeError(f"{projector} has {name}: {number}. Choose 1 or more.")
