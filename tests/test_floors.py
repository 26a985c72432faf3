"""The house: who may import whom, and how large a file may be."""

import ast
import importlib
import inspect
import subprocess
from pathlib import Path

import pytest

from components.benchmarks import Benchmark
from components.data import Source
from components.decoder import Decoder
from components.projector import Projector
from components.vision_tower import VisionTower

ROOT = Path(__file__).parent.parent
FLOORS = {
    4: {
        "main",
        *(f"components.{room}" for room in ("command_line", "plan_command", "planning", "index_command", "indexing")),
    },
    3: {"callbacks"},
    2: {
        f"components.{room}"
        for room in ("vlm", "sharding", "checkpoint_files", "rebuild", "ask", "score", "compare", "flops", "huggingface", "plan")
    },
    1: {f"components.{room}" for room in ("vision_tower", "projector", "decoder", "data", "benchmarks")},
}
"""Rooms by floor; the rest of components is floor 0. A module may import from its own floor and from those below."""

INTERFACES = (VisionTower, Projector, Decoder, Source, Benchmark)
TOKENIZER_TYPE = {"PreTrainedTokenizerBase"}
TRANSFORMERS = {
    "components.decoder": None,
    "components.huggingface": None,
    "components.tokenizer": None,
    "components.data": TOKENIZER_TYPE,
    "components.plan": TOKENIZER_TYPE,
    "components.vlm": TOKENIZER_TYPE,
    "callbacks": TOKENIZER_TYPE,
}
"""Rooms that may import transformers, and what of it; None: anything."""

SOURCES = sorted([ROOT / "main.py", *ROOT.glob("components/**/*.py"), *ROOT.glob("callbacks/**/*.py")])
EVERY_SOURCE = [*SOURCES, *sorted(ROOT.glob("tests/**/*.py"))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """`callbacks`, `main`, or the module or package directly inside components."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "components" else parts[0]


def floor(name: str) -> int:
    return next((number for number, rooms in FLOORS.items() if room(name) in rooms), 0)


def imports(path: Path) -> list[tuple[str, str | None]]:
    """Modules that a file imports anywhere, each with the name taken from it."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def house(path: Path) -> set[str]:
    """The modules of this project that a file imports; `from components import x` counts as `components.x`."""
    named = {f"{source}.{name}" if source == "components" else source for source, name in imports(path)}
    return {name for name in named if name.split(".")[0] in ("main", "components", "callbacks")}


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_nothing_imports_upwards(path):
    here = module(path)
    assert [other for other in house(path) if floor(other) > floor(here)] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if floor(module(path)) == 1], ids=where)
def test_neighbors_on_floor_1_do_not_know_each_other(path):
    here = module(path)
    assert [other for other in house(path) if floor(other) == 1 and room(other) != room(here)] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if module(path).startswith("callbacks")], ids=where)
def test_callbacks_name_no_concrete_part(path):
    for source, name in imports(path):
        taken = getattr(importlib.import_module(source), name or "", None) if source.startswith("components") else None
        assert not (inspect.isclass(taken) and issubclass(taken, INTERFACES) and not inspect.isabstract(taken)), f"{source}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=where)
def test_libraries_stay_in_their_rooms(path):
    here = room(module(path))
    for source, name in imports(path):
        library = source.split(".")[0]
        if library == "transformers":
            assert here in TRANSFORMERS, f"{here} imports transformers"
            assert TRANSFORMERS[here] is None or name in TRANSFORMERS[here], f"{here} imports {name} of transformers"
        assert library not in ("open_clip", "timm") or here == "components.vision_tower", f"{here} imports {library}"


@pytest.mark.parametrize("path", EVERY_SOURCE, ids=where)
def test_a_file_can_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) < 350
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


def test_the_list_of_floors_names_rooms_that_may_exist_only():
    rooms = {room(module(path)) for path in SOURCES}
    planned = {"components.plan", "components.plan_command"}
    assert {name for names in FLOORS.values() for name in names} - rooms <= planned


def git(*arguments: str) -> list[str]:
    """Lines that git prints; a skip outside of a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_the_entrance_is_tidy():
    entries = {Path(name).parts[0] for name in git("ls-files", "--cached", "--others", "--exclude-standard")}
    visible = {name for name in entries if not name.startswith(".")}
    assert {"main.py", "components", "callbacks", "recipes", "tests"} <= visible
    assert visible <= {"main.py", "components", "callbacks", "recipes", "tests", "README.md", "LICENSE", "pyproject.toml"}


def test_git_ignores_no_file_of_the_house():
    ignored = git("ls-files", "--others", "--ignored", "--exclude-standard", "components", "callbacks", "recipes", "tests")
    assert [name for name in ignored if name.endswith((".py", ".yaml"))] == []
