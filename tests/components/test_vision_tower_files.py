"""The vision tower's weights in open_clip's files: whole models, towers alone, training checkpoints, tags; and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from small_towers import TINY, built, on_meta, whole_clip
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from components.errors import RecipeError
from components.vision_tower import OpenClipTower


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["pt", "safetensors", "training checkpoint", "half precision", "tower only"])
def test_weights_from_a_file(form, pixels, tmp_path):
    clip = whole_clip().eval()
    state = clip.state_dict()
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "training checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form == "tower only":
        torch.save(clip.visual.state_dict(), path)
    elif form == "half precision":
        clip = clip.half().float()
        torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    tower = built(config=TINY, pretrained=str(path))
    assert all(parameter.dtype == torch.float32 for parameter in tower.parameters())
    normalised = (pixels / 255 - torch.tensor(tower.mean)[:, None, None]) / torch.tensor(tower.std)[:, None, None]
    with torch.no_grad():
        expected = clip.visual.forward_intermediates(normalised, indices=[2], output_fmt="NLC")["image_intermediates"][0]
        torch.testing.assert_close(tower(pixels), expected)


def test_weights_into_sharded_layers(tmp_path):
    """After a meta build: shard, allocate, load."""
    clip = whole_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower = on_meta(config=TINY, pretrained=str(tmp_path / "clip.pt"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*tower.blocks(), tower):
            fully_shard(module, mesh=mesh)
        tower.to_empty(device="cpu")
        tower.load_weights()
        loaded = {name: parameter.full_tensor() for name, parameter in tower.named_parameters()}
    finally:
        distributed.destroy_process_group()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, clip.state_dict()[name]), name


def test_position_table_of_another_picture_size_is_resized(tmp_path):
    torch.save(whole_clip(image_size=64).state_dict(), tmp_path / "large.pt")
    tower = built(config=TINY, pretrained=str(tmp_path / "large.pt"))
    table = whole_clip(image_size=64).visual.positional_embedding
    grid = table[1:].T.reshape(1, 64, 8, 8)
    expected = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(tower.visual.positional_embedding, torch.cat([table[:1], expected]))


def drop_a_block(state):
    return {name: tensor for name, tensor in state.items() if ".resblocks.1." not in name}


def add_a_block(state):
    return state | {name.replace("resblocks.0", "resblocks.4"): tensor for name, tensor in state.items()}


def widen(state):
    return state | {"visual.ln_pre.bias": torch.zeros(65)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_block, "missing: transformer.resblocks.1.ln_1.weight (64,)"),
        (add_a_block, "unexpected: transformer.resblocks.4.ln_1.weight (64,)"),
        (widen, "ln_pre.bias is (65,), should be (64,)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(spoil, message, tmp_path):
    torch.save(spoil(whole_clip().state_dict()), tmp_path / "clip.pt")
    tower = OpenClipTower(config=TINY, pretrained=str(tmp_path / "clip.pt"))
    tower.build()
    before = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    with pytest.raises(RecipeError) as error:
        tower.load_weights()
    assert message in str(error.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in tower.named_parameters())


def test_weights_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for name, message in (("broken.pt", "could not be read"), ("absent.pt", "are not a file")):
        tower = OpenClipTower(config=TINY, pretrained=str(tmp_path / name))
        tower.build()
        with pytest.raises(RecipeError, match=message):
            tower.load_weights()


def test_weights_of_a_tag_come_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "components.vision_tower.open_clip_tower.download_pretrained", lambda tag: str(tmp_path / tag["hf_hub"].strip("/"))
    )
    tower = OpenClipTower(model_name="ViT-B-32-quickgelu", pretrained="openai", feature_layer=0)
    tower.build()
    state = {name: torch.randn_like(tensor) for name, tensor in tower.visual.state_dict().items()}
    (tmp_path / "timm").mkdir()
    torch.save({f"visual.{name}": tensor for name, tensor in state.items()}, tmp_path / "timm/vit_base_patch32_clip_224.openai")
    tower.load_weights()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.visual.state_dict().items())


def test_a_tag_that_cannot_be_fetched(monkeypatch):
    def unreachable(tag):
        raise FileNotFoundError("no network")

    monkeypatch.setattr("components.vision_tower.open_clip_tower.download_pretrained", unreachable)
    tower = on_meta(model_name="ViT-B-32-quickgelu", pretrained="openai")
    with pytest.raises(RecipeError, match=r"'openai' could not be fetched: no network"):
        tower.load_weights()


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("inside", ["state_dict", "whole"])
def test_code_in_a_checkpoint_is_refused(inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {**whole_clip().state_dict(), "visual.extra": Payload()}
    torch.save({"state_dict": state} if inside == "state_dict" else state, "clip.pt", pickle_protocol=pickle.DEFAULT_PROTOCOL)
    tower = OpenClipTower(config=TINY, pretrained="./clip.pt")
    tower.build()
    with pytest.raises(RecipeError, match=r"'./clip.pt' could not be read as an open_clip checkpoint: clip.pt holds code"):
        tower.load_weights()
    assert not (tmp_path / "executed").exists()
