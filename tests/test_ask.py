"""Ask and validate: a trained run answers on the console, as the model in this process does."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_recipe import fit, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from components.data import Sample
from components.rebuild import load
from components.run_folder import find_checkpoint
from components.turns import Turn

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
BENCHMARK = {
    "class_path": "components.benchmarks.ShapesWorld",
    "init_args": {"setting": {"grid": 2, "max_objects": 2, "image_size": 16}, "num_scenes": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a few steps, and a picture."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = write_recipe(
            folder / "small.yaml",
            max_steps=6,
            trainer={"enable_progress_bar": False},
            model={"learning_rates": {"vision_tower": 0.02, "projector": 0.02, "decoder": 0.02}},
            validation={"benchmarks": {"shapes": BENCHMARK}, "max_new_tokens": 3, "at_end": False},
        )
        assert fit(recipe) == 0
        Image.new("RGB", (30, 20), (220, 40, 40)).save("red.png")
    return folder


@pytest.fixture(autouse=True)
def own_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def asked(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main.main(["ask", *options, "--max_new_tokens", "12"]) == 0
    return capsys.readouterr().out


def answer_of(checkpoint: Path) -> str:
    """What the weights of a checkpoint answer."""
    model, preparation = load(checkpoint)
    model.load_state_dict(torch.load(checkpoint / "state", weights_only=True)["state_dict"])
    sample = Sample("x", [Turn("user", "<image>\nwhat color")], [Path("red.png").read_bytes()])
    prompt = preparation.prompt(sample, model.tokenizer, model.sample_format())
    return model.generate([prompt], max_new_tokens=12, end_token_id=model.tokenizer.eos_token_id)[0] + "\n"


def test_the_answer_is_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--ckpt", "runs/small", "--image", "red.png", "--question", "what color")
    assert answer == answer_of(find_checkpoint("runs/small", "--ckpt"))
    assert answer.strip()
    model, _ = load(find_checkpoint("runs/small", "--ckpt"))
    saved = torch.load("runs/small/checkpoints/step_00000006/state", weights_only=True)["state_dict"]
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_a_run_folder_means_its_newest_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--image", "red.png", "--question", "what color")
    newest, named, older = (
        asked(capsys, "--ckpt", ckpt, *options)
        for ckpt in ("runs/small", "runs/small/checkpoints/step_00000006", "runs/small/checkpoints/step_00000004")
    )
    assert newest == named
    assert older == answer_of(Path("runs/small/checkpoints/step_00000004")) != newest


def test_questions_without_or_with_several_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, "--ckpt", "runs/small", "--question", "how many")
    asked(capsys, "--ckpt", "runs/small", "--question", "is <image> or <image> red", "--image", "red.png", "red.png")
    before = asked(capsys, "--ckpt", "runs/small", "--question", "what color", "--image", "red.png")
    assert before == asked(capsys, "--ckpt", "runs/small", "--question", "<image>\nwhat color", "--image", "red.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt", "runs/small", "--question", "q", "--image", "blue.png"], "--image: blue.png does not exist."),
        (["--ckpt", "runs/smal", "--question", "q"], "--ckpt: runs/smal does not exist. Runs with a checkpoint here: runs/small."),
        (["--ckpt", "runs", "--question", "q"], "--ckpt: runs holds no complete checkpoint."),
        (["--ckpt", "runs/small", "--question", "q", "--image", "small.yaml"], "--image small.yaml: The picture is not a JPEG"),
        (
            ["--ckpt", "runs/small", "--question", "<image> <image>", "--image", "red.png"],
            "2 <image> placeholder(s) but 1 image(s)",
        ),
        (["--ckpt", "runs/small", "--question", "q", "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        (["--ckpt", "runs/small", "--question", "q", "--top_p", "1.5"], "--top_p 1.5 in (0, 1]"),
        (["--ckpt", "runs/small", "--question", "q", "--temprature", "1"], "--temprature"),
        (["--ckpt", "runs/small"], "question"),
    ],
)
def test_mistakes_are_told_in_a_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ask", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 4
    assert "usage:" not in error


def test_validate_shows_the_benchmark_of_the_newest_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("runs/small/recipe.yaml").read_bytes()
    assert main.main(["validate", "--config", "small.yaml", "--validation.batch_size", "2"]) == 0
    assert Path("runs/small/recipe.yaml").read_bytes() == recipe
    record = json.loads(Path("runs/small/validation/shapes_step_6.json").read_text())
    assert record["recipe_hash"] == hashlib.blake2b(recipe, digest_size=16).hexdigest()
    output = "".join(capsys.readouterr())
    assert "shapes at step 6" in output
    assert "accuracy" in output
    tables = sorted(path.name for path in Path("runs/small/validation").iterdir())
    assert [name.partition(".")[0] for name in tables] == ["shapes_step_6"] * 3
    assert main.main(["validate", "--config", "small.yaml", "--ckpt_path", "runs/small/checkpoints/step_00000004"]) == 0
    events = EventAccumulator("runs/small").Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]  # none is hidden
    assert "shapes at step 4" in "".join(capsys.readouterr())
    assert fit(Path("small.yaml")) == 0  # validating has not changed the run
    assert "is finished" in capsys.readouterr().out
