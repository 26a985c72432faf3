"""No command imports what it does not use: what a user waits for before help, an error or the first step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_recipe import write_recipe

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "open_clip",
    "timm",
    "torchvision",
    "peft",
    "datasets",
    "tensorboard",
    "torchmetrics",
}
NUMBERS = {"numpy", "jaxtyping", "PIL", "jinja2"}
LIGHT: dict[str, tuple[list[str], int, set[str]]] = {
    "help": (["--help"], 0, {"yaml", "jsonargparse", *NUMBERS, *HEAVY}),
    "unknown command": (["fitt"], 2, {"yaml", "jsonargparse", *NUMBERS, *HEAVY}),
    "no recipe": (["fit"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "missing overlay": (["plan", "--config", "small.yaml", "--config", "nowhere.yaml"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "missing part of an option": (
        ["test", "--config", "small.yaml", "--validation", "x.yaml"],
        2,
        {"jsonargparse", *NUMBERS, *HEAVY},
    ),
    "recipe that is not YAML": (["validate", "--config", "broken.yaml"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "part that is not YAML": (["predict", "--config", "part.yaml"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "unknown section": (["index", "--config", "section.yaml"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "plan --help": (["plan", "--help"], 0, {"jsonargparse", *NUMBERS, *HEAVY}),
    "index --help": (["index", "--help"], 0, {"jsonargparse", *NUMBERS, *HEAVY}),
    "missing shards": (["index", "--shards", "nowhere/*.tar"], 2, {"jsonargparse", *NUMBERS, *HEAVY}),
    "export --help": (["export", "--help"], 0, NUMBERS | HEAVY),
    "missing run": (["export", "--ckpt", "runs/x", "--output", "out"], 2, NUMBERS | HEAVY),
    "import --help": (["import", "--help"], 0, NUMBERS | HEAVY),
    "a run that exists": (["import", "--weights", "x", "--run", "small"], 2, NUMBERS | HEAVY),
    "missing weights": (["import", "--weights", "./x", "--run", "new"], 2, HEAVY),
    "ask --help": (["ask", "--help"], 0, HEAVY | {"numpy"}),
    "missing picture": (["ask", "--ckpt", "runs/small", "--question", "?", "--image", "x.png"], 2, HEAVY | {"numpy"}),
    "missing question": (["ask", "--ckpt", "runs/small"], 2, HEAVY | {"numpy"}),
    "score --help": (["score", "--help"], 0, HEAVY),
    "missing answers": (["score", "--benchmark", "pope", "--answers", "x.jsonl"], 2, HEAVY),
    "compare --help": (["compare", "--help"], 0, HEAVY),
    "missing record": (["compare", "a.json", "b.json"], 2, HEAVY),
}
"""What is asked of the command line, its exit code, and what must not have been imported by then; in this order, in one process."""
KEY_ERROR = {"peft", "datasets", "pyarrow", "tensorboard", "webdataset"}
"""What neither `fit --help` nor a key that is not one needs. The others come with Lightning itself."""

SCRIPT = """
import json, sys, main
told = {}
for name, arguments, forbidden in json.load(sys.stdin):
    try:
        code = main.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    told[name] = code, sorted(set(forbidden) & set(sys.modules))
print("told " + json.dumps(told))
"""


def told(asked: dict[str, tuple[list[str], int, set[str]]], folder: Path) -> dict[str, list[object]]:
    """Exit codes, and modules that were imported though they must not be, by the names of what is asked in a fresh process."""
    given = json.dumps([(name, arguments, sorted(forbidden)) for name, (arguments, _, forbidden) in asked.items()])
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, input=given, capture_output=True, text=True, check=True, env=environment
    )
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("told "))
    return json.loads(line.removeprefix("told "))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recipes, most of them with a mistake, and a run."""
    write_recipe(tmp_path / "small.yaml")
    (tmp_path / "broken.yaml").write_text("seed_everything: [1\n")
    (tmp_path / "part.yaml").write_text("model: broken.yaml\n")
    (tmp_path / "section.yaml").write_text(yaml.safe_dump({"modle": {}}))
    (tmp_path / "key.yaml").write_text(yaml.safe_dump({"model": {"weight_decai": 0.1}}))
    (tmp_path / "runs" / "small").mkdir(parents=True)
    return tmp_path


def test_help_and_mistakes_that_need_no_parser_import_nothing_heavy(folder: Path) -> None:
    expected = {name: [code, []] for name, (_, code, _) in LIGHT.items()}
    assert told(LIGHT, folder) == expected


def test_the_parser_needs_no_adapters_data_sets_or_logger(folder: Path) -> None:
    asked = {
        "fit --help": (["fit", "--help"], 0, KEY_ERROR),
        "key": (["fit", "--config", "small.yaml", "--config", "key.yaml"], 2, KEY_ERROR),
    }
    assert told(asked, folder) == {name: [code, []] for name, (_, code, _) in asked.items()}
