"""VizWiz-VQA: questions of blind people about their own photographs, each answered by ten of a crowd or marked unanswerable.

Source: Gurari et al. (arXiv 1802.08218). Scores: the current VizWiz API (Qing Li), copied in
github.com/AttentionX/InstructBLIP_PEFT, commit 8b0d453, lavis/common/vqa_tools/vqa_eval_vizwiz.py; prompt and upload: LLaVA-1.5,
github.com/haotian-liu/LLaVA, commit c121f04, docs/Evaluation.md and scripts/convert_vizwiz_for_submission.py.

Differs: The API takes the probability that a question can be answered; here it is 0 where the answer is `unanswerable` and 1
elsewhere, as in github.com/TRI-ML/vlm-evaluation. An older API, still in use, leaves nobody out where it should leave one person
out, and scores higher.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from components.benchmarks.benchmark import Benchmark, Question, demand_place, unit
from components.benchmarks.files import demand_folder, demand_pictures, read_json, read_picture
from components.benchmarks.normalization import NORMALIZERS, Normalizer, evalai
from components.benchmarks.tally import Tally, Totals, ratio, tally
from components.errors import RecipeError

PROMPT = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
_UNANSWERABLE = "unanswerable"
_SITE = "vizwiz.org/tasks-and-datasets/vqa"
_ANNOTATIONS = ("", "Annotations", "annotations")
_ASKED = {"image": str, "question": str}
_ANSWERED = {"answers": list, "answer_type": str, "answerable": int}


class VizWiz(Benchmark):
    """The distributed annotations and pictures in, one question for each picture out; scored by agreement with the crowd.

    `accuracy`, from 0 to 1, is the mean over the crowd of min(1, others who gave this answer / 3). `answerability_ap` and
    `answerability_f1` are average precision and F1 of finding the questions that cannot be answered. The types of answer are the
    groups.

    Args:
        folder: Folder with `train.json`, `val.json` or `test.json`, directly or in `Annotations/`, and with the pictures, directly
            or in a folder of the split's name.
        split: Which part is asked. The answers of `test` are not public: there is no score, but a file for the server.
        prompt: What is asked, with `{question}` where the question goes. The sentence about insufficient information is worth many
            points.
        capitalize: Whether the first letter of a question, and no other, is made a capital, as LLaVA-1.5 does.
        normalizer: Which differences of the model's answer do not count: `vizwiz` as in the official score, `vqa_v2`, `evalai`,
            `gqa`, `short` or `none`. The crowd's answers are taken as they are. The file for the server is always made by `evalai`.

    Raises:
        RecipeError: The prompt has no place for the question, files or pictures are missing, or an entry is malformed or repeated.
    """

    def __init__(
        self,
        folder: str,
        split: Literal["train", "val", "test"] = "val",
        prompt: str = PROMPT,
        capitalize: bool = True,
        normalizer: Normalizer = "vizwiz",
    ) -> None:
        demand_place(prompt)
        self.folder = folder
        self.split = split
        self.prompt = prompt
        self.capitalize = capitalize
        self.normalizer = normalizer
        self.headline = "" if split == "test" else "accuracy"
        self._questions: list[Question] = []

    # --- questions

    def setup(self, pictures: bool = True) -> None:
        """Read the split's questions and find its pictures."""
        demand_folder(
            Path(self.folder), f"Unpack Annotations.zip and {self.split}.zip of {_SITE} there, or correct the key folder."
        )
        path = self._annotations()
        entries = read_json(path, f"It is in Annotations.zip of {_SITE}.")
        if not isinstance(entries, list) or not entries:
            raise RecipeError(f"{path} is no list of questions. Unpack Annotations.zip of {_SITE} again.")
        places: dict[str, int] = {}
        self._questions = []
        for number, entry in enumerate(entries, start=1):
            question = self._question(entry, f"{path}, entry {number}")
            if (first := places.setdefault(question.id, number)) != number:
                raise RecipeError(f"{path}, entry {number}: {question.id} stands already in entry {first}. Keep one of them.")
            self._questions.append(question)
        self._pictures = self._picture_folder(self._questions[0].id)
        if pictures:
            remedy = f"Unpack {self.split}.zip of {_SITE} so that they lie in {Path(self.folder, self.split)} or in {self.folder}."
            demand_pictures(self._pictures, places, remedy)

    def questions(self) -> list[Question]:
        """One for each picture, in the order of the file; the name of the picture is the id."""
        return self._questions

    def read_image(self, name: str) -> bytes:
        """The picture of that name."""
        return read_picture(self._pictures / name)

    def describe(self) -> str:
        """The split and its folder."""
        return f"VizWiz-VQA {self.split} in {self.folder}"

    def question_id(self, row: Mapping[str, Any]) -> str:
        """The name of the picture; LLaVA's `question_id` is the number in that name.

        Raises:
            RecipeError: The row has neither.
        """
        for key in ("id", "image"):
            if key in row:
                return str(row[key])
        number = str(row.get("question_id"))
        if not number.isdecimal():
            raise RecipeError(f"{dict(row)} names no VizWiz question: give it id, image or LLaVA's question_id, a number.")
        return f"VizWiz_{self.split}_{int(number):08d}.jpg"

    # --- scoring

    def normalize(self, answer: str) -> str:
        """As the recipe's `normalizer` does."""
        return NORMALIZERS[self.normalizer](answer)

    def worth(self, question: Question) -> Mapping[str, float]:
        """The crowd's answers as they stand, each with the mean over the crowd of min(1, others who gave it / 3)."""
        answers = question.facts.get("answers", [])
        size = len(answers)
        return {
            answer: (count * min(1.0, (count - 1) / 3) + (size - count) * min(1.0, count / 3)) / size
            for answer, count in Counter(answers).items()
        }

    def tally(self, asked: Sequence[Question], answers: Mapping[str, str]) -> Tally:
        """Questions and credit, over all and for each type of answer, and what is unanswerable, called so, and both."""
        return tally(("", unit(question), self._counts(question, answers[question.id])) for question in asked)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """Accuracy, over all and for each type of answer, and answerability."""
        if "credit" not in totals:
            return {}
        unanswerable, called, found = (totals[name] for name in ("unanswerable", "called unanswerable", "found unanswerable"))
        recall = ratio(found, unanswerable, empty=0.0)
        return super().metrics(totals) | {
            # with two scores the curve has two points: the questions called unanswerable, and all of them
            "answerability_ap": recall * ratio(found, called, empty=0.0) + (1 - recall) * ratio(unanswerable, totals["questions"]),
            "answerability_f1": ratio(2 * found, unanswerable + called, empty=0.0),
        }

    def not_available(self, asked: Sequence[Question] | None = None) -> dict[str, str]:
        """Every metric of `test`."""
        reason = "the crowd's answers to split test are not public; score split val."
        return dict.fromkeys(("accuracy", "answerability_ap", "answerability_f1"), reason) if self.split == "test" else {}

    def upload(self, answers: Mapping[str, str]) -> list[dict[str, str]] | None:
        """The answers to `test` in the order of its file, as LLaVA-1.5 sends them; None for other splits or parts of it."""
        names = [question.id for question in self._questions]
        if self.split != "test" or answers.keys() != set(names):
            return None
        return [{"image": name, "answer": evalai(answers[name])} for name in names]

    def _counts(self, question: Question, answer: str) -> dict[str, float]:
        if self.split == "test":
            return {"questions": 1.0}
        credit = self.credit(question, answer)
        unanswerable, called = not question.facts["answerable"], self.normalize(answer) == _UNANSWERABLE
        return {
            "questions": 1.0,
            "credit": credit,
            f"questions/{question.group}": 1.0,
            f"credit/{question.group}": credit,
            "unanswerable": float(unanswerable),
            "called unanswerable": float(called),
            "found unanswerable": float(unanswerable and called),
        }

    # --- files

    def _annotations(self) -> Path:
        paths = [Path(self.folder, part, f"{self.split}.json") for part in _ANNOTATIONS]
        if found := next((path for path in paths if path.is_file()), None):
            return found
        others = sorted({str(path) for part in _ANNOTATIONS for path in Path(self.folder, part).glob("*.json")})
        raise RecipeError(
            f"{self.folder} has no {self.split}.json, neither directly nor in Annotations/; it has "
            f"{', '.join(others) or 'no JSON'}. Unpack Annotations.zip of {_SITE} there, or correct split."
        )

    def _picture_folder(self, first: str) -> Path:
        places = [Path(self.folder, self.split), Path(self.folder)]
        return next((place for place in places if (place / first).is_file()), places[0] if places[0].is_dir() else places[1])

    def _question(self, entry: Any, where: str) -> Question:
        form = _ASKED if self.split == "test" else _ASKED | _ANSWERED
        if wrong := [key for key, kind in form.items() if not isinstance(entry, dict) or not isinstance(entry.get(key), kind)]:
            raise RecipeError(f"{where}: {', '.join(wrong)} missing or of another type. Unpack Annotations.zip of {_SITE} again.")
        image, asked = entry["image"], entry["question"].capitalize() if self.capitalize else entry["question"]
        prompt = self.filled(asked)
        if self.split == "test":
            return Question(image, prompt, (image,))
        texts = [answer.get("answer") if isinstance(answer, dict) else None for answer in entry["answers"]]
        answers = [text for text in texts if isinstance(text, str)]
        if not answers or len(answers) < len(texts) or entry["answerable"] not in (0, 1):
            raise RecipeError(
                f'{where}: answers must be one or more {{"answer": TEXT}} and answerable 0 or 1; they are '
                f"{str(entry['answers'])[:80]} and {entry['answerable']}. Unpack Annotations.zip of {_SITE} again."
            )
        facts = {"answers": answers, "answer_type": entry["answer_type"], "answerable": entry["answerable"]}
        return Question(image, prompt, (image,), Counter(answers).most_common(1)[0][0], entry["answer_type"], facts)
