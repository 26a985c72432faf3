"""The README is true: its commands parse or run, its YAML blocks are recipes, its example of a part of one's own works."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import main
from components.benchmarks import ShapesWorld
from components.benchmarks.records import rebuilt
from components.benchmarks.report import Report
from components.shapes_world import Setting

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:<!-- ([\w ]+) -->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)

TO_THEIR_EDGE = {
    "main.py import": "needs the network; small folders are imported in tests/components/huggingface, here its options are read",
    "main.py export": "needs a trained run; small runs are exported in tests/components/huggingface, here its options are read",
    "score --benchmark mme": "needs MME; folders of results are scored in tests/components/benchmarks, here its options are read",
    "vllm serve": "needs vLLM and a GPU; that the named template is written is tested with the exports",
    "tensorboard --logdir runs/quickstart": "serves until stopped; here it is asked for its help",
    "torchrun --nproc_per_node 8": "needs 8 GPUs; the command behind it is resolved",
    "main.py plan": "run, and compared with what is shown; without --simulate, which tests/components/plan shows",
    "recipes/meta_llava_13b": "needs a cluster; resolved",
    "recipes/llava15": "needs GPUs and data; resolved",
    "recipes/shapes_world_exam": "20 minutes; resolved here, run for the table",
    "recipes/own_pictures": "needs pictures of one's own; resolved here, run on small files below",
    "recipes/own_conversations": "needs pictures of one's own; resolved here",
    "recipes/quickstart": "3 minutes; resolved here, run whole in the slow tests",
    "main.py index": "needs data; small shards are indexed in tests/test_index_command.py, here its options are read",
    "img2dataset": "needs the network and img2dataset; not run",
    "hf download": "needs the network; not run",
    "curl -L": "needs the network; not run",
    "sed -i": "puts names over the columns of a downloaded file; run on a small one",
    "tests.benchmarks": "minutes each, run for the figures; here the modules are found",
    "NAME": "a pattern; not run",
    "pytest": "this test run itself",
    "source .venv": "done by the test command",
}
"""Commands that need a GPU, a cluster, data or many minutes, and what is tested of them instead."""


def bash_lines():
    for _, language, text in BLOCKS:
        if language == "bash" and not text.startswith("#!"):
            yield from (line for line in text.splitlines() if line.strip())


def recipe_commands(names="fit|validate|test|predict"):
    joined = "\n".join(text for _, language, text in BLOCKS if language == "bash")
    return re.findall(rf"main\.py ((?:{names}) --config .*)", joined)


@pytest.mark.parametrize("command", sorted(set(recipe_commands())))
def test_commands_with_a_recipe_resolve(command, monkeypatch, capsys, tmp_path):
    gated = tmp_path / "gated.yaml"
    gated.write_text(block_with("class_path: my_projector"))
    (tmp_path / "my_projector.py").write_text(block_with("class GatedProjector"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    command = command.replace("recipes/projector/gated.yaml", str(gated))
    with pytest.raises(SystemExit) as end:
        main.main([*shlex.split(command), "--print_config"])
    assert end.value.code == 0
    assert {"model", "data", "trainer"} <= set(yaml.safe_load(capsys.readouterr().out))


def test_every_command_is_known_here():
    for line in bash_lines():
        known = any(edge in line for edge in TO_THEIR_EDGE) or re.search(r"main\.py (ask|compare|score --benchmark own) ", line)
        assert known, f"README runs '{line}': test it, or say to which edge it is tested"


def test_quickstart_and_test_commands_are_marked():
    marked = {mark: text for mark, _, text in BLOCKS if mark}
    assert set(marked) == {"quickstart command", "test command"}
    for text in marked.values():
        assert len(text.splitlines()) == 1 and text.startswith("python3 -m venv .venv && ")
    assert "main.py fit --config recipes/quickstart.yaml" in marked["quickstart command"]


def test_cluster_script_is_bash():
    script = next(text for _, language, text in BLOCKS if text.startswith("#!"))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    tasks, nodes = (int(re.search(rf"--{key}=(\d+)", script)[1]) for key in ("ntasks-per-node", "nodes"))
    trainer = yaml.safe_load((ROOT / "recipes/trainer/fsdp_16x8xa100.yaml").read_text())
    assert (nodes, tasks) == (trainer["num_nodes"], trainer["devices"])


def test_yaml_blocks_are_parts_of_recipes():
    sections = {"seed_everything", "max_steps", "trainer", "model", "data", "warmup", "checkpoint", "validation", "guards"}
    blocks = [yaml.safe_load(text) for _, language, text in BLOCKS if language == "yaml"]
    assert len(blocks) >= 4
    for block in blocks:
        assert set(block) <= sections or set(block) == {"class_path", "init_args"}, block


def test_overlay_block_is_the_file():
    overlay = yaml.safe_load((ROOT / "recipes/ablations/projector_linear.yaml").read_text())
    assert overlay == yaml.safe_load(block_with("../projector/linear.yaml"))


def test_recipe_block_resolves(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "recipes"
    folder.symlink_to(ROOT / "recipes")
    text = block_with("# Line 1 asks the question")
    for part in ("trainer", "vision_tower", "projector", "decoder", "data", "validation"):
        text = text.replace(f" {part}/", f" {ROOT}/recipes/{part}/")
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["fit", "--config", "recipe.yaml", "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["global_batch_size"] == 256


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("monitor: gqa_partial/accuracy", "llava15_7b_finetune"),
        ("max_skipped_steps", "llava15_7b_finetune"),
        ("shards: 128", "meta_llava_13b_pretrain"),
        ("class_path: components.data.TarShards", "own_pictures"),
    ],
)
def test_overlay_blocks_resolve_over_a_recipe(words, recipe, tmp_path, capsys):
    block = block_with(words).replace("benchmark/", f"{ROOT}/recipes/benchmark/")
    (tmp_path / "overlay.yaml").write_text(block)
    with pytest.raises(SystemExit) as end:
        recipe = str(ROOT / f"recipes/{recipe}.yaml")
        main.main(["fit", "--config", recipe, "--config", str(tmp_path / "overlay.yaml"), "--print_config"])
    assert end.value.code == 0
    resolved, stated = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(block)
    if "validation" in stated:
        assert set(resolved["validation"].pop("benchmarks")) == set(stated["validation"].pop("benchmarks"))
    assert_holds(resolved, stated)


def assert_holds(resolved, stated):
    for key, value in stated.items():
        if isinstance(value, dict):
            assert_holds(resolved[key if key in resolved else str(key)], value)  # a resolved recipe has names for keys, no numbers
        else:
            assert resolved[key] == value, key


@pytest.mark.usefixtures("shards_expanded_once")
def test_plans_are_as_shown(tmp_path, monkeypatch, capsys):
    commands = [line for line in bash_lines() if "main.py plan" in line]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main.main(shlex.split(command.replace("recipes/", f"{ROOT}/recipes/"))[2:]) == 0
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in block_with("292,969 x 2,048 samples").splitlines() if line]
    assert [line for line in shown if line not in printed] == []


@pytest.mark.parametrize("command", ["ask", "import", "export", "score", "compare", "index"])
def test_options_of_commands_without_a_recipe_exist(command, capsys):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    options = capsys.readouterr().out
    lines = [line for line in bash_lines() if f"main.py {command} " in line]
    assert lines
    for line in lines:
        assert all(option in options for option in re.findall(r"--\w+", line)), line


def test_columns_of_a_downloaded_file_get_their_names(tmp_path, monkeypatch):
    command = next(line for line in bash_lines() if line.startswith("sed -i"))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/cc3m.tsv").write_text("a cat\thttps://example.org/cat.jpg\n")
    subprocess.run(["bash", "-c", command], check=True)
    assert Path("data/cc3m.tsv").read_text() == "caption\turl\na cat\thttps://example.org/cat.jpg\n"


def test_benchmarks_are_there():
    lines = [line for line in bash_lines() if "-m tests.benchmarks" in line]
    assert lines
    for line in lines:
        names = [word for word in line.partition("tests.benchmarks ")[2].split() if not word.startswith("-")]
        for name in names:
            assert (ROOT / f"tests/benchmarks/{name}.py").is_file(), line


def test_ask_and_tensorboard_explain_themselves(capsys):
    with pytest.raises(SystemExit):
        main.main(["ask", "--help"])
    options = capsys.readouterr().out
    for line in bash_lines():
        if "main.py ask" in line:
            assert all(option in options for option in re.findall(r"--\w+", line))
    shown = subprocess.run([sys.executable, "-m", "tensorboard.main", "--helpfull"], capture_output=True, text=True, check=False)
    assert "--logdir" in shown.stdout + shown.stderr


SHORT = "--max_steps 2 --warmup.fraction 0 --validation.limit 4 --validation.num_pictures 2 --data.num_workers 0"


def test_projector_of_ones_own_trains(tmp_path, monkeypatch):
    (tmp_path / "my_projector.py").write_text(block_with("class GatedProjector"))
    (tmp_path / "gated.yaml").write_text(block_with("class_path: my_projector"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = next(command for command in recipe_commands("fit") if "gated.yaml" in command)
    command = command.replace("recipes/projector/gated.yaml", "gated.yaml").replace("recipes/", f"{ROOT}/recipes/")
    assert main.main(shlex.split(f"{command} {SHORT}")) == 0
    saved = yaml.safe_load((tmp_path / "runs/gated/recipe.yaml").read_text())
    assert saved["model"]["projector"]["class_path"] == "my_projector.GatedProjector"


def test_own_pictures_train_on_small_files(tmp_path, monkeypatch, capsys):
    """The recipe for own data, on two pictures with the line that the README shows."""
    line = json.loads(next(text for _, language, text in BLOCKS if language == "json"))
    folder = tmp_path / "data/own"
    for number, color in enumerate(("red", "blue")):
        file = folder / "images" / line["image"].replace("17", str(number))
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), color).save(file)
        row = line | {"question_id": str(number), "image": str(file.relative_to(folder / "images")), "answer": str(number)}
        for split in ("train", "eval"):
            with (folder / f"{split}.jsonl").open("a") as rows:
                rows.write(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    command = f"fit --config {ROOT}/recipes/own_pictures.yaml --data.global_batch_size 2 {SHORT}"
    assert main.main(shlex.split(command)) == 0
    assert re.search(r"count\s+2 ", capsys.readouterr().out)


def test_answers_are_scored_as_shown(tmp_path, monkeypatch, capsys):
    """The file of answers that the command before it would have written."""
    line = json.loads(next(text for _, language, text in BLOCKS if language == "json"))
    (tmp_path / "data/own").mkdir(parents=True)
    (tmp_path / "data/own/eval.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": line["question_id"], "text": line["answer"]}) + "\n")
    monkeypatch.chdir(tmp_path)
    command = next(text for text in bash_lines() if "main.py score --benchmark own " in text)
    assert main.main(shlex.split(command)[2:]) == 0
    assert re.search(r"all +1 +1\.000", capsys.readouterr().out)


def test_records_are_compared_as_shown(tmp_path, monkeypatch, capsys):
    """Records of the two runs, of which the first saw the color and the second nothing."""
    monkeypatch.chdir(tmp_path)
    command = shlex.split(next(text for text in bash_lines() if "main.py compare " in text))[2:]
    benchmark = ShapesWorld(Setting(grid=2, max_objects=3, image_size=32), num_scenes=50)
    benchmark.setup()
    asked = benchmark.questions()
    for path, kinds in zip(command[1:], ({"color"}, set()), strict=True):
        name, _, step = Path(path).stem.rpartition("_step_")
        answers = {question.id: question.reference if question.group in kinds else "" for question in asked}
        written = Report(name, f"at step {step}", benchmark, asked, answers, len(asked)).write(Path(path).parent, {})
        assert written == Path(path)
    assert main.main(command) == 0
    shown = capsys.readouterr().out
    headings = block_with("shapes_world: ShapesWorld").splitlines()[3].split()
    assert next(row for row in shown.splitlines() if "B - A" in row).split() == headings
    assert re.search(r"accuracy/color +1\.000 +0\.000 +-1\.000", shown)


def test_stated_prompt_hashes_are_those_of_the_part_files():
    rows = re.findall(r"^\|.*`benchmark/(\w+)\.yaml`.*`(\w{8})` \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for name, stated in rows:
        part = yaml.safe_load((ROOT / f"recipes/benchmark/{name}.yaml").read_text())
        assert rebuilt(part, Path(name)).prompt_hash() == stated, name


KINDS = {
    "pixel shuffle": None,
    "linear": "projector_linear",
    "mlp": "projector_mlp",
    "resampler": "projector_resampler_16",
}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", KINDS.values(), ids=KINDS)
def test_every_projector_kind_learns_the_quickstart(overlay, tmp_path, monkeypatch):
    """The whole quickstart, not a shorter one: what the README says it reaches, and blind without its pictures."""
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", f"{ROOT}/recipes/quickstart.yaml"]
    command += ["--config", f"{ROOT}/recipes/ablations/{overlay}.yaml"] if overlay else []
    assert main.main([*command, "--run", "kind"]) == 0
    record = json.loads(next((tmp_path / "runs/kind/validation").glob("shapes_world_step_1500.json")).read_text())
    accuracy = record["metrics"]
    assert accuracy["accuracy/color"] >= 0.9
    if overlay is None:
        assert accuracy["accuracy/count"] >= 0.9 and accuracy["accuracy/shape"] >= 0.75 and accuracy["accuracy"] >= 0.8
    assert record["shuffled_pictures"]["accuracy"] <= record["text_only_best"]["accuracy"] + 0.05


def block_with(words: str) -> str:
    return next(text for _, _, text in BLOCKS if words in text)
