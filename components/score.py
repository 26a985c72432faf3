"""`python main.py score`: a file of answers scored as a validation would score them, without a model."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from components import benchmarks
from components.benchmarks import Benchmark
from components.benchmarks.benchmark import listed
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
    try:
        report, known = (_of_validation if is_of_validation(answers) else _of_file)(benchmark, answers, partial)
        report = replace(report, name=name)
        if output is None:
            return report.table()
        written = report.write(
            output, {key: known[key] for key in known.keys() - report.record().keys()} | {"answers": str(answers)}
        )
        return f"{report.table()}\nwritten: {written}\n"
    except RecipeError as error:
        raise RecipeError(f"--answers {answers}: {error}") from error


def _of_validation(benchmark: Benchmark, answers: Path, partial: bool) -> tuple[Report, dict[str, Any]]:
    if partial:
        raise RecipeError("all questions of a validation are answered: --partial has no effect. Leave it out.")
    record = read_record(answers)
    stated = benchmark.stated()["class_path"]
    if record.facts["benchmark"]["class_path"] != stated:
        raise RecipeError(f"the record beside it is of {record.facts['benchmark']['class_path']}, not of {stated} (--benchmark).")
    for key, value in (("prompt_hash", benchmark.prompt_hash()), ("split", benchmark.split)):
        if record.facts[key] != value:
            raise RecipeError(
                f"the questions were asked with {key} {record.facts[key]}, not {value}; --benchmark cannot change that afterwards."
            )
    total = record.facts["questions"]
    return Report("", f"from {answers.stem}", benchmark, record.asked, record.answers, total), record.facts


def _of_file(benchmark: Benchmark, answers: Path, partial: bool) -> tuple[Report, dict[str, Any]]:
    benchmark.setup(pictures=False)
    given, asked = read_answers(answers, benchmark), benchmark.questions()
    total = len(asked)
    if partial:
        asked = [question for question in asked if question.id in given]
    elif given.keys() < {question.id for question in asked}:
        missing = [question.id for question in asked if question.id not in given]
        told = f"{len(missing)} of {total} questions have no answer: {listed(missing)}"
        raise RecipeError(f"{told}. --partial true scores the others, and says so.")
    when = f"from {answers.name if answers.is_dir() else answers.stem}"
    return Report("", when, benchmark, asked, given, total), {"prompt_verified": states_prompts(answers)}


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
