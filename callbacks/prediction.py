"""Prediction: a file of questions answered by a trained model, on any number of ranks, and continued where it was interrupted."""

import json
import os
import re
from pathlib import Path
from typing import Any, TextIO

from lightning import Callback, LightningModule, Trainer

from callbacks.validation.asking import ask, gather, raise_together
from components.benchmarks import Benchmark, Question
from components.errors import RecipeError

PART = ".part"


class Prediction(Callback):
    """Questions in, a JSONL file of answers in LLaVA's format out, in the order of the questions.

    Every rank writes down its answers as they come (`OUTPUT.RANK.part`), so that an interrupted run goes on with the questions that
    have none.

    Args:
        questions: The questions; `question_id` of their facts is what the answers are written under.
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
        """Open the questions, and make room for the answers, before the model is built."""
        problem: RecipeError | None = None
        try:
            self.questions.setup(pictures=trainer.is_global_zero)  # one rank looks for thousands of files
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self.output.is_dir():
                raise RecipeError(f"--output {self.output} is a folder. Name a file in it.")
        except RecipeError as error:
            problem = error
        except OSError as error:
            problem = RecipeError(f"--output {self.output}: its folder cannot be made ({error.strerror}). Name another.")
        raise_together(trainer, problem)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer what is not answered yet, then write all answers into one file."""
        questions = {question.id: question for question in self.questions.questions()}
        known: dict[str, str] = {}
        error: RecipeError | None = None
        try:
            known = self._written(questions) if trainer.is_global_zero else {}
            part = self._part(trainer.global_rank)
        except (RecipeError, OSError) as problem:
            error = RecipeError(str(problem))
        raise_together(trainer, error)
        answered = set(trainer.strategy.broadcast(list(known)))
        if answered and trainer.is_global_zero:
            print(f"{self.output}: {len(answered)} of {len(questions)} questions are answered already")
        left = [question for question in questions.values() if question.id not in answered]
        with part:

            def keep(answers: dict[str, str]) -> None:
                part.writelines(self._line(questions[name], answer) for name, answer in answers.items())
                part.flush()

            options: dict[str, Any] = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
            new = gather(trainer, ask(trainer, pl_module, self.questions, left, title="answers", keep=keep, **options))
        if trainer.is_global_zero:
            self._finish(questions, known | new)
        trainer.strategy.barrier("answers written")

    def _row(self, question: Question, answer: str) -> dict[str, Any]:
        return {
            "question_id": question.facts["question_id"],
            "image": question.images[0] if len(question.images) == 1 else list(question.images),
            "prompt": question.text,
            "text": answer,
            "model_id": self.model_id,
            "metadata": {"max_new_tokens": self.max_new_tokens},
        }

    def _line(self, question: Question, answer: str) -> str:
        return json.dumps(self._row(question, answer)) + "\n"

    def _part(self, rank: int) -> TextIO:
        part = self.output.with_name(f"{self.output.name}.{rank}{PART}").open("a", encoding="utf-8", errors="replace")
        if part.tell():
            part.write("\n")  # what was cut off ends here
        return part

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(self.output.name) + r"\.\d+" + re.escape(PART))
        return sorted(path for path in self.output.parent.iterdir() if name.fullmatch(path.name))

    def _written(self, questions: dict[str, Question]) -> dict[str, str]:
        """Answers of an earlier run to the same questions by the same model."""
        asked = {(str(q.facts["question_id"]), q.text): q for q in questions.values()}
        answers: dict[str, str] = {}
        for path in [*([self.output] if self.output.is_file() else []), *self._parts()]:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
                try:
                    row = json.loads(line or "{}")
                except ValueError as error:
                    if path == self.output:
                        raise RecipeError(f"{path} line {number} is no JSON. Name another --output.") from error
                    continue  # the last line before a kill
                if row:
                    question = self._question_of(asked, row, f"{path} line {number}")
                    answers[question.id] = row["text"]
        return answers

    def _question_of(self, asked: dict[tuple[str, str], Question], row: Any, where: str) -> Question:
        """The question that a row answers, which was asked of the same model in the same way."""
        if not isinstance(row, dict) or not {"question_id", "prompt"} <= row.keys() or not isinstance(row.get("text"), str):
            raise RecipeError(f"{where} is no answer of this command. Name another --output.")
        question = asked.get((str(row["question_id"]), row["prompt"]))
        if question is None:
            raise RecipeError(
                f"{where} answers question {row['question_id']}, which the input does not ask so. Name another --output."
            )
        now = self._row(question, row["text"])
        if changed := [f"{key} {row.get(key)!r} instead of {value!r}" for key, value in now.items() if row.get(key) != value]:
            raise RecipeError(f"{where} answers question {row['question_id']} with {', '.join(changed)}. Name another --output.")
        return question

    def _finish(self, questions: dict[str, Question], answers: dict[str, str]) -> None:
        unfinished = self.output.with_name(f"{self.output.name}.unfinished")
        lines = (self._line(question, answers[question.id]) for question in questions.values())
        unfinished.write_text("".join(lines), encoding="utf-8", errors="replace")
        os.replace(unfinished, self.output)
        for part in self._parts():
            part.unlink()
        print(f"{self.output}: {len(questions)} answers\nScore them: python main.py score --benchmark NAME --answers {self.output}")
