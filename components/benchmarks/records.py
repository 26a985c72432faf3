"""Answer files and records read again: those of a validation, and answers as LLaVA and the official tools write them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from components.annotations import Annotations
from components.benchmarks.benchmark import Benchmark, Question, listed
from components.benchmarks.files import read_json
from components.errors import RecipeError

_STATED = {"name", "when", "benchmark", "version", "split", "prompt_hash", "questions"}
_TEXTS = ("answer", "text", "prediction")


@dataclass(frozen=True)
class Record:
    """What a validation has written down.

    Args:
        path: The record's file.
        facts: Its content.
        benchmark: The benchmark, rebuilt, without its files.
        asked: The questions.
        answers: The answers, by id.
    """

    path: Path
    facts: dict[str, Any]
    benchmark: Benchmark
    asked: list[Question]
    answers: dict[str, str]


def read_record(path: Path) -> Record:
    """The record of a validation and the answers beside it.

    Args:
        path: The record (`gqa_step_500.json`) or its answers (`gqa_step_500.jsonl`).

    Raises:
        RecipeError: One of the files is missing or is no record.
    """
    file = path.with_suffix(".json")
    facts = read_json(file, "Name a record that a validation or `score --output` has written, as validation/gqa_step_500.json.")
    if not isinstance(facts, dict) or not facts.keys() >= _STATED:
        missing = ", ".join(sorted(_STATED - facts.keys())) if isinstance(facts, dict) else "anything"
        raise RecipeError(f"{file} is not the record of a validation: it does not state {missing}.")
    asked, answers = asked_and_answered(path.with_suffix(".jsonl"))
    return Record(file, facts, rebuilt(facts["benchmark"], file), asked, answers)


def rebuilt(stated: dict[str, Any], where: Path) -> Benchmark:
    """A benchmark from its class and arguments, without opening its files.

    Raises:
        RecipeError: There is no such benchmark any more.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Benchmark, "benchmark")
    try:
        return parser.instantiate(parser.parse_object({"benchmark": stated})).benchmark  # type: ignore[attr-defined]
    except ArgumentError as error:
        raise RecipeError(f"{where}: its benchmark cannot be made again: {error}") from error


def is_of_validation(path: Path) -> bool:
    """Whether an answer file holds the questions too, as those of a validation do."""
    return (
        path.suffix == ".jsonl"
        and path.is_file()
        and {"id", "prompt", "images", "reference", "facts", "answer"} <= Annotations(path)[0].keys()
    )


def asked_and_answered(path: Path) -> tuple[list[Question], dict[str, str]]:
    """The questions and answers of a validation's answer file.

    Raises:
        RecipeError: The file is missing, or a row is no question with its answer.
    """
    asked, answers, records = {}, _Answers(path), Annotations(path)
    for index, row in enumerate(records):
        try:
            values = {name: row[name] for name in ("id", "prompt", "reference", "group", "facts")}
            question = Question(images=tuple(row["images"]), **values)
            answers.add(question.id, row["answer"])
        except KeyError as error:
            raise RecipeError(f"{records.where(index)} lacks {error}: it is not a row of a validation's answers.") from error
        if not isinstance(row["answer"], str):
            raise RecipeError(f"{records.where(index)}: the answer must be a text; it is {row['answer']!r}.")
        asked[question.id] = question
    return list(asked.values()), answers.finished()


def states_prompts(path: Path) -> bool:
    """Whether an answer file says what was asked, as LLaVA's do."""
    return path.is_file() and all(row.get("prompt") for row in Annotations(path))


def read_answers(path: Path, benchmark: Benchmark) -> dict[str, str]:
    """Answers by question id from a file, or from a folder where the benchmark's official tool reads one.

    Args:
        path: JSON or JSONL with `answer`, `text` or `prediction` beside what names the question; or MME's folder of results.
        benchmark: The benchmark whose questions they answer, set up.

    Raises:
        RecipeError: The file is missing, a row has no answer or was asked something else, or a question has two different answers.
    """
    if path.is_dir():
        return benchmark.read_results(path)
    answers, records, unscored = _Answers(path), Annotations(path), benchmark.unscored()
    questions = {question.id: question for question in benchmark.questions()}
    for index, row in enumerate(records):
        text = next((row[key] for key in _TEXTS if isinstance(row.get(key), str)), None)
        if text is None:
            raise RecipeError(f"{records.where(index)} has no text under {', '.join(_TEXTS)}.")
        try:
            name = benchmark.question_id(row)
        except (StopIteration, KeyError) as error:
            told = f"it has {', '.join(row)}"
            raise RecipeError(f"{records.where(index)} does not say which question of the benchmark it answers: {told}.") from error
        except RecipeError as error:
            raise RecipeError(f"{records.where(index)}: {error}") from error
        asked, question = row.get("prompt"), questions.get(name)
        if question and asked and asked not in (question.text, question.prompt):
            raise RecipeError(
                f"{records.where(index)}: question {name} was asked as {asked!r}, but the benchmark asks {question.text!r}. Give "
                "the prompt that was used with --benchmark.prompt."
            )
        if name not in unscored:
            answers.add(name, text)
    return answers.finished()


class _Answers:
    """Collects answers; the same answer given twice counts once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, str] = {}
        self.contradicted: set[str] = set()

    def add(self, question_id: str, answer: str) -> None:
        if self.answers.setdefault(question_id, answer) != answer:
            self.contradicted.add(question_id)

    def finished(self) -> dict[str, str]:
        if self.contradicted:
            ids = listed(list(self.contradicted))
            raise RecipeError(f"{self.path} gives different answers to the same question: {ids}. Keep one of each.")
        return self.answers
