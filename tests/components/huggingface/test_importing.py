"""`import`: a released model becomes a run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from llava_folders import ROWS, WORDS_KNOWN, hugging_face_folder, original_folder, state_of, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from small_recipe import fit, write_recipe

import main
from components.rebuild import load
from components.run_folder import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("released")
    hf = hugging_face_folder(place / "hf")
    return {"hf": hf, "original": original_folder(place / "original", hf)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def imported(folder: Path, run: str, *options: str) -> int:
    return main.main(["import", "--weights", str(folder), "--run", run, *options])


@pytest.mark.parametrize(("layout", "rows"), [("hf", ROWS), ("original", WORDS_KNOWN)])
def test_a_run_that_can_be_asked(layout, rows, folders, capsys):
    assert imported(folders[layout], "released") == 0
    assert "is now runs/released" in capsys.readouterr().out
    checkpoint = find_checkpoint("runs/released", "--ckpt")
    recipe = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    assert recipe["data"] == {"template": "vicuna_v1", "decoding": "llava", "image_mode": "pad", "max_length": 512}
    assert recipe["model"]["decoder"]["init_args"]["config"]["vocab_size"] == rows
    stored = torch.load(checkpoint / "state", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16 if layout == "hf" else torch.float32}
    model, preparation = load(checkpoint)
    assert preparation.decoding == "llava"
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())
    Image.new("RGB", (40, 24), "red").save("red.png")
    assert main.main(["ask", "--ckpt", "runs/released", "--image", "red.png", "--question", "what", "--max_new_tokens", "3"]) == 0


def test_both_layouts_become_the_same_model(folders):
    models = []
    for layout in folders:
        assert imported(folders[layout], layout) == 0
        models.append(load(find_checkpoint(f"runs/{layout}", "--ckpt"))[0])
    state, other = (model.state_dict() for model in models)
    assert state.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name


def test_a_run_is_never_written_over(folders, capsys):
    Path("runs/mine").mkdir(parents=True)
    assert imported(folders["hf"], "mine") == 2
    assert "--run: runs/mine exists" in capsys.readouterr().err
    assert list(Path("runs/mine").iterdir()) == []


def test_nothing_is_left_of_an_import_that_failed(folders, tmp_path, capsys):
    broken = hugging_face_folder(tmp_path / "broken")
    file = sorted(broken.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert imported(broken, "mine") == 2
    assert "is damaged or cut short" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_tokenizer_without_the_image_token(tmp_path, capsys):
    folder = hugging_face_folder(tmp_path / "other")
    tokenizer(with_image=False).save_pretrained(folder)
    assert imported(folder, "mine") == 2
    assert f"gives <image> the id {WORDS_KNOWN}, its tokenizer" in capsys.readouterr().err


def test_a_tower_of_another_kind(tmp_path, capsys):
    folder = hugging_face_folder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "siglip_vision_model"
    (folder / "config.json").write_text(json.dumps(config))
    assert imported(folder, "mine") == 2
    assert "has a siglip_vision_model tower; the command imports CLIP towers" in capsys.readouterr().err


def test_an_original_that_names_no_tower(folders, tmp_path, capsys):
    folder = original_folder(tmp_path / "other", folders["hf"])
    config = json.loads((folder / "config.json").read_text())
    del config["mm_vision_tower"]
    (folder / "config.json").write_text(json.dumps(config))
    assert imported(folder, "mine") == 2
    assert "does not say which vision tower it has. State --vision_tower" in capsys.readouterr().err
    assert imported(folder, "mine", "--vision_tower", f"{folder}_clip") == 0


def test_hub_ids_are_fetched(folders, monkeypatch):
    asked = []

    def fetch(source, key):
        asked.append((source, key))
        return folders["hf"]

    monkeypatch.setattr("components.hub.fetch", fetch)
    for room in ("huggingface.importing", "vlm"):
        monkeypatch.setattr(f"components.{room}.load_tokenizer", lambda source: tokenizer(with_image=True))
    assert main.main(["import", "--weights", "llava-hf/llava-1.5-7b-hf", "--run", "released"]) == 0
    assert asked == [("llava-hf/llava-1.5-7b-hf", "--weights")]
    recipe = yaml.safe_load((find_checkpoint("runs/released", "--ckpt") / "recipe.yaml").read_text())
    assert recipe["model"]["decoder"]["init_args"]["tokenizer"] == "llava-hf/llava-1.5-7b-hf"


def test_an_imported_run_can_be_validated_and_started_from(folders, tmp_path):
    assert imported(folders["hf"], "released") == 0
    parts = yaml.safe_load((find_checkpoint("runs/released", "--ckpt") / "recipe.yaml").read_text())["model"]
    model = {part: parts[part] for part in ("vision_tower", "projector", "decoder")} | {"initial_weights": "runs/released"}
    recipe = write_recipe(tmp_path / "more.yaml", max_steps=3, trainer={"enable_progress_bar": False}, model=model)
    assert main.main(["validate", "--config", str(recipe), "--ckpt_path", "runs/released"]) == 0
    assert fit(recipe) == 0
    before = torch.load(find_checkpoint("runs/released", "") / "state", weights_only=True)["state_dict"]
    after = torch.load(find_checkpoint("runs/more", "") / "state", weights_only=True)["state_dict"]
    assert before.keys() == after.keys()
    assert all((before[name].float() - tensor).abs().max() < 0.05 for name, tensor in after.items())


@pytest.mark.slow
def test_a_tied_decoder_and_one_with_a_null_stay_what_they_are(tmp_path):
    folder = hugging_face_folder(tmp_path / "other", dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in state_of(folder).items() if "lm_head" not in name}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    config["text_config"] |= {"model_type": "mistral", "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert imported(folder, "tied") == 0
    stored = torch.load(find_checkpoint("runs/tied", "") / "state", weights_only=True)["state_dict"]
    assert torch.equal(stored["decoder.lm.lm_head.weight"], state["language_model.model.embed_tokens.weight"])
    assert main.main(["export", "--ckpt", "runs/tied", "--output", "out"]) == 0
    again = state_of(Path("out"))
    assert again.keys() == state.keys() and all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_weights_that_are_not_finite(tmp_path, capsys):
    folder = hugging_face_folder(tmp_path / "other", shards=1)
    file = folder / "model-00001-of-00001.safetensors"
    state = load_file(file)
    state["language_model.model.norm.weight"][3] = torch.nan
    save_file(state, file, metadata={"format": "pt"})
    assert imported(folder, "mine") == 2
    assert "not finite" in capsys.readouterr().err
