"""Names of shards: as bash expands them, and files that exist."""

import subprocess

import pytest

from components.errors import RecipeError
from components.shards.names import expand, expand_all, names_in_index


@pytest.mark.parametrize(
    "pattern",
    [
        "x{00000..00012}.tar", "x{8..11}", "x{08..11}", "x{1..9..3}", "x{10..1..4}", "x{-2..2}", "{a,b}/{0..2}.tar",
        "x{a,b{1..3},}y",
        "x{a}y", "x{}y", "x{a,b", "x}a{b,c}", "{{a,b},c}", "x{y{1..2}z}", "x{1..2}{3,4}", "x{1..}", "x{a,{b,c}", "plain",
    ],
)  # fmt: skip
def test_braces_expand_as_in_bash(pattern: str) -> None:
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' s3://{pattern}"], capture_output=True, text=True, check=True).stdout
    assert expand(f"s3://{pattern}") == sorted(set(words.splitlines()))


def test_local_globs(tmp_path) -> None:
    for name in ("a0.tar", "a1.tar", "b0.tar", "a0.json", "odd[1].tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/a*.tar") == [f"{tmp_path}/a0.tar", f"{tmp_path}/a1.tar"]
    assert expand(f"{tmp_path}/{{b,a}}?.tar") == [f"{tmp_path}/{name}" for name in ("a0.tar", "a1.tar", "b0.tar")]
    assert expand(f"{tmp_path}/odd[1].tar") == [f"{tmp_path}/odd[1].tar"]  # a file of that very name is meant
    assert expand(f"{tmp_path}/a{{0..3}}.tar") == [
        f"{tmp_path}/a{number}.tar" for number in range(4)
    ]  # holes are the audit's matter
    assert expand_all([f"{tmp_path}/b0.tar", f"{tmp_path}/[ab]0.tar"]) == [f"{tmp_path}/a0.tar", f"{tmp_path}/b0.tar"]


@pytest.mark.parametrize("pattern", ["nowhere/{0..3}.tar", "nowhere/*.tar", "nowhere.tar", "  "])
def test_nothing_found_is_an_error_that_names_the_pattern(pattern: str) -> None:
    with pytest.raises(RecipeError, match="empty" if not pattern.strip() else pattern.replace("{", r"\{").replace("*", r"\*")):
        expand(pattern)


def test_a_slip_of_the_keyboard_fills_no_memory(monkeypatch) -> None:
    monkeypatch.setattr("components.shards.names.MAX_NAMES", 1000)
    with pytest.raises(RecipeError, match="more than 1,000 names"):
        expand("s3://bucket/{0..99999}{0..99999}.tar")


def test_names_in_an_index() -> None:
    assert names_in_index(["d/00000.tar", "e/00001.tar"]) == ["00000", "00001"]
    assert names_in_index(["/d/laion/0/0.tar", "/d/laion/1/0.tar", "/d/laion/1/1.tar"]) == ["0/0", "1/0", "1/1"]
    assert names_in_index(["/d/part_0/0.tar", "/d/part_1/0.tar"]) == ["part_0/0", "part_1/0"]
    assert names_in_index(["https://host/0.tar?token=a/b", "https://host/1.tar?token=a/b"]) == ["0", "1"]
    assert names_in_index(["0.tar", "d/0.tar"]) == ["0", "d/0"]


def test_stars_in_urls_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"s3://bucket/\*.tar: urls are not searched.*braces"):
        expand("s3://bucket/*.tar")


@pytest.mark.parametrize(
    "shards",
    [["s3://b/0.tar", "/d/0.tar"], ["d/0.tar", "d/0"], ["d/../0.tar", "d/0.tar"], [".tar"], ["gs://b/0.tar", "s3://b/0.tar"]],
)
def test_names_that_cannot_be_told_apart(shards: list[str]) -> None:
    with pytest.raises(RecipeError, match="cannot be told apart"):
        names_in_index(shards)
