"""`export`: what leaves is what came or what was trained, proven by transformers, or it does not leave."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from big_checkpoint import write_checkpoint
from llava_folders import ROWS, hugging_face_folder, state_of
from PIL import Image
from safetensors.torch import load_file, save_file
from small_recipe import fit, merged, write_recipe

import main
from components.errors import RecipeError
from components.huggingface import certificate, exporting, proof
from components.huggingface.certificate import TOLERANCES
from components.huggingface.exporting import default_dtype
from components.named_tensors import SafetensorsFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

MLP_MODEL = {"vision_tower": {"init_args": {"config": {"quick_gelu": True, "layers": 3}, "feature_layer": -2}}}
FILES = {
    "config.json", "generation_config.json", "chat_template.jinja", "processor_config.json", "preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "certificate.json",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_process(monkeypatch):
    """Both halves of a proof in this process: to start two for it takes longer than the proof."""

    def run(half, folder):
        getattr(proof, half)(folder, json.loads((folder / proof.JOB).read_text()))
        return json.loads((folder / f"{half}.json").read_text())

    monkeypatch.setattr(certificate, "_run", run)


@pytest.fixture
def one_process_as_main(monkeypatch):
    """The same, by what `python -m` runs."""

    def run(half, folder):
        monkeypatch.setattr(sys, "argv", [proof.__file__, half, str(folder)])
        runpy.run_path(proof.__file__, run_name="__main__")
        return json.loads((folder / f"{half}.json").read_text())

    monkeypatch.setattr(certificate, "_run", run)


@pytest.mark.usefixtures("one_process")
def test_import_and_export_return_the_same_tensors(tmp_path):
    """Bit for bit and name for name, the tower's last block and the rows for pictures included."""
    released = hugging_face_folder(tmp_path / "released")
    assert main.main(["import", "--weights", str(released), "--run", "r"]) == 0
    assert main.main(["export", "--ckpt", "runs/r", "--output", "out"]) == 0
    before, after = state_of(released), state_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", released))
    assert config["image_token_index"] == original["image_token_index"]
    assert (config["vision_feature_layer"], config["text_config"]["vocab_size"]) == (-2, ROWS)
    assert config["image_decoding"] == "llava"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps whose model has a place in the layout."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = write_recipe(
            folder / "small.yaml",
            max_steps=6,
            trainer={"enable_progress_bar": False},
            model=merged(MLP_MODEL, {"learning_rates": {"vision_tower": 0.02, "projector": 0.02, "decoder": 0.02}}),
        )
        assert fit(recipe) == 0
    return folder / "runs" / "small"


@pytest.mark.usefixtures("one_process_as_main")
def test_transformers_answers_as_ask_does(trained, tmp_path, capsys):
    """With the code that the README shows, through the exported processor and chat template alone."""
    Image.new("RGB", (40, 25), (220, 40, 40)).save("red.png")
    assert main.main(["export", "--ckpt", str(trained), "--output", "out", "--image", "red.png"]) == 0
    assert {path.name for path in Path("out").iterdir()} >= FILES
    assert not Path("out.unfinished").exists()
    proof = json.loads(Path("out/certificate.json").read_text())
    assert proof["equal"] and all(check["equal"] for check in proof["checks"])
    assert (proof["decoding"], proof["image_mode"], proof["dtype"]) == ("upright", "pad", "float32")
    assert {"tower_layers", "peak_memory_mib", "packages", "sha256", "recipe_sha256"} <= proof.keys()
    assert proof["tower_layers"].startswith("2 of 3")

    capsys.readouterr()
    question = "what color is the object"
    assert main.main(["ask", "--ckpt", str(trained), "--image", "red.png", "--question", question, "--max_new_tokens", "32"]) == 0
    ours = capsys.readouterr().out.rstrip("\n")
    readme = (Path(main.__file__).parent / "README.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "LlavaForConditionalGeneration" in block
    )
    for there, here in (("llava15_7b", "out"), ("picture.png", "red.png"), ("What is in this picture?", question)):
        code = code.replace(there, here)
    exec(code)
    assert capsys.readouterr().out.strip() == ours


