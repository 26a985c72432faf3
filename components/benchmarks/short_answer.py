"""ShortAnswer: a benchmark from one annotation file and a folder of pictures.

Source: the question files of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, docs/Evaluation.md) with the answer added,
and its conversation files (docs/Finetune_Custom_Data.md).
"""

from pathlib import Path
from typing import Any

from components.annotations import Annotations
from components.benchmarks.benchmark import Benchmark, Question
from components.conversation import IMAGE_PLACEHOLDER, parse_llava
from components.errors import BadSample, RecipeError


class ShortAnswer(Benchmark):
    """Annotations and pictures in, questions with short answers out; scored by exact match.

    Args:
        annotations: JSON or JSONL file: records with `image`, `text` and `answer` (optional `question_id`, `category`), or LLaVA
            conversations of one question and one answer (`conversations`; optional `id`, `image`, `group`).
        images: Folder that picture names are relative to.

    Raises:
        RecipeError: File, folder or pictures are missing, a record has another form, or an id occurs twice.
    """

    def __init__(self, annotations: str, images: str) -> None:
        self.annotations = annotations
        self.images = images

    def setup(self) -> None:
        """Read every question and look for every picture."""
        records = Annotations(self.annotations)
        if not Path(self.images).is_dir():
            raise RecipeError(
                f"The image folder {self.images} of {self.annotations} does not exist (key images). "
                "Give the folder that the picture names in the annotations are relative to."
            )
        places: dict[str, int] = {}
        self._questions = []
        for index, record in enumerate(records):
            try:
                question = _question(record, index + 1)
            except BadSample as error:
                raise RecipeError(f"{records.where(index)}: {error}") from error
            if question.id in places:
                raise RecipeError(
                    f"{records.where(index)}: id {question.id} stands already in {records.where(places[question.id])}. "
                    "Give every question an id of its own."
                )
            places[question.id] = index
            self._questions.append(question)
        self._look_for_pictures(records)

    def questions(self) -> list[Question]:
        """One for each record of the file, in its order."""
        return self._questions

    def read_image(self, name: str) -> bytes:
        """The file of that name in the image folder."""
        path = Path(self.images, name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise RecipeError(f"The picture {path} cannot be read ({error.strerror}). Restore it.") from error

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def _look_for_pictures(self, records: Annotations) -> None:
        first: dict[str, int] = {}
        for index, question in enumerate(self._questions):
            for name in question.images:
                first.setdefault(name, index)
        if missing := [name for name in first if not Path(self.images, name).is_file()]:
            raise RecipeError(
                f"{records.where(first[missing[0]])}: picture {missing[0]} is not in {self.images} (key images), and with it "
                f"{len(missing)} of {len(first)} pictures are missing. Download them, or correct the folder."
            )


def _question(record: dict[str, Any], number: int) -> Question:
    if "conversations" in record:
        turns, images = parse_llava(record)
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise BadSample(f"a benchmark needs one question and one answer, but the conversation has {len(turns)} turns.")
        name, group, prompt, reference = "id", "group", turns[0].text, turns[1].text
    else:
        if missing := [key for key in ("image", "text", "answer") if not isinstance(record.get(key), str)]:
            raise BadSample(
                f"{', '.join(missing)} missing or not a text. A record needs image, text and answer, or LLaVA's `conversations`."
            )
        name, group, images = "question_id", "category", [record["image"]]
        prompt, reference = f"{IMAGE_PLACEHOLDER}\n{record['text']}", record["answer"]
    if not isinstance(record.get(group, ""), str):
        raise BadSample(f"`{group}` must be a text; it is {str(record[group])[:80]}.")
    if prompt.count(IMAGE_PLACEHOLDER) != len(images):
        raise BadSample(f"{prompt.count(IMAGE_PLACEHOLDER)} <image> placeholder(s) but {len(images)} image(s). Make them equal.")
    return Question(str(record.get(name, f"record {number}")), prompt, tuple(images), reference, record.get(group, ""))
