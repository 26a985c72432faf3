"""Benchmark: questions with one reference answer each, and the exact-match rule that scores them. No model, no training.

Source: the short-answer scoring of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, scripts/convert_gqa_for_eval.py).
Differs: spaces around an answer do not count against it, and reference answers are normalised like the model's.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    Args:
        id: Name of the question, unique in its benchmark.
        prompt: What the model is asked; `<image>` stands where each picture belongs.
        images: Names of the pictures, in the order of their places, for `Benchmark.read_image`.
        reference: The right answer.
        group: What kind of question it is; accuracy is reported for each group. Empty where there are no groups.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    reference: str
    group: str = ""


class Benchmark(ABC):
    """Questions out; answers in, metrics out. The same questions always give the same ids, prompts and metrics."""

    @abstractmethod
    def setup(self) -> None:
        """Open the files. Called once a process, before anything is trained.

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

    def score(self, answers: dict[str, str]) -> dict[str, float]:
        """Answers by question id in, metrics out: `accuracy`, `accuracy/GROUP` and `count`, over what was answered."""
        if unknown := answers.keys() - {question.id for question in self.questions()}:
            raise ValueError(f"{self.describe()} has no question {sorted(unknown)[0]!r}, which was answered.")
        return exact_match([question for question in self.questions() if question.id in answers], answers)

    def fingerprint(self) -> str:
        """Changes when any question, reference answer or picture name changes."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions():
            digest.update(repr(astuple(question)).encode(errors="surrogatepass"))
        return digest.hexdigest()


def normalize(answer: str) -> str:
    """An answer without the differences that do not count: spaces around it, letter case, a period at its end."""
    return answer.strip().lower().removesuffix(".").rstrip()


def exact_match(questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Share of answers that equal the reference after `normalize`, over all questions and for each group, and their count."""
    if not questions:
        raise ValueError("There are no answers to score.")
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        equal = normalize(answers[question.id]) == normalize(question.reference)
        right["accuracy"].append(equal)
        if question.group:
            right[f"accuracy/{question.group}"].append(equal)
    return {**{name: sum(equal) / len(equal) for name, equal in right.items()}, "count": float(len(questions))}


def text_only_best(questions: list[Question]) -> dict[str, float]:
    """What the best answers without pictures score: to every prompt text the commonest reference among these very questions."""
    references: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        references[question.prompt][normalize(question.reference)] += 1
    return exact_match(questions, {question.id: references[question.prompt].most_common(1)[0][0] for question in questions})
