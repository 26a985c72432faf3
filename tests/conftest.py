"""What all tests share: shapes checked while they run, golden data where it is, a folder of their own to run in."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # test files run side by side: each on a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import type_checks

type_checks.install(["components", "callbacks"])

import pytest

from components.errors import RecipeError
from components.shards import names

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indices of annotation files and what is compiled go to folders of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))


@pytest.fixture(scope="session")
def _expanded() -> dict[str, list[str] | str]:
    """What patterns of shards stand for, or what is wrong with them."""
    return {}


@pytest.fixture
def shards_expanded_once(_expanded: dict[str, list[str] | str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The 75,000 names of the reference run, all checked for their types, take longer than the rest of a plan; none is here."""
    expand = names.expand

    def expand_once(pattern: str) -> list[str]:
        if pattern not in _expanded:
            try:
                _expanded[pattern] = expand(pattern)
            except RecipeError as error:
                _expanded[pattern] = str(error)
        found = _expanded[pattern]
        if isinstance(found, str):
            raise RecipeError(found)
        return found

    monkeypatch.setattr(names, "expand", expand_once)


@pytest.fixture
def golden() -> Path:
    """The outputs of official code, or a skip that says so."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("no golden data beside the project (../shared/golden)")
    return folder


@pytest.fixture
def realdata() -> Path:
    """Real pictures with questions, or a skip that says so."""
    folder = SHARED / "realdata"
    if not folder.is_dir():
        pytest.skip("no real pictures beside the project (../shared/realdata)")
    return folder
