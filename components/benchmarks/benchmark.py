"""Benchmark: questions with known answers, and how answers are scored. No model, no training."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from components.benchmarks.normalization import short
from components.benchmarks.tally import Tally, Totals, ratio, tally
from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import RecipeError

SEED = 0  # the same questions are drawn at every step


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    Args:
        id: Name of the question, unique in its benchmark.
        prompt: What the model is asked; `<image>` stands where each picture belongs.
        images: Names of the pictures, in the order of their places, for `Benchmark.read_image`.
        reference: The right answer, or the best of several; empty where it is not known.
        group: What kind of question it is; scores are reported for each group. Empty where there are no groups.
        facts: What scoring needs besides, as JSON has it.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    reference: str = ""
    group: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as answer files have it: without the place of a picture before it."""
        return self.prompt.removeprefix(f"{IMAGE_PLACEHOLDER}\n")


class Benchmark(ABC):
    """Questions out; answers in, metrics out. The same questions always give the same ids, prompts and metrics.

    Scoring needs the questions alone, not the files they came from: answers that were written down with their questions can be
    scored and compared anywhere.
    """

    version = "1"
    """Of prompts and scoring; another one where a number may change."""
    headline = "accuracy"
    """The metric that stands for all, from 0 to 1 unless the class says otherwise."""
    by_group = "accuracy"
    """The metric that is shown for each group, as `METRIC/GROUP`."""
    decimals = 3
    """Of the scores in tables."""
    split = ""
    """Which part of the benchmark is asked."""
    prompt = "{question}"
    """What is asked, with the question at its place."""

    @abstractmethod
    def setup(self, pictures: bool = True) -> None:
        """Open the files. Called once a process, before anything is trained.

        Args:
            pictures: Whether to look for the pictures too: a model must see them, scoring need not.

        Raises:
            RecipeError: Something is missing or malformed; the message says what and how to get it.
        """

    @abstractmethod
    def questions(self) -> list[Question]:
        """All questions, always in the same order."""

    @abstractmethod
    def read_image(self, name: str) -> bytes:
        """The encoded picture of a name that a question gives.

        Raises:
            RecipeError: The picture cannot be read.
        """

    @abstractmethod
    def describe(self) -> str:
        """The benchmark in a few words, for tables."""

    # --- what an answer is worth

    def normalize(self, answer: str) -> str:
        """An answer without the differences that do not count."""
        return short(answer)

    def worth(self, question: Question) -> Mapping[str, float]:
        """Normalised answers that are worth something, from 0 to 1; any other is worth nothing."""
        return {self.normalize(question.reference): 1.0}

    def credit(self, question: Question, answer: str) -> float:
        """What an answer to a question is worth, from 0 to 1."""
        return self.worth(question).get(self.normalize(answer), 0.0)

    # --- what all answers are worth

    def tally(self, asked: Sequence[Question], answers: Mapping[str, str]) -> Tally:
        """What each picture's questions count: by default questions and credit, over all and for each group."""
        entries = []
        for question in asked:
            credit = self.credit(question, answers[question.id])
            counts = {"questions": 1.0, "credit": credit}
            if question.group:
                counts |= {f"questions/{question.group}": 1.0, f"credit/{question.group}": credit}
            entries.append(("", unit(question), counts))
        return tally(entries)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """Sums of a tally in, metrics out. Written for numbers and arrays alike, so that it gives intervals too."""
        groups = [name.removeprefix("questions/") for name in totals if name.startswith("questions/")]
        by_group = {f"accuracy/{group}": ratio(totals[f"credit/{group}"], totals[f"questions/{group}"]) for group in groups}
        return {"accuracy": ratio(totals["credit"], totals["questions"]), **by_group}

    def score(self, answers: Mapping[str, str], asked: Sequence[Question] | None = None) -> dict[str, float]:
        """Answers by question id in, metrics and the `count` of the questions out.

        Args:
            answers: An answer to every question that was asked, in any order.
            asked: The questions that were asked; all, if it is not given.

        Raises:
            RecipeError: An answer is missing, or there is one to a question that was not asked; the message names the ids.
        """
        asked = self.questions() if asked is None else asked
        demand_same_ids(self.describe(), asked, answers)
        values = self.metrics(self.tally(asked, answers).totals())
        return {name: float(value) for name, value in values.items() if not np.isnan(value)} | {"count": float(len(asked))}

    def not_available(self, asked: Sequence[Question] | None = None) -> dict[str, str]:
        """Metrics that the questions (all, if none are given) and the files at hand do not allow, each with the reason."""
        return {}

    def remarks(self, metrics: Mapping[str, float]) -> list[str]:
        """What a reader of these metrics must know."""
        return []

    def upload(self, answers: Mapping[str, str]) -> Any:
        """What the benchmark's server takes, as JSON has it; None where there is no server."""
        return None

    # --- which questions, and whose answers

    def filled(self, text: str) -> str:
        """The prompt about one picture with a question in its place."""
        return f"{IMAGE_PLACEHOLDER}\n{self.prompt.replace('{question}', text)}"

    def draw(self, limit: int | None) -> list[Question]:
        """At most `limit` of the questions, in their order; the same ones at every step.

        Raises:
            RecipeError: So few make no score.
        """
        questions = self.questions()
        return questions if limit is None else sampled(questions, limit)

    def unscored(self) -> set[str]:
        """Ids of questions that the files hold but that are not scored: answers to them in a file are left out."""
        return set()

    def question_id(self, row: Mapping[str, Any]) -> str:
        """The id of the question that a row of an answer file answers, from whatever names it there."""
        return str(next(row[key] for key in ("id", "question_id", "questionId") if key in row))

    def read_results(self, folder: Path) -> dict[str, str]:
        """Answers by question id from the folder that the benchmark's official tool reads.

        Raises:
            RecipeError: Its tool reads a file, or the folder is not laid out so.
        """
        raise RecipeError(f"{folder} is a folder, but the answers to {self.describe()} are one file. Name the file.")

    def prompt_hash(self) -> str:
        """Eight hexadecimal digits that stand for `prompt`."""
        return hashlib.blake2b(self.prompt.encode(), digest_size=4).hexdigest()

    def stated(self) -> dict[str, Any]:
        """The benchmark as a recipe states it: its class and every argument."""
        values = {name: getattr(self, name) for name in signature(type(self)).parameters}
        arguments = {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}


