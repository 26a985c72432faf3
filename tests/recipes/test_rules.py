"""The authors' rules of recipes, overlays and part files."""

import json
import re

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy
from recipe_book import COMMANDS, FRAGMENTS, FULL, OVERLAYS, RECIPES, ROOT, commands, configs, flat, load, name, recipe, resolve

from components.benchmarks import Benchmark
from components.data import Source
from components.decoder import Decoder
from components.projector import Projector
from components.vision_tower import VisionTower

PARTS = {
    "vision_tower": VisionTower,
    "projector": Projector,
    "decoder": Decoder,
    "data": dict[str, Source],
    "benchmark": Benchmark,
}
"""Folders of part files, and what their files build."""

TRAINERS = sorted(RECIPES.glob("trainer/*.yaml"))
ABLATIONS = [run for run in COMMANDS if "+" in run]
FIRST_ON_THEIR_MACHINES = {load(path)["trainer"]: path.stem for path in reversed(FULL)}.values()
MOVES = [
    pytest.param(
        path.stem,
        trainer,
        id=f"{path.stem}-{name(trainer)}",
        marks=[] if path.stem in FIRST_ON_THEIR_MACHINES or trainer.stem == "gpu" else [pytest.mark.slow],
    )
    for path in FULL
    for trainer in TRAINERS
]
"""Recipes and trainer files: one recipe of each machine with every file, and every recipe with one."""


def is_part_file(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".yaml")


def keys(values: object) -> set[str]:
    if isinstance(values, dict):
        return set(values) | {key for value in values.values() for key in keys(value)}
    return {key for value in values for key in keys(value)} if isinstance(values, list) else set()


def parse_part(kind: object, values: object) -> dict:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    return json.loads(json.dumps(flat(parser.parse_object({"part": values}))))  # YAML has lists where a type has tuples


def test_the_recipes_promised_are_there():
    assert {path.stem for path in FULL} == {
        "quickstart",
        "shapes_world_exam",
        "own_pictures",
        "own_conversations",
        "llava15_7b_lora_finetune",
        *(f"{family}_{stage}" for family in ("llava15_7b", "llava15_13b", "meta_llava_13b") for stage in ("pretrain", "finetune")),
    }
    assert len(OVERLAYS) >= 8


@pytest.mark.parametrize("path", FULL, ids=name)
def test_a_recipe_fits_on_a_page(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 30


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_is_short(path):
    assert 1 <= len([line for line in path.read_text().splitlines() if not line.startswith("#")]) <= 6


@pytest.mark.parametrize("path", [*FULL, *OVERLAYS], ids=name)
def test_line_1_says_what_for_and_line_2_how(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20
    assert path in FULL or "?" in first
    assert commands(path), "line 2 must be the command that runs it"
    for arguments in commands(path):
        files = configs(arguments)
        assert files[-1] == path
        assert len(files) == (1 if path in FULL else 2)
        assert files[0] in FULL


@pytest.mark.parametrize("path", FULL, ids=name)
def test_a_recipe_states_seeds_and_length(path):
    stated = load(path)
    assert isinstance(stated["seed_everything"], int) and not isinstance(stated["seed_everything"], bool)
    assert isinstance(stated["max_steps"], int)
    assert isinstance(stated["data"]["seed"], int)


@pytest.mark.parametrize("path", [*FULL, *OVERLAYS, *FRAGMENTS], ids=name)
def test_no_dotted_keys(path):
    assert not [key for key in keys(load(path)) if "." in key]


@pytest.mark.parametrize("path", [*FULL, *OVERLAYS], ids=name)
def test_classes_are_named_in_part_files_only(path):
    assert "class_path" not in keys(load(path))


@pytest.mark.parametrize("path", [path for path in FRAGMENTS if path.parent.name in PARTS], ids=name)
def test_a_part_file_states_every_argument(path):
    """Nothing of the part that it replaces can survive in an argument that it leaves open."""
    stated = load(path)
    assert flat({"part": stated}) == parse_part(PARTS[path.parent.name], stated)


@pytest.mark.parametrize("path", TRAINERS, ids=name)
def test_a_strategy_states_every_argument(path):
    strategy = load(path)["strategy"]
    assert strategy == "auto" or flat({"part": strategy}) == parse_part(Strategy, strategy)


@pytest.mark.parametrize("folder", ["trainer", "validation"])
def test_files_of_a_section_state_the_same_keys(folder):
    stated = {path.stem: set(load(path)) for path in RECIPES.glob(f"{folder}/*.yaml")}
    assert len({frozenset(keys) for keys in stated.values()}) == 1, stated


def test_every_file_is_in_a_folder_of_a_key():
    assert {path.parent.name for path in FRAGMENTS} == {*PARTS, "trainer", "validation"}


def test_every_part_file_is_used():
    named = set()
    for path in [*FULL, *OVERLAYS, *FRAGMENTS]:
        named |= {(path.parent / value).resolve() for value in flat(load(path)).values() if is_part_file(value)}
    # which machine there is, and what else is asked, the user says
    assert [name(path) for path in FRAGMENTS if path not in named and path.parent.name not in ("trainer", "validation")] == []


@pytest.mark.parametrize("run", ABLATIONS)
def test_an_overlay_changes_exactly_what_it_states(run):
    overlay = configs(COMMANDS[run])[1]
    base, changed = flat(recipe(run.partition("+")[0])), flat(recipe(run))
    different = {key for key in base.keys() | changed.keys() if base.get(key, "absent") != changed.get(key, "absent")}
    stated = flat(load(overlay))
    for key in stated:
        assert [other for other in different if f"{other}.".startswith(f"{key}.")], f"{key} has no effect on {run}"
    assert [other for other in different if not any(f"{other}.".startswith(f"{key}.") for key in stated)] == []


@pytest.mark.parametrize("run", ABLATIONS)
def test_a_swapped_part_is_the_part_of_its_file(run):
    overlay = configs(COMMANDS[run])[1]
    resolved = flat(recipe(run))
    for key, value in flat(load(overlay)).items():
        if is_part_file(value):
            path = (overlay.parent / value).resolve()
            alone = parse_part(PARTS[path.parent.name], load(path))
            assert {k: v for k, v in resolved.items() if k.startswith(f"{key}.")} == {
                k.replace("part", key, 1): v for k, v in alone.items()
            }


@pytest.mark.parametrize(("run", "trainer"), MOVES)
def test_any_recipe_moves_to_any_machine(run, trainer):
    """`--trainer recipes/trainer/gpu.yaml` leaves nothing of the recipe's own machine behind."""
    moved = flat(resolve((*COMMANDS[run], "--trainer", str(trainer))))
    stated = flat(load(trainer))
    assert {key: moved[f"trainer.{key}"] for key in stated} == stated
    assert [key for key in moved if key.startswith("trainer.strategy.") and key.removeprefix("trainer.") not in stated] == []
    assert moved["trainer.max_steps"] == moved["max_steps"] == load(RECIPES / f"{run}.yaml")["max_steps"]


def test_no_file_names_a_place_outside():
    for path in [*FULL, *OVERLAYS, *FRAGMENTS]:
        for value in flat(load(path)).values():
            if is_part_file(value):
                assert (path.parent / value).resolve().is_relative_to(ROOT), f"{path}: {value}"
            elif isinstance(value, str):
                assert not re.match(r"[/~]|\.\.", value), f"{path}: {value}"
