"""Recipe files: every file that a recipe names is read, and what is wrong is told with its place."""

from pathlib import Path

import pytest

from components.errors import RecipeError
from components.recipe_files import check_recipes, explain, hint, named_recipes, read_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a part file, which names another."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("decoder: parts/llama.yaml\n")
    (tmp_path / "model" / "parts").mkdir()
    (tmp_path / "model" / "parts" / "llama.yaml").write_text("class_path: Llama\ninit_args: {depth: 2}\n")
    (tmp_path / "recipe.yaml").write_text("seed: 1\nmodel: model/small.yaml\nlist: [{a: model/small.yaml}]\n")
    return tmp_path / "recipe.yaml"


def test_sections_are_those_of_the_file(recipe: Path) -> None:
    assert list(read_recipe(recipe)) == ["seed", "model", "list"]


def test_a_missing_file_is_named_with_what_names_it(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--config: .*nowhere\.yaml cannot be read \(No such file or directory\)"):
        read_recipe(recipe.with_name("nowhere.yaml"))
    part = recipe.parent / "model" / "parts" / "llama.yaml"
    part.unlink()
    with pytest.raises(RecipeError, match=r"small\.yaml: decoder: .*parts/llama\.yaml cannot be read"):
        read_recipe(recipe)
    (recipe.parent / "model" / "small.yaml").unlink()
    with pytest.raises(RecipeError, match=r"recipe\.yaml: model: .*model/small\.yaml cannot be read"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "line"), [("a: 1\nb: [1\nc: 2\n", 3), ("a: 1\n b: 2\n", 2), ("a:\n\t- b\n", 2), ("a: 'x\n", 2), ("%", 1)]
)
def test_a_file_that_is_not_yaml_is_named_with_the_line(text: str, line: int, recipe: Path) -> None:
    part = recipe.parent / "model" / "parts" / "llama.yaml"
    part.write_text(text)
    with pytest.raises(RecipeError, match=rf"llama\.yaml line {line} is not valid YAML: .+"):
        read_recipe(recipe)


def test_a_binary_file_is_not_yaml(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not valid YAML"):
        read_recipe(recipe)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("# only words\n", "is empty"), ("- a\n", "has no sections")])
def test_a_recipe_has_sections(text: str, message: str, recipe: Path) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml {message}"):
        read_recipe(recipe)


@pytest.mark.parametrize("section", ["modle: {}", "modle:", "{model.lr: 3}", "3: 4"])
def test_a_section_that_nobody_knows_is_refused(section: str, recipe: Path) -> None:
    recipe.write_text(section)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: .* is not a section of a recipe\."):
        check_recipes(["--config", str(recipe)])


def test_overlays_and_part_files_of_options_are_read(recipe: Path) -> None:
    recipe.write_text("model: model/small.yaml\n")
    part, overlay = recipe.parent / "model" / "small.yaml", recipe.with_name("overlay.yaml")
    overlay.write_text("data: {}\n")
    given = ["--config", str(recipe), f"--config={overlay}", "--model", str(part), "--run", "not_a_file.yaml"]
    check_recipes(given)
    for wrong in ("--model.decoder", "--model"):
        with pytest.raises(RecipeError, match=rf"^{wrong}: .*gone\.yaml cannot be read"):
            check_recipes([*given, wrong, str(recipe.with_name("gone.yaml"))])
        with pytest.raises(RecipeError, match=rf"^{wrong}: .*gone\.yaml cannot be read"):
            check_recipes([*given, f"{wrong}={recipe.with_name('gone.yaml')}"])
    overlay.write_text("data: part.yaml\n")
    with pytest.raises(RecipeError, match=r"overlay\.yaml: data: .*part\.yaml cannot be read"):
        check_recipes(given)


def test_recipes_among_the_arguments() -> None:
    assert named_recipes(["fit", "--config", "a.yaml", "--trainer.devices", "2", "--config=b.yaml", "-c", "d"]) == [
        "a.yaml",
        "b.yaml",
        "d",
    ]
    assert named_recipes(["fit", "--help"]) == []


def test_hints() -> None:
    assert hint("max_epoch", ["max_steps", "max_epochs"]) == " Did you mean max_epochs?"
    assert hint("zebra", ["max_steps", "max_epochs"]) == ""


def test_a_part_read_twice_shows_the_first_mistake() -> None:
    loop = TypeError("Config file loop detected: a.yaml -> a.yaml")
    loop.__context__ = ValueError("Option 'depht' is not accepted")
    error = TypeError('Parser key "model.projector":\n  Config file loop detected: a.yaml -> a.yaml')
    error.__cause__ = loop
    assert explain(error, []) == "model.projector: Option 'depht' is not accepted"


@pytest.mark.parametrize("loop", ["recipe.yaml", "other.yaml"])
def test_a_file_that_is_a_part_of_itself(loop: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {loop}\n")
    (tmp_path / "other.yaml").write_text("decoder: recipe.yaml\n")
    with pytest.raises(RecipeError, match=r"names .*recipe\.yaml, of which it is a part itself"):
        read_recipe(tmp_path / "recipe.yaml")


def test_an_alias_inside_what_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: &model {decoder: *model}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml holds an alias"):
        read_recipe(tmp_path / "recipe.yaml")
