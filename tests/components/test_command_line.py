"""The command line's run folder, console and configuration, beside what the commands' own tests show."""

from pathlib import Path

import pytest
import yaml
from small_recipe import fit, write_recipe

import main
from components.command_line import SECTIONS, RecipeCLI
from components.recipe_files import KEYS

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_the_keys_of_a_recipe_are_those_of_the_parser(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written down once more, where no parser need be built to refuse what is not one of them."""
    keys: dict[str, set[str]] = {}

    def parse(cli: RecipeCLI, parser: object, arguments: object) -> None:
        keys.update({name: {action.dest.split(".")[0] for action in cli._parser(name)._actions} for name in cli.subcommands()})
        raise ZeroDivisionError

    monkeypatch.setattr(RecipeCLI, "parse_arguments", parse)
    with pytest.raises(ZeroDivisionError):
        RecipeCLI([command, "--max_steps", "1"])
    assert list(keys) == [command]
    assert set(SECTIONS) < KEYS
    assert keys["fit"] - {"help", "print_config"} == KEYS if command == "fit" else keys["predict"] > KEYS


def test_the_run_is_named_after_recipe_and_overlay_or_as_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", max_steps=3)
    Path("faster.yaml").write_text("model: {learning_rates: {projector: 0.5}}\n")
    assert fit(recipe, "--config", "faster.yaml") == 0
    assert fit(recipe, "--run", "mine") == 0
    assert sorted(folder.name for folder in Path("runs").iterdir()) == ["mine", "small+faster"]
    resolved = [yaml.safe_load(Path(f"runs/{run}/recipe.yaml").read_text()) for run in ("mine", "small+faster")]
    assert [recipe["model"]["learning_rates"]["projector"] for recipe in resolved] == [0.001, 0.5]
    assert resolved[1]["model"]["learning_rates"]["decoder"] == 0.001  # an overlay merges key by key
    assert list(Path("runs/mine").glob("events.out.tfevents.*"))


def test_first_lines_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"learning_rates": {"vision_tower": None}}
    assert fit(write_recipe(tmp_path / "small.yaml", max_steps=3, model=rates)) == 0
    output, bar = capsys.readouterr()
    lines = {line.split()[0]: line for line in output.splitlines() if line.split()}
    assert lines["vision_tower"].endswith("frozen")
    assert lines["projector"].endswith("0.001")
    assert "run runs/small starts of 3" in output
    assert "tensorboard --logdir runs/small" in output
    assert "3/3" in bar
    assert "Warning" not in bar


def test_the_progress_bar_can_be_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(write_recipe(tmp_path / "small.yaml", max_steps=3, trainer={"enable_progress_bar": False})) == 0
    output, bar = capsys.readouterr()
    assert "run runs/small starts of 3" in output
    assert bar == ""


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", max_steps=3)
    with pytest.raises(SystemExit) as exit_:
        fit(recipe, "--print_config")
    assert exit_.value.code == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    assert fit(Path("resolved.yaml"), "--run", "resolved") == 0
    assert fit(recipe) == 0
    first, second = (yaml.safe_load(Path(f"runs/{run}/recipe.yaml").read_text()) for run in ("resolved", "small"))
    assert first | {"run": None} == second


def test_fit_takes_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(write_recipe(tmp_path / "small.yaml"), "--ckpt_path", "runs/other") == 2
    assert "model.initial_weights" in capsys.readouterr().err


def test_a_warmup_longer_than_the_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(write_recipe(tmp_path / "small.yaml", max_steps=2)) == 2
    assert "warmup takes 2 steps" in capsys.readouterr().err


def test_another_stage_starts_from_initial_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(write_recipe(tmp_path / "first.yaml", max_steps=3)) == 0
    second = write_recipe(tmp_path / "second.yaml", max_steps=3, model={"initial_weights": "runs/first"})
    assert fit(second) == 0
    wider = write_recipe(tmp_path / "wider.yaml", model={"initial_weights": "runs/first", "projector": {"init_args": {"depth": 3}}})
    capsys.readouterr()
    assert fit(wider) == 2
    message = capsys.readouterr().err
    assert "model.initial_weights" in message
    assert "missing: projector." in message


def test_validate_without_a_checkpoint_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "small.yaml")
    assert main.main(["validate", "--config", str(recipe)]) == 2
    assert "runs/small does not exist. Runs with a checkpoint here: none." in capsys.readouterr().err