@pytest.mark.slow
def test_an_export_can_be_imported_again(trained, tmp_path):
    """Even one whose tower lost the layers that no feature passes through."""
    assert main.main(["export", "--ckpt", str(trained), "--output", "first"]) == 0
    assert main.main(["import", "--weights", "first", "--run", "again"]) == 0
    assert main.main(["export", "--ckpt", "runs/again", "--output", "second", "--dtype", "float32"]) == 0
    first, second = (json.loads(Path(folder, "certificate.json").read_text()) for folder in ("first", "second"))
    assert [first[key] == second[key] for key in ("template", "decoding", "image_mode", "answers")] == [True] * 4
    before, after = state_of(tmp_path / "first"), state_of(tmp_path / "second")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_exports_are_proven_with_rounded_weights(dtype, trained):
    assert main.main(["export", "--ckpt", str(trained), "--output", "out", "--dtype", dtype]) == 0
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {getattr(torch, dtype)}
    assert json.loads(Path("out/certificate.json").read_text())["tokens_change_by_rounding"] in (True, False)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("tensor", "check"),
    [
        ("multi_modal_projector.linear_2.bias", "logits"),
        pytest.param("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "features", marks=pytest.mark.slow),
        pytest.param("language_model.model.layers.0.self_attn.o_proj.weight", "logits", marks=pytest.mark.slow),
    ],
)
def test_a_tensor_gone_wrong_stops_the_export(tensor, check, trained, monkeypatch, capsys):
    """One tensor, a hundredth too large."""
    written = exporting.write_safetensors

    def spoiled(folder, *arguments):
        sums = written(folder, *arguments)
        state = load_file(folder / "model.safetensors")
        state[tensor] *= 1.01
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return sums

    monkeypatch.setattr(exporting, "write_safetensors", spoiled)
    assert main.main(["export", "--ckpt", str(trained), "--output", "out"]) == 2
    said = capsys.readouterr()
    assert "The export is not the model" in said.err and f"  {check}: " in said.err
    assert not Path("out").exists()
    proof = json.loads(Path("out.unfinished/certificate.json").read_text())
    assert not proof["equal"]
    assert next(one for one in proof["checks"] if one["what"] == check)["found"] > TOLERANCES[check]
    assert main.main(["export", "--ckpt", str(trained), "--output", "out"]) == 2
    assert "out.unfinished exists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_chat_template_gone_wrong_stops_the_export(trained, monkeypatch, capsys):
    right = exporting.to_jinja
    monkeypatch.setattr(exporting, "to_jinja", lambda *arguments: right(*arguments).replace("Q:", "A:"))
    assert main.main(["export", "--ckpt", str(trained), "--output", "out"]) == 2
    assert "ids of the prompt, text alone: False, allowed True" in capsys.readouterr().err


def test_what_is_not_a_number_is_unlike(tmp_path):
    """Wherever it stands among the pictures."""
    good, bad = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    for half in ("ours", "theirs"):
        tensors = {f"{kind}.{number}": good.clone() for kind in TOLERANCES for number in range(3)}
        save_file(tensors | ({"logits.1": bad} if half == "ours" else {}), tmp_path / f"{half}.safetensors")
    result = {"loading": {}, "answers": [], "image_token_id": 0, "two_in_a_batch": [], "causality": 0.0}
    checks = {check["what"]: check["equal"] for check in certificate._compare(tmp_path, [], result, result)}
    assert checks["features"] and checks["pixels"] and not checks["logits"]


HALF = """
import json, os, sys
from pathlib import Path
half, folder = sys.argv[1], Path(sys.argv[2])
if not (folder / "job.json").exists():
    sys.exit("there is no job")
(folder / f"{half}.json").write_text(json.dumps({"half": half, "process": os.getpid()}))
"""


