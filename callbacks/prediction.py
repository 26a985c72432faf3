"""Prediction: a file of questions answered by a trained model, on any number of ranks, and continued where it was interrupted."""

import json
import os
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from callbacks.validation.asking import ask, gather, raise_together
from components.benchmarks import Benchmark, Question
from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import RecipeError

PART = ".part"


class Prediction(Callback):
    """Questions in, a JSONL file of answers in LLaVA's format out, in the order of the questions.

    Every rank writes down its answers as they come (`OUTPUT.RANK.part`), so that an interrupted run goes on with the questions that
    have none.

    Args:
        questions: The questions; references are not needed.
        output: The file that is written.
        model_id: Name of the model in every row.
        batch_size: Prompts that each rank answers together, >= 1.
        max_new_tokens: Longest answer, in tokens, >= 1.
    """

    def __init__(self, questions: Benchmark, output: Path, model_id: str, batch_size: int = 16, max_new_tokens: int = 128) -> None:
        if batch_size < 1 or max_new_tokens < 1:
            raise RecipeError(f"--batch_size {batch_size} and --max_new_tokens {max_new_tokens} must be at least 1.")
        self.questions = questions
        self.output = output
        self.model_id = model_id
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the questions before the model is built."""
        self.questions.setup()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer what is not answered yet, then write all answers into one file."""
        questions = {question.id: question for question in self.questions.questions()}
        known: dict[str, str] = {}
        error: RecipeError | None = None
        if trainer.is_global_zero:
            try:
                known = self._written(questions)
            except RecipeError as problem:
                error = problem
        raise_together(trainer, error)
        answered = set(trainer.strategy.broadcast(list(known)))
        if answered and trainer.is_global_zero:
            print(f"{self.output}: {len(answered)} of {len(questions)} questions are answered already")
        left = [question for question in questions.values() if question.id not in answered]
        with self._part(trainer.global_rank) as part:

            def keep(answers: dict[str, str]) -> None:
                part.writelines(self._line(questions[name], answer) for name, answer in answers.items())
                part.flush()

            options: dict[str, Any] = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
            new = gather(trainer, ask(trainer, pl_module, self.questions, left, title="answers", keep=keep, **options))
        if trainer.is_global_zero:
            self._finish(questions, known | new)
        trainer.strategy.barrier("answers written")

    def _line(self, question: Question, answer: str) -> str:
        row: dict[str, Any] = {
            "question_id": question.id,
            "image": question.images[0] if len(question.images) == 1 else list(question.images),
            "prompt": _asked(question),
            "text": answer,
            "model_id": self.model_id,
            "metadata": {},
        }
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _part(self, rank: int):  # noqa: ANN202
        self.output.parent.mkdir(parents=True, exist_ok=True)
        path = self.output.with_name(f"{self.output.name}.{rank}{PART}")
        part = path.open("a", encoding="utf-8", errors="replace")
        if part.tell():
            part.write("\n")  # what was cut off ends here
        return part

    def _parts(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.*{PART}"))

    def _written(self, questions: dict[str, Question]) -> dict[str, str]:
        """Answers of an earlier run to the same questions by the same model."""
        answers: dict[str, str] = {}
        for path in [self.output, *self._parts()]:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line or "{}")
                except ValueError as error:
                    if path == self.output:
                        raise RecipeError(f"{path} line {number} is no JSON. Name another --output.") from error
                    continue  # the last line before a kill
                if row:
                    self._demand_same(questions, row, path)
                    answers[row["question_id"]] = row["text"]
        return answers

    def _demand_same(self, questions: dict[str, Question], row: dict[str, Any], path: Path) -> None:
        if not isinstance(row, dict) or not {"question_id", "prompt", "text", "model_id"} <= row.keys():
            raise RecipeError(f"{path} exists and does not hold answers of this command. Name another --output.")
        question = questions.get(row["question_id"])
        if question is None or row["prompt"] != _asked(question):
            raise RecipeError(
                f"{path} holds an answer to question {row['question_id']}, which the input does not ask in these words. "
                "Name another --output."
            )
        if row["model_id"] != self.model_id:
            raise RecipeError(f"{path} holds answers of {row['model_id']}, not of {self.model_id}. Name another --output.")

    def _finish(self, questions: dict[str, Question], answers: dict[str, str]) -> None:
        unfinished = self.output.with_name(f"{self.output.name}.unfinished")
        lines = (self._line(question, answers[question.id]) for question in questions.values())
        unfinished.write_text("".join(lines), encoding="utf-8", errors="replace")
        os.replace(unfinished, self.output)
        for part in self._parts():
            part.unlink()
        print(f"{self.output}: {len(questions)} answers")


def _asked(question: Question) -> str:
    return question.prompt.replace(f"{IMAGE_PLACEHOLDER}\n", "", 1)
