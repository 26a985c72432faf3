"""QuestionFile: questions without known answers from one file and a folder of pictures.

Source: the question files of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, docs/Evaluation.md).
"""

from dataclasses import replace
from typing import Any

from components.benchmarks.benchmark import Question
from components.benchmarks.short_answer import ShortAnswer
from components.benchmarks.tally import Totals


class QuestionFile(ShortAnswer):
    """Questions and pictures in, prompts out; there is nothing to score.

    Args:
        annotations: JSON or JSONL file: records with `text` and `image` (optional `question_id`, `category`). Several questions may
            share an id, as LLaVA's about MME do, if their texts differ.
        images: Folder that picture names are relative to.
        prompt: What is asked, with `{question}` where the text of a record goes.
    """

    headline = ""
    required = ("text", "image")

    def __init__(self, annotations: str, images: str, prompt: str = "{question}") -> None:
        super().__init__(annotations, images, prompt)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """None."""
        return {}

    def _question(self, record: dict[str, Any], number: int) -> Question:
        question = super()._question(record, number)
        facts = {"question_id": record.get("question_id", question.id)}
        return replace(question, id=f"{question.id} ({record.get('text', question.prompt)})", facts=facts)
