"""Projectors: sizes that others published, patches that must not move, gradients that must arrive."""

import pytest
import torch
from torch import nn

from components.errors import RecipeError
from components.projector import MLP, Linear, PixelShuffle, Resampler


def connected(projector, feature_dim=16, embed_dim=24):
    torch.manual_seed(0)
    projector.connect(feature_dim=feature_dim, embed_dim=embed_dim)
    return projector


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("projector", "embed_dim", "parameters"),
    [
        (MLP(depth=2), 4096, 20_979_712),
        (MLP(depth=2), 5120, 31_467_520),
        (MLP(depth=1), 4096, 4_198_400),
        (MLP(depth=3), 4096, 37_761_024),
        (Linear(), 4096, 4_198_400),
        (PixelShuffle(factor=2, depth=2), 4096, 33_562_624),
        (Resampler(num_queries=64, depth=2, num_heads=16), 4096, 29_454_336),
    ],
)
def test_number_of_parameters_for_clip_vit_l(projector, embed_dim, parameters):
    with torch.device("meta"):
        connected(projector, feature_dim=1024, embed_dim=embed_dim)
    assert num_parameters(projector) == parameters


def test_mlp_computes_llavas_mlp2x_gelu():
    projector = connected(MLP(depth=2))
    reference = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24))
    names = {f"mm_projector.{name}" for name in reference.state_dict()}
    assert {name.replace("layers.", "mm_projector.") for name in projector.state_dict()} == names
    reference.load_state_dict(projector.layers.state_dict())
    features = torch.randn(2, 9, 16)
    assert torch.equal(projector(features), reference(features))


@pytest.mark.parametrize(
    ("projector", "num_patches", "num_tokens"),
    [
        (Linear(), 576, 576),
        (MLP(), 7, 7),
        (PixelShuffle(factor=2), 576, 144),
        (PixelShuffle(factor=3), 729, 81),
        (PixelShuffle(factor=1), 9, 9),
        (Resampler(num_queries=10, depth=1, num_heads=2), 16, 10),
    ],
)
def test_number_of_tokens(projector, num_patches, num_tokens):
    assert projector.num_tokens(num_patches) == num_tokens
    assert connected(projector)(torch.randn(2, num_patches, 16)).shape == (2, num_tokens, 24)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_joins_square_neighbourhoods_in_reading_order(factor):
    side, dim = 6, 5
    projector = connected(PixelShuffle(factor=factor, depth=1), feature_dim=dim)
    projector.layers = nn.Identity()
    features = torch.randn(2, side * side, dim)
    expected = []
    for row in range(0, side, factor):
        for column in range(0, side, factor):
            places = [(row + y) * side + column + x for y in range(factor) for x in range(factor)]
            expected.append(torch.cat([features[:, place] for place in places], dim=-1))
    assert torch.equal(projector(features), torch.stack(expected, dim=1))


def test_resampler_sees_every_patch_from_every_token():
    projector = connected(Resampler(num_queries=5, depth=2, num_heads=4))
    features = torch.randn(1, 36, 16, requires_grad=True)
    tokens = projector(features)
    for token in tokens[0]:
        (gradient,) = torch.autograd.grad(token[0], features, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_resampler_knows_where_a_patch_lies():
    projector = connected(Resampler(num_queries=4, depth=1, num_heads=4)).eval()
    features = torch.randn(1, 36, 16)
    swapped = features[:, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    assert (projector(features) - projector(swapped)).abs().max() > 0.01


def test_resampler_starts_by_looking_at_places():
    """A mark in one corner changes the token of that corner's query most."""
    projector = connected(Resampler(num_queries=4, depth=1, num_heads=4), feature_dim=64)
    features = torch.randn(64, 36, 64)
    for corner, place in enumerate((7, 10, 25, 28)):
        marked = features.clone()
        marked[:, place] = torch.randn(64, 64)
        change = (projector(marked) - projector(features)).norm(dim=-1).mean(dim=0)
        assert change.argmax() == corner


@pytest.mark.parametrize("projector", [Linear(), MLP(), PixelShuffle(), Resampler(num_queries=4, depth=2, num_heads=4)])
def test_every_parameter_learns(projector):
    connected(projector)(torch.randn(2, 16, 16)).square().sum().backward()
    assert [name for name, parameter in projector.named_parameters() if not parameter.grad.any()] == []


def test_half_precision_stays_half_precision():
    for projector in (PixelShuffle(), Resampler(num_queries=4, depth=1, num_heads=4)):
        tokens = connected(projector).bfloat16()(torch.randn(1, 16, 16).bfloat16())
        assert tokens.dtype == torch.bfloat16


def test_blocks_hold_the_attention_of_the_resampler():
    assert len(connected(Resampler(num_queries=4, depth=3, num_heads=4)).blocks()) == 3
    assert connected(MLP()).blocks() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(depth=0), "MLP has depth: 0"),
        (lambda: PixelShuffle(factor=0), "PixelShuffle has factor: 0"),
        (lambda: Resampler(num_queries=0, depth=1, num_heads=1), "Resampler has num_queries: 0"),
        (lambda: PixelShuffle(factor=2).num_tokens(81), r"9 x 9 patch grid. Choose a factor of \[1, 3, 9\]"),
        (lambda: PixelShuffle(factor=2).num_tokens(50), "square patch grid, and the vision tower gives 50"),
        (lambda: Resampler(num_queries=4, depth=1, num_heads=1).num_tokens(50), "square patch grid"),
        (lambda: connected(Resampler(num_queries=4, depth=1, num_heads=3)), "feature_dim 16 by 3"),
        (lambda: connected(Resampler(num_queries=4, depth=1, num_heads=1), feature_dim=18), "feature_dim 18 by 4"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
