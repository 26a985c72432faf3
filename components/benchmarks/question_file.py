"""QuestionFile: questions without known answers from one file and a folder of pictures.

Source: the question files of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, docs/Evaluation.md).
"""

from components.benchmarks.short_answer import ShortAnswer


class QuestionFile(ShortAnswer):
    """Questions and pictures in, prompts out; there is nothing to score.

    Args:
        annotations: JSON or JSONL file: records with `text` and `image` (optional `question_id`, `category`).
        images: Folder that picture names are relative to.
        prompt: What is asked, with `{question}` where the text of a record goes.
    """

    headline = ""
    prompts_repeat = False
    required = ("text", "image")

    def __init__(self, annotations: str, images: str, prompt: str = "{question}") -> None:
        super().__init__(annotations, images, prompt)
