"""GQA: compositional questions about real pictures, scored by equality and by how consistent and plausible the answers are.

Source: Hudson and Manning, GQA (arXiv 1902.09506) and its eval.py, as copied in github.com/SHI-Labs/VCoder (commit 4e85ace,
playground/data/eval/gqa/data/eval); prompt and answers as LLaVA-1.5 has them (github.com/haotian-liu/LLaVA, commit 32cebc380,
scripts/convert_gqa_for_eval.py).
Differs: what the files do not allow is absent, where eval.py stops (consistency) or its copies print 0 (validity, plausibility).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from components.benchmarks.benchmark import Benchmark, Question, demand_place, sampled, unit
from components.benchmarks.files import demand_folder, demand_pictures, read_json, read_picture
from components.benchmarks.normalization import NORMALIZERS, Normalizer
from components.benchmarks.tally import Tally, Totals, ratio, tally
from components.errors import BadSample, RecipeError

_REMEDY = "Get questions1.2.zip and images.zip from cs.stanford.edu/people/dorarad/gqa and unpack both into the folder."
_NOT_STEPS = ("exist", "query: name", "choose name")  # anywhere in `operation: argument`, as eval.py looks for them
_COMMON = ("color", "material", "shape")  # the answers to "what do they have in common?", whatever the choices say
_CHOICES = {"validity": "valid", "plausibility": "plausible"}


class GQA(Benchmark):
    """GQA's files in, its balanced questions out; an answer is right if it equals GQA's.

    `accuracy` and its parts, from 0 to 1, are over balanced questions. Unbalanced ones are asked where a balanced one entails them
    and the split holds them: `consistency` is the accuracy on what right answers entail. `validity` and `plausibility` need the
    choices (`val_choices.json` for splits of val) in the folder or one folder below. `distribution` (chi-square / 100, from 0,
    lower is better) compares how often answers are given.

    Args:
        folder: Holds `SPLIT_questions.json`, or chunks `SPLIT_questions/SPLIT_questions_0.json` and so on, itself or one folder
            below (`questions1.2/`, `data/`).
        split: `testdev_balanced`, `val_balanced`, `val_all`, ...: any whose answers are public.
        prompt: What is asked, with `{question}` where the question goes.
        images: Folder of the pictures, `IMAGE_ID.jpg`; null for `images` in the folder or one folder below.
        normalizer: Which differences of the model's answer do not count: `gqa` as LLaVA-1.5 prepares answers for eval.py, `none` as
            eval.py takes them, `short`, `vqa_v2`, `vizwiz` or `evalai`. GQA's answers are taken as they are.

    Raises:
        RecipeError: File, folder or pictures are missing or malformed, or no question is balanced.
    """

    def __init__(
        self,
        folder: str,
        split: str = "testdev_balanced",
        prompt: str = "{question}\nAnswer the question using a single word or phrase.",
        images: str | None = None,
        normalizer: Normalizer = "gqa",
    ) -> None:
        demand_place(prompt)
        self.folder = folder
        self.split = split
        self.prompt = prompt
        self.images = images
        self.normalizer = normalizer
        self._unscored: set[str] = set()
        self._questions: list[Question] = []
        self._choices: dict[str, dict[str, list[str]]] = {}

    # --- the files

    def setup(self, pictures: bool = True) -> None:
        """Read the questions, the choices if there are any, and look for every picture."""
        demand_folder(Path(self.folder), _REMEDY)
        files = self._files()
        found = {name: self._question(path, name, entry) for path in files for name, entry in _by_id(path).items()}
        needed = {name for question in found.values() if question.facts["balanced"] for name in question.facts["entailed"]}
        self._questions = [question for question in found.values() if question.facts["balanced"] or question.id in needed]
        self._unscored = found.keys() - {question.id for question in self._questions}
        if not self._questions:
            raise RecipeError(f"{files[0]}: none of {len(found)} questions is balanced, so none is scored. Change split.")
        self._choices = self._read_choices()
        self._pictures = Path(self.images) if self.images is not None else self._find("images") or Path(self.folder, "images")
        if pictures:
            demand_folder(self._pictures, f"{_REMEDY} Pictures that lie elsewhere are named by the key images.")
            demand_pictures(self._pictures, (name for question in self._questions for name in question.images), _REMEDY)

    def questions(self) -> list[Question]:
        """The balanced questions and what they entail, in the order of the file."""
        return self._questions

    def unscored(self) -> set[str]:
        """Unbalanced questions that no balanced one entails: official files of predictions may answer them."""
        return self._unscored

    def draw(self, limit: int | None) -> list[Question]:
        """At most `limit`, of the balanced questions alone: the others count in consistency only, which needs all of them."""
        if limit is None or limit >= len(self._questions):
            return self._questions
        return sampled(_balanced(self._questions), limit)

    def read_image(self, name: str) -> bytes:
        """The picture of that file name."""
        return read_picture(self._pictures / name)

    def describe(self) -> str:
        """The split."""
        return f"GQA {self.split}"

    def _find(self, name: str) -> Path | None:
        places = [Path(self.folder, name), *sorted(Path(self.folder).glob(f"*/{name}"))]
        return next((place for place in places if place.exists()), None)

    def _files(self) -> list[Path]:
        stem = f"{self.split}_questions"
        if file := self._find(f"{stem}.json"):
            return [file]
        if chunks := self._find(stem):
            count = max(1, len(list(chunks.glob(f"{stem}_*.json"))))
            return [chunks / f"{stem}_{number}.json" for number in range(count)]  # a gap is told when the file is read
        names = {path.name.removesuffix(".json") for depth in ("", "*/") for path in Path(self.folder).glob(f"{depth}*_questions*")}
        splits = sorted(name.removesuffix("_questions") for name in names if name.endswith("_questions"))
        raise RecipeError(
            f"{self.folder} has neither {stem}.json nor a folder {stem}. Splits that are there (key split): "
            f"{', '.join(splits) or 'none'}. {_REMEDY}"
        )

    def _question(self, path: Path, name: str, entry: Any) -> Question:
        try:
            text = _need(entry, str, "question")
            steps = [f"{_need(step, str, 'operation')}: {_need(step, str, 'argument')}" for step in _need(entry, list, "semantic")]
            facts = {
                "balanced": _need(entry, bool, "isBalanced"),
                "semantic": _need(entry, str, "types", "semantic"),
                "detailed": _need(entry, str, "types", "detailed"),
                "words": len(text.split()),
                "steps": sum(not any(name in step for name in _NOT_STEPS) for step in steps),
                "global": _need(entry, str | None, "groups", "global"),
                "entailed": [str(other) for other in _need(entry, list, "entailed") if str(other) != name],
            }
            images = (f"{_need(entry, str, 'imageId')}.jpg",)
            return Question(
                name, self.filled(text), images, _need(entry, str, "answer"), _need(entry, str, "types", "structural"), facts
            )
        except BadSample as error:
            raise RecipeError(
                f"{path}, question {name}: {error} The file is no split with answers (key split), or is damaged. {_REMEDY}"
            ) from error

    def _read_choices(self) -> dict[str, dict[str, list[str]]]:
        path = self._find(self._choices_name())
        if path is None:
            return {}
        choices = _by_id(path)
        try:
            known = [question.id for question in _balanced(self._questions) if question.id in choices]
            return {name: {kind: _need(choices[name], list, kind) for kind in _CHOICES.values()} for name in known}
        except BadSample as error:
            raise RecipeError(
                f"{path}: {error} Fetch it again, or do without: validity and plausibility are then absent."
            ) from error

    def _choices_name(self) -> str:
        return f"{self.split.partition('_')[0]}_choices.json"

    # --- what answers are worth

    def normalize(self, answer: str) -> str:
        """As the recipe's `normalizer` does."""
        return NORMALIZERS[self.normalizer](answer)

    def worth(self, question: Question) -> Mapping[str, float]:
        """GQA's answer as it is written."""
        return {question.reference: 1.0}

    def tally(self, asked: Sequence[Question], answers: Mapping[str, str]) -> Tally:
        """For each picture: balanced questions and credit, over all and by kind; entailed, valid and plausible answers."""
        absent = self.not_available(asked)
        credits = {question.id: self.credit(question, answers[question.id]) for question in asked}
        entries = []
        for question in _balanced(asked):
            facts, credit = question.facts, credits[question.id]
            counts: dict[str, float] = {}
            for part in _parts(question):
                counts |= {f"questions{part}": 1.0, f"credit{part}": credit}
            if "consistency" not in absent:
                entailed = [credits[name] for name in facts["entailed"]]
                counts |= {"entailing": credit * bool(entailed), "entailed": credit * sum(entailed) / max(1, len(entailed))}
            for metric, kind in _CHOICES.items():
                if metric not in absent:
                    known = _COMMON if "Common" in facts["detailed"] else self._choices[question.id][kind]
                    counts[kind] = float(self.normalize(answers[question.id]) in known)
            entries.append(("", unit(question), counts))
        if not entries:
            raise RecipeError(f"{self.describe()}: none of the {len(asked)} questions is balanced, so there is no score.")
        return tally(entries)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """Accuracy over all, binary and open questions, consistency, validity, plausibility, and accuracy by kind."""
        parts = sorted(name.removeprefix("questions") for name in totals if name.startswith("questions"))
        accuracies = {part: ratio(totals[f"credit{part}"], totals[f"questions{part}"]) for part in parts}
        values = {"accuracy": accuracies.pop("")}
        values |= {name: accuracies.pop(f"_{name}") for name in ("binary", "open") if f"_{name}" in accuracies}
        if "entailing" in totals:
            values["consistency"] = ratio(totals["entailed"], totals["entailing"], empty=0.0)  # as eval.py has it
        values |= {metric: ratio(totals[kind], totals["questions"]) for metric, kind in _CHOICES.items() if kind in totals}
        return values | {f"accuracy{part}": value for part, value in accuracies.items()}

    def score(self, answers: Mapping[str, str], asked: Sequence[Question] | None = None) -> dict[str, float]:
        """Answers by question id in, metrics and the `count` of the questions out; `distribution` has no interval."""
        asked = self.questions() if asked is None else asked
        scores = super().score(answers, asked)
        if "distribution" in self.not_available(asked):
            return scores
        return scores | {"distribution": self._distribution(asked, answers)}

    def not_available(self, asked: Sequence[Question] | None = None) -> dict[str, str]:
        """Metrics that the questions (all, if none are given) and the files that were read do not allow, each with the reason."""
        asked = self._questions if asked is None else asked
        balanced = _balanced(asked)
        entailed = {name for question in balanced for name in question.facts["entailed"]}
        missing = entailed - {question.id for question in asked}
        reasons = {}
        if missing:
            reasons["consistency"] = (
                f"{len(missing)} of {len(entailed)} entailed questions are not asked, {min(missing)} among them, and it needs all: "
                "ask the whole of a split that holds them, such as val_all."
            )
        if balanced and not entailed:
            reasons["consistency"] = "no question that is asked entails another."
        if not self._choices or any(question.id not in self._choices for question in balanced):
            reasons |= dict.fromkeys(
                _CHOICES,
                f"it needs {self._choices_name()} in {self.folder} or one folder below, with every question that is asked; GQA has "
                "none for testdev, and answers that are scored without GQA's files have none.",
            )
        if balanced and all(question.facts["global"] is None for question in balanced):
            reasons["distribution"] = "no question that is asked has a global group."
        return reasons

    def _distribution(self, asked: Sequence[Question], answers: Mapping[str, str]) -> float:
        grouped = [question for question in _balanced(asked) if question.facts["global"] is not None]
        sizes = Counter(question.facts["global"] for question in grouped)
        expected = Counter((question.facts["global"], question.reference) for question in grouped)
        observed = Counter((question.facts["global"], self.normalize(answers[question.id])) for question in grouped)
        chi_squares = (sizes[key[0]] * (observed[key] - count) ** 2 / count for key, count in expected.items())
        return sum(chi_squares) / len(grouped) / 100


def _parts(question: Question) -> list[str]:
    kind = "open" if question.group == "query" else "binary"
    groups = [f"/structural.{question.group}", f"/semantic.{question.facts['semantic']}"]
    return ["", f"_{kind}", *groups, f"_by_steps/{question.facts['steps']}", f"_by_words/{question.facts['words']}"]


def _balanced(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if question.facts["balanced"]]


def _by_id(path: Path) -> dict[str, Any]:
    content = read_json(path, _REMEDY)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold entries by question id; it holds a JSON {type(content).__name__}. {_REMEDY}")
    return content


def _need(entry: Any, kind: type | UnionType, *keys: str) -> Any:
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise BadSample(f"`{'.'.join(keys)}` is missing.")
        entry = entry[key]
    if not isinstance(entry, kind):
        raise BadSample(f"`{'.'.join(keys)}` is {str(entry)[:80]!r}, of another type than GQA has.")
    return entry
