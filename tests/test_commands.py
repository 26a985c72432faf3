"""The command line as a user meets it: help at once, and mistakes told in a few lines that name the key or file and the remedy."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from small_recipe import RECIPE, fit, write_recipe

import main

ROOT = Path(__file__).parent.parent
QUIET = {"enable_progress_bar": False}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    """What a command that failed has told the user: few lines, no usage, no traceback, exit code 2."""

    def told(code: int) -> str:
        message = capsys.readouterr().err
        message = message[message.index("error: ") :]
        assert code == 2
        assert len(message.splitlines()) <= 15, message
        assert "usage:" not in message
        assert "Traceback" not in message
        return message

    return told


def test_help_lists_the_commands_without_importing_torch() -> None:
    script = "import sys, main; code = main.main(['--help']); assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in ("fit", "validate", "ask"):
        assert re.search(rf"^  {command} +\w+", result.stdout, re.MULTILINE), result.stdout
    assert "recipes/quickstart.yaml" in result.stdout
    assert result.stderr == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "hint"), [("fitt", "Did you mean fit?"), ("vallidate", "Did you mean validate?"), ("zebra", "")]
)
def test_an_unknown_command(command: str, hint: str, told: Callable[[int], str]) -> None:
    message = told(main.main([command]))
    assert f"'{command}' is not a command." in message
    assert hint in message
    assert "fit, validate, test, predict, score, compare, ask, " in message


def test_a_command_without_a_recipe(told: Callable[[int], str]) -> None:
    assert "--config" in told(main.main(["fit"]))


@pytest.mark.parametrize("command", ["fit", "validate", "ask"])
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.main([command, "--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    options = {"ask": ("--ckpt", "--question", "--image")}.get(command, ("--data.global_batch_size", "--checkpoint.keep"))
    assert all(option in output for option in options)


PROJECTOR = {"class_path": "components.projector.MLP", "init_args": {"depth": 2}}
TYPOS: dict[str, tuple[dict[str, Any], str]] = {
    "trainer key": (
        {"trainer": {"log_every_n_step": 5}},
        r"trainer\.log_every_n_step is not .*Did you mean trainer\.log_every_n_steps\?",
    ),
    "model key": ({"model": {"weight_decai": 0.1}}, r"model\.weight_decai is not .*Did you mean model\.weight_decay\?"),
    "data key": ({"data": {"global_batchsize": 4}}, r"data\.global_batchsize is not .*Did you mean data\.global_batch_size\?"),
    "section's key": ({"warmup": {"step": 2}}, r"warmup\.step is not a key of a recipe\. Did you mean warmup\.steps\?"),
    "section": ({"chekpoint": {"keep": 1}}, r"small\.yaml: chekpoint is not a section .*Did you mean checkpoint\?"),
    "empty section": ({"modle": {}}, r"small\.yaml: modle is not a section of a recipe\. Did you mean model\?"),
    "null section": ({"wamup": None}, r"small\.yaml: wamup is not a section"),
    "init_arg": (
        {"model": {"projector": {**PROJECTOR, "init_args": {"depht": 2}}}},
        r"model\.projector:\s+.*components\.projector\.MLP'.*\s.*'depht' is not accepted",
    ),
    "class": (
        {"model": {"projector": {**PROJECTOR, "class_path": "components.projector.MPL"}}},
        r"model\.projector:\s+.*components\.projector\.MPL",
    ),
    "module": (
        {"model": {"projector": {**PROJECTOR, "class_path": "components.projektor.MLP"}}},
        r"model\.projector:\s+.*components\.projektor\.MLP",
    ),
    "source's setting": (
        {"data": {"sources": {"a": {"class_path": "components.data.ShapesWorld", "init_args": {"setting": {"gird": 2}}}}}},
        r"data\.sources:\s+.*components\.data\.ShapesWorld'.*\s.*'gird'",
    ),
    "number": ({"data": {"global_batch_size": "four"}}, r"data\.global_batch_size:\s+.*int.*four"),
    "choice": ({"data": {"image_mode": "stretch"}}, r"data\.image_mode:\s+Expected one of .*'pad'.*stretch"),
    "template": ({"data": {"template": "breif"}}, r"data\.template = breif.*no template 'breif'.*brief"),
    "device": ({"trainer": {"accelerator": "cuda"}}, r"trainer: .*CUDA"),
    "batch": ({"trainer": {"accumulate_grad_batches": 3}}, r"data\.global_batch_size = 4 is not a multiple of 1 ranks x 3"),
    "out of range": ({"checkpoint": {"keep": 0}}, r"checkpoint: .*'keep': 0.* must be at least 1"),
    "frozen": ({"model": {"learning_rates": dict.fromkeys(("vision_tower", "projector", "decoder"))}}, r"model\.learning_rates"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_told_with_its_key(typo: str, tmp_path: Path, told: Callable[[int], str]) -> None:
    changes, message = TYPOS[typo]
    recipe = write_recipe(tmp_path / "small.yaml", **changes)
    if typo in ("init_arg", "class", "module"):  # a mapping of the test's recipe would be merged
        recipe.write_text(yaml.safe_dump({**RECIPE, "model": {**RECIPE["model"], **changes["model"]}}))
    assert re.search(message, told(fit(recipe))), message


def test_a_key_that_is_missing_is_named(tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        yaml.safe_dump({**RECIPE, "data": {key: value for key, value in RECIPE["data"].items() if key != "template"}})
    )
    assert "The recipe lacks data.template." in told(fit(recipe))


def test_a_missing_recipe(told: Callable[[int], str]) -> None:
    assert "--config: nowhere.yaml cannot be read (No such file or directory)" in told(fit(Path("nowhere.yaml")))


def test_a_recipe_that_is_not_yaml(tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml")
    recipe.write_text(recipe.read_text().replace("seed_everything: 1", "seed_everything: [1"))
    assert re.search(r"small\.yaml line 2 is not valid YAML: expected", told(fit(recipe)))


def test_a_missing_part_file(tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", model={"projector": "parts/mlp.yaml"})
    assert re.search(r"small\.yaml: model\.projector: .*parts/mlp\.yaml cannot be read", told(fit(recipe)))


@pytest.mark.parametrize("folder", ["parts", "."])
def test_a_typo_in_a_part_file(folder: str, tmp_path: Path, told: Callable[[int], str]) -> None:
    """Beside the recipe as well: there jsonargparse takes the part for one that names itself."""
    part = tmp_path / folder / "mlp.yaml"
    part.parent.mkdir(exist_ok=True)
    part.write_text("class_path: components.projector.MLP\ninit_args: {depht: 2}\n")
    recipe = write_recipe(tmp_path / "small.yaml", model={"projector": str(Path(folder) / "mlp.yaml")})
    message = told(fit(recipe))
    assert "model.projector" in message
    assert "Option 'depht' is not accepted" in message


# --- mistakes in the data


def own_pictures(tmp_path: Path) -> dict[str, Any]:
    """The changes of a recipe that trains on eight pictures of the user's own."""
    (tmp_path / "pictures").mkdir()
    records = []
    for number in range(8):
        Image.new("RGB", (20, 20), (30 * number, 90, 90)).save(tmp_path / "pictures" / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nwhat color"}, {"from": "gpt", "value": "red"}]
        records.append({"id": f"own {number}", "image": f"{number}.jpg", "conversations": turns})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    own = {"class_path": "components.data.LlavaConversations", "init_args": {"annotations": "own.jsonl", "images": "pictures"}}
    return {"trainer": QUIET, "data": {"sources": {"own": own}}}


def own_recipe(tmp_path: Path, **data: Any) -> Path:
    changes = own_pictures(tmp_path)
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], **changes["trainer"]}}
    recipe["data"] = {**RECIPE["data"], **changes["data"], **data}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "small.yaml"