def sampled(questions: list[Question], limit: int) -> list[Question]:
    """At most `limit` of the questions, in their order; the same ones at every step."""
    return [questions[i] for i in np.sort(np.random.default_rng(SEED).permutation(len(questions))[:limit])]


def unit(question: Question) -> str:
    """What is drawn together when an interval is estimated: questions about the same pictures."""
    return " ".join(question.images) or question.id


def demand_same_ids(where: str, asked: Sequence[Question], answers: Mapping[str, str], remedy: str = "") -> None:
    """Every question that was asked has an answer, and no other has.

    Args:
        where: What is checked, for the message.
        asked: The questions.
        answers: Answers by question id.
        remedy: What to do about missing answers, for the message.

    Raises:
        RecipeError: It is not so; the message names the ids.
    """
    ids = {question.id for question in asked}
    if unknown := [name for name in answers if name not in ids]:
        counted = f"{len(unknown)} of {len(answers)} answers"
        raise RecipeError(f"{where}: {counted} are to questions that were not asked: {listed(unknown)}.")
    if missing := [name for name in ids if name not in answers]:
        raise RecipeError(f"{where}: {len(missing)} of {len(ids)} questions have no answer: {listed(missing)}.{remedy}")
    if not ids:
        raise RecipeError(f"{where}: there are no questions, so there is no score.")


def demand_place(prompt: str) -> None:
    """A prompt has a place for the question.

    Raises:
        RecipeError: It has not.
    """
    if "{question}" not in prompt:
        raise RecipeError(f"prompt = {prompt!r} asks nothing: write {{question}} where the question belongs.")


def listed(ids: Sequence[str], most: int = 5) -> str:
    """The first few of the ids, and how many more there are."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(sorted(ids)[:most]) + more


def text_only_best(benchmark: Benchmark, asked: Sequence[Question]) -> dict[str, str]:
    """The best answers without pictures: to every prompt the one answer that is worth most to the very questions that ask it."""
    worth: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked:
        for answer, credit in benchmark.worth(question).items():
            if benchmark.normalize(answer) == answer:  # else it could not be given
                worth[question.prompt][answer] += credit  # type: ignore[assignment]
    return {q.id: worth[q.prompt].most_common(1)[0][0] if worth[q.prompt] else "" for q in asked}
