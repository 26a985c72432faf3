"""`python main.py score`: a file of answers scored as a validation would score them, without a model."""

from pathlib import Path

from jsonargparse import ArgumentParser

from components.benchmarks import Benchmark
from components.benchmarks.records import asked_and_answered, carries_questions, read_answers, read_record
from components.benchmarks.report import Report
from components.errors import RecipeError

BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmark"


def score(benchmark: Benchmark, answers: Path, output: Path | None = None, partial: bool = False, name: str = "answers") -> str:
    """Score answers.

    Args:
        benchmark: The benchmark whose questions are answered.
        answers: Answers of a validation (JSONL; it carries the questions, so the benchmark's own files are not opened), of the
            predict command or of LLaVA (JSONL with question_id and text), a JSON list as GQA or VizWiz take it, or MME's folder
            of results.
        output: Folder for a record that `compare` reads; none is written without.
        partial: Whether to score the questions that are answered, though others are not.
        name: Name of the benchmark in table and files.

    Returns:
        The table.

    Raises:
        RecipeError: A file is missing, an answer is missing, or there is one to a question that the benchmark does not have.
    """
    if not answers.exists():
        raise RecipeError(f"--answers {answers} does not exist.")
    if answers.is_file() and carries_questions(answers):
        asked, given = asked_and_answered(answers)
        record = answers.with_suffix(".json")
        total = read_record(record).facts["questions"] if record.is_file() else len(asked)
    else:
        benchmark.setup(pictures=False)
        given, asked = read_answers(answers, benchmark), benchmark.questions()
        total = len(asked)
        if partial:
            asked = [question for question in asked if question.id in given]
    report = Report(name, f"from {answers.name if answers.is_dir() else answers.stem}", benchmark, asked, given, total)
    written = report.write(output, {"step": None, "answers": str(answers)}) if output is not None else None
    return report.table() + (f"\nwritten: {written}\n" if written else "")


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
    before = ["", *arguments[:-1]]
    given = [_file(value) if option == "--benchmark" else value for option, value in zip(before, arguments, strict=True)]
    options = parser.instantiate(parser.parse_args(given)).as_dict()
    name = next((Path(value).stem for option, value in zip(before, given, strict=True) if option == "--benchmark"), "answers")
    print(score(**options, name=name), end="")
    return 0


def _file(name: str) -> str:
    """A name of a file in recipes/benchmark/ as its path; anything else as it is."""
    path = BENCHMARKS / f"{name}.yaml"
    return str(path) if path.is_file() else name