def test_own_pictures_train(tmp_path: Path) -> None:
    assert fit(own_recipe(tmp_path)) == 0
    assert Path("runs/small/checkpoints/step_00000004/state").is_file()


def test_a_missing_image_folder(tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = own_recipe(tmp_path)
    Path("pictures").rename("photos")
    message = told(fit(recipe))
    assert "data.sources.own: The image folder pictures of own.jsonl does not exist (key images)." in message
    assert "Give the folder" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture(workers: int, tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = own_recipe(tmp_path, num_workers=workers)
    picture = Path("pictures/5.jpg")
    picture.write_bytes(picture.read_bytes()[:-20])
    message = told(fit(recipe))
    assert re.search(r"own\.jsonl line 6, id own 5: The 20 x 20 JPEG picture is damaged", message)
    assert "data.max_bad_fraction = 0 allowed; all are listed in" in message


def test_a_damaged_picture_that_may_be_skipped(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, max_bad_fraction=0.001)
    Path("pictures/5.jpg").write_bytes(b"")
    assert fit(recipe) == 0
    written = [json.loads(line) for line in Path("runs/small/quarantine.jsonl").read_text().splitlines()]
    assert len(written) == 1
    assert "own.jsonl line 6, id own 5: The picture is empty (0 bytes)" in written[0]["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_line(workers: int, tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = own_recipe(tmp_path, num_workers=workers)
    lines = Path("own.jsonl").read_text().splitlines()
    lines[3] = lines[3][:50]
    Path("own.jsonl").write_text("\n".join(lines) + "\n")
    message = told(fit(recipe))
    assert "own.jsonl line 4 is not valid JSON" in message
    assert "repair or remove the line" in message


def test_a_truncated_file(tmp_path: Path, told: Callable[[int], str]) -> None:
    recipe = own_recipe(tmp_path)
    Path("own.jsonl").write_text(Path("own.jsonl").read_text()[:-30])
    assert "own.jsonl line 8 is not valid JSON" in told(fit(recipe))
