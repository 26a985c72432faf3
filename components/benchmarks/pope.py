"""POPE: whether models see objects that are not there, from yes/no questions about pictures of COCO.

Source: Li et al., Evaluating Object Hallucination in Large Vision-Language Models (arXiv 2305.10355), section 5; evaluate.py of
RUCAIBox/POPE (commit e3e3926); prompts and answer files of LLaVA-1.5 (haotian-liu/LLaVA, llava/eval/eval_pope.py).
Differs: labels are found by question id, not by position; precision, recall and F1 are 0 where the official script divides by 0.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from components.annotations import Annotations
from components.benchmarks.benchmark import Benchmark, Question, demand_place, unit
from components.benchmarks.files import demand_folder, demand_pictures, read_picture
from components.benchmarks.tally import Tally, Totals, ratio, tally
from components.errors import RecipeError

Split = Literal["random", "popular", "adversarial"]

_PROMPT = "{question}\nAnswer the question using a single word or phrase."
_MERGED = ("adversarial", "random", "popular")  # LLaVA asks all splits in one file: ids from 1, from 10000001, from 20000001
_MERGED_STEP = 10_000_000
_LLAVA_COUNTS = {"random": 2910, "popular": 3000, "adversarial": 3000}  # later releases have 3,000 and other questions in random
_METRICS = ("f1", "accuracy", "precision", "recall", "yes_ratio")
_GET = (
    "Get the label files coco_pope_<split>.json from output/coco of github.com/RUCAIBox/POPE, all at commit e3e3926 (key folder), "
    "and the pictures of COCO val2014 from cocodataset.org (key images)."
)


class POPE(Benchmark):
    """Label files and COCO pictures in, yes/no questions about objects out; scored by F1, the mean over the splits.

    An answer is no if `No`, `no` or `not` is a word of its first sentence, and yes otherwise. Yes is the positive answer.

    Args:
        folder: Folder of the label files `coco_pope_<split>.json`.
        images: Folder of the pictures of COCO val2014.
        prompt: What is asked, with `{question}` where the question goes.
        splits: How the objects that are not there are chosen: `random`, `popular` or `adversarial`; one or more of them.

    Raises:
        RecipeError: A file, a folder or pictures are missing, a record has another form, or an id occurs twice.
    """

    headline = "f1"
    by_group = "f1"

    def __init__(
        self, folder: str, images: str, prompt: str = _PROMPT, splits: Sequence[Split] = ("random", "popular", "adversarial")
    ) -> None:
        demand_place(prompt)
        if not splits or len(set(splits)) < len(splits) or not set(splits) <= set(_MERGED):
            raise RecipeError(f"POPE: splits = {list(splits)} must be one or more of random, popular and adversarial, each once.")
        self.folder = folder
        self.images = images
        self.prompt = prompt
        self.splits = list(splits)
        self.split = ", ".join(splits)
        self._release = ""

    def setup(self, pictures: bool = True) -> None:
        """Read every question and look for every picture."""
        demand_folder(Path(self.folder), _GET)
        self._by_id = {question.id: question for split in self.splits for question in self._read(split)}
        counts = Counter(question.group for question in self._by_id.values())
        if other := [f"{split} has {counts[split]:,} questions" for split in self.splits if counts[split] != _LLAVA_COUNTS[split]]:
            self._release = f"; not the release that LLaVA-1.5 uses: {', '.join(other)}"
        if pictures:
            demand_folder(Path(self.images), _GET)
            demand_pictures(Path(self.images), (name for question in self.questions() for name in question.images), _GET)

    def questions(self) -> list[Question]:
        """One for each record, split by split."""
        return list(self._by_id.values())

    def read_image(self, name: str) -> bytes:
        """The file of that name in the image folder."""
        return read_picture(Path(self.images, name))

    def describe(self) -> str:
        """Splits, folder and release."""
        return f"POPE ({self.split}) in {self.folder}{self._release}"

    def normalize(self, answer: str) -> str:
        """`no` or `yes`; only single spaces part words, so `no!` and `NO` are yes."""
        words = answer.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"

    def tally(self, asked: Sequence[Question], answers: Mapping[str, str]) -> Tally:
        """What each picture counts in every split: true and false, positive (yes) and negative answers."""
        entries = []
        for question in asked:
            truth, answer = question.reference, self.normalize(answers[question.id])
            counts = {"tp": ("yes", "yes"), "fp": ("no", "yes"), "tn": ("no", "no"), "fn": ("yes", "no")}
            hits = {f"{name}/{question.group}": float(case == (truth, answer)) for name, case in counts.items()}
            entries.append(("", unit(question), hits))
        return tally(entries)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """F1, accuracy, precision, recall and share of yes for each split, and their means over the splits."""
        splits = [name.removeprefix("tp/") for name in totals if name.startswith("tp/")]
        metrics: dict[str, Any] = {}
        for split in splits:
            tp, fp, tn, fn = (totals[f"{name}/{split}"] for name in ("tp", "fp", "tn", "fn"))
            count = tp + fp + tn + fn
            metrics[f"f1/{split}"] = ratio(2 * tp, 2 * tp + fp + fn, empty=0.0)
            metrics[f"accuracy/{split}"] = ratio(tp + tn, count)
            metrics[f"precision/{split}"] = ratio(tp, tp + fp, empty=0.0)
            metrics[f"recall/{split}"] = ratio(tp, tp + fn, empty=0.0)
            metrics[f"yes_ratio/{split}"] = ratio(tp + fp, count)
        return metrics | {name: sum(metrics[f"{name}/{split}"] for split in splits) / len(splits) for name in _METRICS}

    def remarks(self, metrics: Mapping[str, float]) -> list[str]:
        """Where the official script would divide by zero."""
        splits = [split for split in self.splits if metrics.get(f"yes_ratio/{split}") == 0]
        return [f"no answer to split {split} is yes: its precision and F1 are 0 by definition." for split in splits]

    def question_id(self, row: Mapping[str, Any]) -> str:
        """Our id `<split>/<number>`, or that of LLaVA's merged question file, whose text (`prompt`) must be ours."""
        if "id" in row:
            return str(row["id"])
        shown = str(dict(row))[:200]
        try:
            split, number = divmod(int(row["question_id"]), _MERGED_STEP)
            if split < 0:  # which would count from the end
                raise KeyError(split)
            question = self._by_id[f"{_MERGED[split]}/{number}"]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise RecipeError(
                f"{self.describe()} has no question for the row {shown}. A row gives our `id`, or the `question_id` of LLaVA's "
                "question file: adversarial from 1, random from 10000001, popular from 20000001."
            ) from error
        if question.facts["question"] not in str(row.get("prompt", question.prompt)):
            raise RecipeError(
                f"The row {shown} asks something else than question {question.id} of {self.describe()}, which is "
                f"{question.facts['question']!r}. Releases of POPE differ: answers and labels must be of the same one."
            )
        return question.id

    def _read(self, split: str) -> list[Question]:
        file = Path(self.folder, f"coco_pope_{split}.json")
        if not file.is_file():
            raise RecipeError(f"{file} does not exist. {_GET}")
        records = Annotations(file)
        questions: dict[str, Question] = {}
        for index, record in enumerate(records):
            number, image, text, label = (record.get(key) for key in ("question_id", "image", "text", "label"))
            if number is None or not isinstance(image, str) or not isinstance(text, str) or label not in ("yes", "no"):
                shown = str(record)[:200]
                raise RecipeError(f"{records.where(index)}: needs question_id, image, text and label (yes or no); it is {shown}.")
            name = f"{split}/{number}"
            if name in questions:
                raise RecipeError(f"{records.where(index)}: question_id {number} occurs twice. {_GET}")
            questions[name] = Question(name, self.filled(text), (image,), label, split, {"question": text})
        return list(questions.values())
