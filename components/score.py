"""`python main.py score`: a file of answers scored as a validation would score them, without a model."""

import itertools
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from components import benchmarks
from components.benchmarks import Benchmark
from components.benchmarks.benchmark import demand_same_ids
from components.benchmarks.records import is_of_validation, read_answers, read_record, states_prompts
from components.benchmarks.report import Report
from components.errors import RecipeError
from components.recipe_files import hint

BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmark"


def score(benchmark: Benchmark, answers: Path, output: Path | None = None, partial: bool = False, name: str = "answers") -> str:
    """Score answers.

    Args:
        benchmark: The benchmark whose questions are answered.
        answers: Answers of a validation (JSONL with its record beside it; it carries the questions, so the benchmark's own files
            are not opened), of the predict command or of LLaVA (JSONL with question_id and text), a JSON list as GQA or VizWiz
            take it, or MME's folder of results.
        output: Folder for a record that `compare` reads; none is written without.
        partial: Whether to score the questions that are answered, though others are not; a validation's answers are all there.
        name: Name of the benchmark in table and files.

    Returns:
        The table.

    Raises:
        RecipeError: A file is missing, an answer is missing, or there is one to a question that the benchmark does not have.
    """
    if not answers.exists():
        raise RecipeError(f"--answers {answers} does not exist.")
    report, known = (_of_validation if is_of_validation(answers) else _of_file)(benchmark, answers, partial, name)
    table = report.table()
    if output is None:
        return table
    try:
        written = report.write(output, known | {"answers": str(answers)})
    except OSError as error:
        raise RecipeError(f"--output {output}: no record can be written there ({error.strerror}). Name another folder.") from error
    return f"{table}\nwritten: {written}\n"


def _of_validation(benchmark: Benchmark, answers: Path, partial: bool, name: str) -> tuple[Report, dict[str, Any]]:
    """The report, and what the record knows besides: step, recipe, decoding."""
    if partial:
        raise RecipeError(f"{answers} is of a validation, which leaves no question out: --partial has no effect. Leave it out.")
    record = read_record(answers)
    stated, given = record.facts["benchmark"], benchmark.stated()
    if stated["class_path"] != given["class_path"]:
        raise RecipeError(f"{record.path} is of {stated['class_path']}, not of {given['class_path']} (--benchmark).")
    if (record.facts["prompt_hash"], record.facts["split"]) != (benchmark.prompt_hash(), benchmark.split):
        raise RecipeError(
            f"{record.path}: the questions were asked with {stated['init_args']}. Give prompt and split as they were, as "
            "--benchmark.prompt."
        )
    report = Report(name, f"from {answers.stem}", benchmark, record.asked, record.answers, record.facts["questions"])
    ours = {*report.record(), "shuffled_pictures"} - {"versions"}
    known = {key: value for key, value in record.facts.items() if key not in ours}
    return report, known | {"scored_with": report.record()["versions"]}


def _of_file(benchmark: Benchmark, answers: Path, partial: bool, name: str) -> tuple[Report, dict[str, Any]]:
    """The report, and whether the file says what was asked."""
    benchmark.setup(pictures=False)
    given, asked = read_answers(answers, benchmark), benchmark.questions()
    total = len(asked)
    if partial:
        asked = [question for question in asked if question.id in given]
    demand_same_ids(f"--answers {answers}", asked, given, " --partial true scores the others, and says so.")
    when = f"from {answers.name if answers.is_dir() else answers.stem}"
    return Report(name, when, benchmark, asked, given, total), {"prompt_verified": states_prompts(answers)}


def main(arguments: list[str]) -> int:
    """Parse the options of `score` and print the table."""
    parser = ArgumentParser(
        prog="python main.py score",
        description="Score a file of answers, without a model. --benchmark takes the name of a file in recipes/benchmark/, the "
        "path of such a file or a class; --benchmark.KEY changes one of its arguments, as --benchmark.folder data/mme.",
        exit_on_error=False,
    )
    parser.add_subclass_arguments(Benchmark, "benchmark", required=True)
    parser.add_function_arguments(score, skip={"benchmark", "name"})
    parts = (argument.split("=", 1) if argument.startswith("--benchmark=") else [argument] for argument in arguments)
    arguments, name = list(itertools.chain.from_iterable(parts)), ""
    if "--benchmark" in arguments[:-1]:
        place = arguments.index("--benchmark") + 1
        arguments[place] = _file(arguments[place])
        part = arguments[place]
        name = Path(part).stem if Path(part).is_file() else part.rpartition(".")[2]
    print(score(**parser.instantiate(parser.parse_args(arguments)).as_dict(), name=name), end="")
    return 0


def _file(name: str) -> str:
    """A name of a file in recipes/benchmark/ as its path; a path or a class as it is.

    Raises:
        RecipeError: It is none of them.
    """
    path = BENCHMARKS / f"{name}.yaml"
    if path.is_file():
        return str(path)
    if not Path(name).is_file() and not hasattr(benchmarks, name) and "." not in name:
        known = sorted(file.stem for file in BENCHMARKS.glob("*.yaml"))
        raise RecipeError(f"--benchmark {name} is no file in recipes/benchmark/, no path and no class.{hint(name, known)}")
    return name
