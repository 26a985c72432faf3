"""Models built without memory: filled to the last number or refused, and random only in what no file holds."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_recipe import RECIPE, fit, write_recipe
from tiny import LLAMA, TOWER, TOWER_FROZEN, fill

import main
from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.projector import MLP
from components.run_folder import STATE, checkpoint_folder
from components.sharding import demand_finite, give_memory
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import VisionLanguageModel

CPU = torch.device("cpu")


def model_of(decoder=LLAMA, pretrained=None, weights=None, lora=None, depth=2):
    return VisionLanguageModel(
        vision_tower=OpenClipTower(config=TOWER, pretrained=pretrained, feature_layer=-1),
        projector=MLP(depth=depth),
        decoder=HuggingFaceDecoder(decoder, WordTokenizer(), weights, lora),
        learning_rates=TOWER_FROZEN,
    )


def started(**arguments):
    model = model_of(**arguments)
    model.configure_model()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of the tiny tower and of the tiny decoder."""
    folder = tmp_path_factory.mktemp("weights")
    model = started()
    fill(model)
    save_file(model.vision_tower.visual.state_dict(), folder / "tower.safetensors")
    model.decoder.lm.save_pretrained(folder / "decoder")
    return {"pretrained": str(folder / "tower.safetensors"), "weights": str(folder / "decoder")}


# --- memory


@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_not_a_number_until_it_is_filled(tied):
    model = model_of({**LLAMA, "tie_word_embeddings": tied})
    with torch.device("meta"):
        model.build()
    before = dict(model.named_parameters())
    trained = {name for name, parameter in before.items() if parameter.requires_grad}
    give_memory(model, CPU)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items()) and after.keys() == before.keys()
    assert all(type(parameter) is torch.nn.Parameter and parameter.isnan().all() for parameter in after.values())
    assert {name for name, parameter in after.items() if parameter.requires_grad} == trained
    lm = model.decoder.lm
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    model.decoder.reset_buffers()
    assert all(torch.equal(value, dict(started().named_buffers())[name]) for name, value in model.named_buffers())
    fill(model)
    demand_finite(model)


def test_what_has_memory_stays_as_it_is():
    model = started()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    give_memory(model, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["projector.layers.2.bias", "decoder.lm.model.rotary_emb.inv_freq"])
def test_what_is_not_finite_is_named(name, value):
    model = started()
    demand_finite(model)
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    tensor.data.view(-1)[1] = value
    with pytest.raises(RecipeError, match=rf"hold NaN or infinite numbers, or nothing at all:\n  {name}\n"):
        demand_finite(model)


def test_what_is_left_on_the_meta_device_is_named():
    model = model_of()
    model.build(on_meta={"projector"})
    with pytest.raises(RecipeError, match=r"projector\.layers\.0\.weight\n  projector\.layers\.0\.bias\n"):
        demand_finite(model)


@pytest.mark.parametrize("part", ["weights", "pretrained"])
def test_a_file_with_a_number_that_is_none(part, files, tmp_path):
    model = started(**files)
    module = model.decoder.lm if part == "weights" else model.vision_tower.visual
    name = "model.layers.1.mlp.up_proj.weight" if part == "weights" else "conv1.weight"
    module.state_dict()[name][3, 2] = math.nan
    if part == "weights":
        module.save_pretrained(tmp_path / "spoilt")
    else:
        save_file(module.state_dict(), tmp_path / "spoilt")
        (tmp_path / "spoilt").rename(tmp_path / "spoilt.safetensors")
    spoilt = str(tmp_path / ("spoilt" if part == "weights" else "spoilt.safetensors"))
    with pytest.raises(RecipeError, match=rf"NaN or infinite numbers, or nothing at all:\n  \w+\.\w+\.{name}\n"):
        started(**{**files, part: spoilt})


# --- random numbers


def test_random_weights_do_not_depend_on_what_is_read(files, monkeypatch):
    def drawn(**arguments):
        torch.manual_seed(3)
        model = started(**arguments)
        assert torch.initial_seed() == 3 and torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(3)))
        return {name: value for name, value in model.state_dict().items() if name.startswith("projector")}

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    expected = drawn()
    lora = LoRA(rank=2, alpha=2.0)
    for arguments in (files, {"pretrained": files["pretrained"]}, {"decoder": {**LLAMA, "num_hidden_layers": 1}}, {"lora": lora}):
        found = drawn(**arguments)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not any(torch.equal(value, expected[name]) for name, value in drawn().items())


def test_adapters_start_as_those_of_peft_whatever_they_lie_beside(files):
    lora = LoRA(rank=4, alpha=4.0)
    fresh, beside_files = started(lora=lora), started(lora=lora, **files)
    adapters = {name: value for name, value in fresh.state_dict().items() if ".lora_" in name}
    assert len(adapters) == 2 * 7 * LLAMA["num_hidden_layers"]
    assert all(torch.equal(value, beside_files.state_dict()[name]) for name, value in adapters.items())
    for name, value in adapters.items():  # Kaiming's uniform distribution with a = sqrt(5), and zeros
        bound = value.shape[1] ** -0.5 if "lora_A" in name else 0
        assert bound * 0.8 <= value.abs().max() <= bound
    down = torch.stack([value for name, value in adapters.items() if "lora_A" in name and value.shape == (4, 32)])
    assert len(torch.unique(down[:, 0, 0])) == len(down)  # no two alike
    theirs = started(**files).state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in beside_files.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in theirs.items())


# --- continuing


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("start", ["parts", "run"])
def test_a_run_continues_without_the_files_it_started_from(start, tmp_path, monkeypatch, capsys):
    """And is validated without them."""
    monkeypatch.chdir(tmp_path)
    architecture = RECIPE["model"]["decoder"]["init_args"]["config"]
    earlier = model_of(architecture)
    earlier.configure_model()
    earlier.decoder.lm.save_pretrained(tmp_path / "decoder")
    save_file(earlier.vision_tower.visual.state_dict(), tmp_path / "tower.safetensors")
    named = {"vision_tower": {"init_args": {"pretrained": "tower.safetensors", "feature_layer": -1}}}
    model = {**named, "decoder": {"init_args": {"weights": "decoder"}}}
    if start == "run":
        assert fit(write_recipe(tmp_path / "first.yaml")) == 0
        model = {"initial_weights": "runs/first"}
    recipe = write_recipe(tmp_path / "small.yaml", model=model)
    assert fit(recipe) == 0
    state = checkpoint_folder(Path("runs/small"), 4)
    expected = torch.load(state / STATE)["state_dict"]
    state.rename(tmp_path / "last")
    for name in ("decoder", "tower.safetensors", "runs/first"):
        if Path(name).exists():
            Path(name).rename(f"{Path(name).name} is gone")
    assert fit(recipe) == 0
    assert "continues at step 2 of 4" in capsys.readouterr().out
    found = torch.load(state / STATE)["state_dict"]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert main.main(["validate", "--config", str(recipe)]) == 0
    assert fit(write_recipe(tmp_path / "other.yaml", model=model)) == 2  # a new run needs them
