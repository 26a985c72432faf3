"""The command itself on two processes: a sharded run trains, validates and saves what a run on one process does.

Two processes come from a fork with what `torchrun` would tell them; in the slow tests from `torchrun` itself and from the command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pair import fork
from small_recipe import RECIPE, fit, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kill import finish
from test_kill import fit as fit_on_rank
from tiny import assert_equal, weights

from components.ask import ask
from components.rebuild import load
from components.run_folder import checkpoint_folder
from components.shapes_world import Setting, draw_scene

ROOT = Path(__file__).parents[2]
BENCHMARK = {
    "class_path": "components.benchmarks.ShapesWorld",
    "init_args": {"setting": RECIPE["data"]["sources"]["shapes"]["init_args"]["setting"], "num_scenes": 4},
}
CHANGES: dict[str, Any] = {"data": {"global_batch_size": 8}, "validation": {"benchmarks": {"shapes": BENCHMARK}}}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def sharded_trainer(name: str = "fsdp_8xa100", compiled: bool = False) -> dict[str, Any]:
    """A trainer of eight GPUs, on two processes of a CPU, whose compiler takes longer than the rest of a run."""
    trainer = yaml.safe_load((ROOT / f"recipes/trainer/{name}.yaml").read_text())
    options = trainer["strategy"]["init_args"]
    options |= {"replicas": 1, "shards": 2, "param_dtype": "float32"}
    if "compile_blocks" in options:
        options["compile_blocks"] = compiled
    return trainer | {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "log_every_n_steps": 1}


def command(recipe: Path, name: str = "fit", *options: str, launcher: tuple[str, ...] = ()) -> str:
    """What `python main.py fit`, or another command, prints when all goes well."""
    environment = {**os.environ, "PYTHONWARNINGS": "", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "main.py"), name, "--config", str(recipe), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fit_under_torchrun(recipe: str, run: str) -> None:
    """`fit` on this rank, with what `torchrun` tells it."""
    told = {"RANK": os.environ["LOCAL_RANK"], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    fit_on_rank(str(Path(recipe).parent), recipe, run, 0.0, told | {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"})


def losses(run: str) -> list[float]:
    events = EventAccumulator(f"runs/{run}")
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def answers(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{run}/validation/shapes_step_4.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same four steps on one process and on two, and the recipe of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(write_recipe(folder / "whole.yaml", **CHANGES)) == 0
        recipe = write_recipe(folder / "sharded.yaml", trainer=sharded_trainer(), **CHANGES)
        codes = finish(fork(fit_under_torchrun, [(str(recipe), "sharded")] * 2))
        printed = [Path(f"log.{rank}").read_text() for rank in range(2)]
        assert codes == [0, 0], "\n".join(printed)
        assert "run runs/sharded starts of 4" in printed[0]
        yield recipe


def assert_the_run_of_one_process(run: str) -> None:
    whole, sharded = (checkpoint_folder(Path("runs") / one, 4) for one in ("whole", run))
    assert (sharded / "state").is_dir()
    assert len(list((sharded / "state").glob("*.distcp"))) == 2  # one from each process
    assert losses(run) == pytest.approx(losses("whole"), rel=1e-4)
    assert len(losses(run)) == 4
    assert_equal(weights(load(sharded)[0]), weights(load(whole)[0]), 1e-4)

    asked = [row["id"] for row in answers(run)]
    assert len(set(asked)) == len(asked) and len(asked) % 2  # one was asked twice, so that both processes had as many
    assert answers(run) == answers("whole")


def test_a_sharded_run_is_the_run_of_one_process(runs: Path) -> None:
    resolved = yaml.safe_load(Path("runs/whole/recipe.yaml").read_text())
    assert resolved["trainer"]["use_distributed_sampler"] is False  # though the recipe does not say so
    assert_the_run_of_one_process("sharded")


@pytest.mark.slow
def test_compiled_under_torchrun_too(runs: Path) -> None:
    recipe = write_recipe(runs.with_name("compiled.yaml"), trainer=sharded_trainer(compiled=True), **CHANGES)
    assert "run runs/compiled starts of 4" in command(recipe, launcher=TORCHRUN)
    assert_the_run_of_one_process("compiled")


@pytest.mark.slow
def test_fsdp1_too_and_it_continues_its_own_only(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(runs.with_name("fsdp1.yaml"), trainer=sharded_trainer("fsdp1_8xa100"), **CHANGES)
    assert "run runs/fsdp1 starts of 4" in command(recipe, launcher=TORCHRUN)
    assert_the_run_of_one_process("fsdp1")
    assert "runs/fsdp1 is finished: step 4 of 4." in command(recipe)
    assert fit(runs, "--run", "fsdp1") == 2
    assert "is sharded by FullyShardedV1 (FSDP1), but trainer.strategy is HybridSharding (FSDP2)" in capsys.readouterr().err
    assert fit(recipe, "--trainer.strategy.init_args.shards", "4") == 2
    assert "was written on 1 replicas x 2 shards, but trainer.strategy lays 1 x 4" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_predict_what_one_asks(runs: Path) -> None:
    scene = draw_scene(Setting(2, 1, 2, 16), np.random.default_rng(5), held_out_pairs=False)
    Path("scene.bmp").write_bytes(scene.picture())
    texts = ["how many objects are there", "what shape is the red object", "is there a red object"]
    rows = [{"question_id": number, "image": "scene.bmp", "text": text} for number, text in enumerate(texts)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--input", "questions.jsonl", "--output", "answers.jsonl", "--max_new_tokens", "5")
    assert "answers.jsonl: 3 answers" in command(runs, "predict", *options)
    told = [json.loads(line)["text"] for line in Path("answers.jsonl").read_text().splitlines()]
    assert told == [ask("runs/sharded", text, ["scene.bmp"], max_new_tokens=5) for text in texts]


@pytest.mark.slow
def test_a_finished_run_stays_and_its_benchmarks_can_be_asked_again(runs: Path) -> None:
    assert "runs/sharded is finished: step 4 of 4." in command(runs)
    file = Path("runs/sharded/validation/shapes_step_4.jsonl")
    before = file.read_text()
    file.unlink()
    command(runs, "test")
    assert file.read_text() == before