def test_the_halves_are_processes_of_their_own(tmp_path, monkeypatch):
    """Of a module of the name that stands in `proof`, wherever the search path of this process has it."""
    (tmp_path / "half.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(proof, "__name__", "half")
    with pytest.raises(RecipeError, match="its half 'ours' ended with: there is no job"):
        certificate._run("ours", tmp_path)
    (tmp_path / proof.JOB).write_text("{}")
    ran = [certificate._run(half, tmp_path) for half in ("ours", "theirs")]
    assert [one["half"] for one in ran] == ["ours", "theirs"]
    assert len({os.getpid(), *(one["process"] for one in ran)}) == 3


def test_an_export_that_breaks_leaves_nothing(trained, monkeypatch, capsys):
    monkeypatch.setattr(certificate, "_run", lambda *arguments: (_ for _ in ()).throw(RecipeError("out of memory")))
    assert main.main(["export", "--ckpt", str(trained), "--output", "out"]) == 2
    assert "out of memory" in capsys.readouterr().err
    assert not list(Path().glob("out*"))


def test_a_projector_without_a_place_in_the_layout(tmp_path, capsys):
    part = {"class_path": "components.projector.PixelShuffle", "init_args": {"factor": 2, "depth": 2}}
    recipe = write_recipe(tmp_path / "small.yaml", max_steps=3, trainer={"enable_progress_bar": False}, model={"projector": part})
    assert fit(recipe) == 0
    capsys.readouterr()
    assert main.main(["export", "--ckpt", "runs/small", "--output", "out"]) == 2
    assert "The projector of this run is PixelShuffle of depth 2" in capsys.readouterr().err
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt", "runs/none", "--output", "out"], "--ckpt: runs/none does not exist"),
        (["--ckpt", "TRAINED", "--output", "."], "exists. Choose another name"),
        (["--ckpt", "TRAINED", "--output", "out", "--image", "none.png"], "--image: none.png does not exist"),
    ],
)
def test_mistakes(options, message, trained, capsys):
    assert main.main(["export", *(str(trained) if option == "TRAINED" else option for option in options)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainer", "stored", "expected"),
    [
        ({"precision": "32-true", "strategy": "auto"}, torch.float32, torch.float32),
        ({"precision": "bf16-mixed", "strategy": "auto"}, torch.float32, torch.bfloat16),
        ({"precision": "16-mixed", "strategy": "auto"}, torch.float32, torch.float16),
        ({"precision": "32-true", "strategy": {"init_args": {"param_dtype": "bfloat16"}}}, torch.float32, torch.bfloat16),
        (None, torch.float16, torch.float16),
    ],
)
def test_the_number_format_is_that_of_the_run(trainer, stored, expected):
    save_file({"x": torch.zeros(1, dtype=stored)}, "x.safetensors")
    assert default_dtype({"trainer": trainer}, SafetensorsFiles([Path("x.safetensors")])) == expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("changes", "sharded"),
    [
        pytest.param(
            {"decoder": {"init_args": {"lora": {"rank": 2, "alpha": 8.0, "target_modules": "all-linear"}}}},
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param({"decoder": {"init_args": {"config": {"tie_word_embeddings": True}}}}, False, marks=pytest.mark.slow),
        pytest.param({"vision_tower": {"init_args": {"feature_layer": -1}}}, True, marks=pytest.mark.slow),
        pytest.param({"vision_tower": {"init_args": {"config": {"quick_gelu": False}}}}, False, marks=pytest.mark.slow),
    ],
    ids=["LoRA", "tied", "sharded, last layer", "GELU"],
)
def test_kinds_of_models(changes, sharded):
    """Adapters are merged, a tied head is not written twice, shards are put together."""
    write_checkpoint(Path("runs/random"), merged(MLP_MODEL, changes), sharded)
    assert main.main(["export", "--ckpt", "runs/random", "--output", "out", "--dtype", "float32"]) == 0
    state = load_file("out/model.safetensors")
    assert not [name for name in state if "lora" in name]
    assert ("language_model.lm_head.weight" in state) == ("tie" not in str(changes))


@pytest.mark.slow
def test_a_siglip_tower():
    """From random weights: a released architecture at its full width, its first two blocks."""
    tower = {"model_name": "ViT-B-16-SigLIP", "config": None, "feature_layer": 1}
    write_checkpoint(Path("runs/random"), {"vision_tower": {"init_args": tower}}, False)
    assert main.main(["export", "--ckpt", "runs/random", "--output", "out"]) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert (config["vision_config"]["model_type"], config["vision_feature_select_strategy"]) == ("siglip_vision_model", "full")


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "llava_llama_2"])
def test_other_templates(template, tmp_path):
    write_checkpoint(Path("runs/random"), MLP_MODEL, False)
    file = next(Path("runs/random").glob("checkpoints/*/recipe.yaml"))
    file.write_text(file.read_text().replace("template: brief", f"template: {template}"))
    assert main.main(["export", "--ckpt", "runs/random", "--output", "out"]) == 0


MEASURE = """
import sys, torch, main
from pathlib import Path
from components.huggingface import exporting, certificate
from components.huggingface.memory import peak_mib
exporting.certify = lambda *arguments: print("MEMORY", arguments[-1]["export_memory_mib_above_imports"], peak_mib() - before)
before = peak_mib()
sys.exit(main.main(["export", "--ckpt", sys.argv[1], "--output", "out"]))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_memory_stays_below_one_gibibyte(layout, tmp_path):
    """4 GiB of random weights, as one file and as a sharded checkpoint."""
    big = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 15, "vocab_size": 32000}
    recipe = merged(MLP_MODEL, {"decoder": {"init_args": {"config": big | {"num_attention_heads": 16, "num_key_value_heads": 16}}}})
    size = write_checkpoint(Path("runs/big"), recipe, sharded=layout == "sharded")
    assert size > 4 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "runs/big"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(main.__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inside, whole = map(float, done.stdout.split("MEMORY")[1].split()[:2])
    print(f"{layout}: {inside} MiB while writing, {whole:.0f} MiB in all")
    assert max(inside, whole) <= 1024
