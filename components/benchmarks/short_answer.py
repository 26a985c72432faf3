"""ShortAnswer: a benchmark from one annotation file and a folder of pictures.

Source: the question files of LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, docs/Evaluation.md) with the answer added,
and its conversation files (docs/Finetune_Custom_Data.md).
"""

from pathlib import Path
from typing import Any

from components.annotations import Annotations
from components.benchmarks.benchmark import Benchmark, Question, demand_place
from components.benchmarks.files import demand_folder, missing_pictures, read_picture
from components.benchmarks.normalization import NORMALIZERS, Normalizer
from components.chat_template import IMAGE_PLACEHOLDER
from components.errors import BadSample, RecipeError
from components.turns import parse_llava


class ShortAnswer(Benchmark):
    """Annotations and pictures in, questions with short answers out; scored by exact match after both sides are normalised.

    Args:
        annotations: JSON or JSONL file: records with `image`, `text` and `answer` (optional `question_id`, `category`), or LLaVA
            conversations of one question and one answer (`conversations`; optional `id`, `image`, `group`).
        images: Folder that picture names are relative to.
        prompt: What is asked, with `{question}` where the text of a record goes. Conversations are asked as they are.
        normalizer: Which differences do not count: `short` (spaces around the answer, letter case, one period at its end),
            `vqa_v2`, `vizwiz`, `evalai`, `gqa` or `none`.

    Raises:
        RecipeError: File, folder or pictures are missing, a record has another form, or an id occurs twice.
    """

    required: tuple[str, ...] = ("image", "text", "answer")
    """Texts without which a record is no question."""

    def __init__(self, annotations: str, images: str, prompt: str = "{question}", normalizer: Normalizer = "short") -> None:
        demand_place(prompt)
        self.annotations = annotations
        self.images = images
        self.prompt = prompt
        self.normalizer = normalizer

    def setup(self, pictures: bool = True) -> None:
        """Read every question and look for every picture."""
        records = Annotations(self.annotations)
        if pictures:
            remedy = f"Give the folder that the picture names of {self.annotations} are relative to (key images)."
            demand_folder(Path(self.images), remedy)
        places: dict[str, int] = {}
        self._questions = []
        for index, record in enumerate(records):
            try:
                question = self._question(record, index + 1)
            except BadSample as error:
                raise RecipeError(f"{records.where(index)}: {error}") from error
            if question.id in places:
                raise RecipeError(
                    f"{records.where(index)}: id {question.id} stands already in {records.where(places[question.id])}. "
                    "Give every question an id of its own."
                )
            places[question.id] = index
            self._questions.append(question)
        if pictures:
            self._look_for_pictures(records)

    def questions(self) -> list[Question]:
        """One for each record of the file, in its order."""
        return self._questions

    def read_image(self, name: str) -> bytes:
        """The file of that name in the image folder."""
        return read_picture(Path(self.images, name))

    def describe(self) -> str:
        """File and folder."""
        return f"{self.annotations} with pictures in {self.images}"

    def normalize(self, answer: str) -> str:
        """As the recipe's `normalizer` does."""
        return NORMALIZERS[self.normalizer](answer)

    def _look_for_pictures(self, records: Annotations) -> None:
        first: dict[str, int] = {}
        for index, question in enumerate(self._questions):
            for name in question.images:
                first.setdefault(name, index)
        if missing := missing_pictures(Path(self.images), first):
            raise RecipeError(
                f"{records.where(first[missing[0]])}: picture {missing[0]} is not in {self.images} (key images), and with it "
                f"{len(missing)} of {len(first)} pictures are missing. Download them, or correct the folder."
            )

    def _question(self, record: dict[str, Any], number: int) -> Question:
        if "conversations" in record:
            if self.prompt != ShortAnswer.prompt:
                raise BadSample("conversations are asked as they are: `prompt` has no effect on them. Leave it out.")
            turns, images = parse_llava(record)
            if [turn.role for turn in turns] != ["user", "assistant"]:
                raise BadSample(f"a benchmark needs one question and one answer, but the conversation has {len(turns)} turns.")
            name, group, prompt, reference = "id", "group", turns[0].text, turns[1].text
        else:
            if missing := [key for key in self.required if not isinstance(record.get(key), str)]:
                raise BadSample(
                    f"{', '.join(missing)} missing or not a text. A record needs {', '.join(self.required)}, "
                    "or LLaVA's `conversations`."
                )
            name, group, images = "question_id", "category", [record["image"]]
            prompt = self.filled(record["text"])
            reference = record.get("answer", "")
        if not isinstance(record.get(group, ""), str):
            raise BadSample(f"`{group}` must be a text; it is {str(record[group])[:80]}.")
        if prompt.count(IMAGE_PLACEHOLDER) != len(images):
            found = prompt.count(IMAGE_PLACEHOLDER)
            raise BadSample(f"{found} <image> placeholder(s) but {len(images)} image(s). Make them equal.")
        return Question(str(record.get(name, f"record {number}")), prompt, tuple(images), reference, record.get(group, ""))
