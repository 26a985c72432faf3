"""MME: yes/no questions in pairs about pictures of 14 subtasks, scored by question and by picture.

Source: Fu et al., MME (arXiv 2306.13394), section 2; eval_tool/calculation.py of BradyFU/Awesome-Multimodal-Large-Language-Models
(branch Evaluation, commit dd29509); prompts and answer files of LLaVA-1.5 (haotian-liu/LLaVA, docs/Evaluation.md).
Differs: the two questions about a picture find each other by its name, not by standing in consecutive lines.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from components.benchmarks.benchmark import SEED, Benchmark, Question, demand_place, listed, unit
from components.benchmarks.files import demand_folder, read_picture
from components.benchmarks.tally import Tally, Totals, ratio, tally
from components.errors import RecipeError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION

_PROMPT = "{question}\nAnswer the question using a single word or phrase."
_INSTRUCTION = "Please answer yes or no."
_RELEASED = 2374
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_GET = (
    "Get MME_Benchmark_release_version from the Hugging Face dataset darkyarding/MME and unpack it: a folder for each of the 14 "
    "subtasks, with pictures and question files (.txt) side by side or in images/ and questions_answers_YN/ (key folder)."
)


class MME(Benchmark):
    """Folder of the MME release in, yes/no questions in pairs out; the score of a subtask is from 0 to 200.

    It is 100 times the share of right answers plus 100 times the share of pictures with both answers right. `perception` (0 to
    2000) adds up ten subtasks, `cognition` (0 to 800) four. An answer counts as yes or no by its first four characters.

    Args:
        folder: The release, or a folder that holds it at most two levels down. For scoring alone also a folder of result files:
            14 `<subtask>.txt` with lines of picture, question and Yes or No, separated by tabs.
        prompt: What is asked, with `{question}` where the question goes, without its "Please answer yes or no.".

    Raises:
        RecipeError: A subtask, a picture or an answer is missing, or a line has another form.
    """

    headline = "perception"
    by_group = "score"
    decimals = 2

    def __init__(self, folder: str, prompt: str = _PROMPT) -> None:
        demand_place(prompt)
        self.folder = folder
        self.prompt = prompt
        self._questions: list[Question] = []

    def setup(self, pictures: bool = True) -> None:
        """Read every question and look for every picture."""
        demand_folder(Path(self.folder), _GET)
        root = _root(Path(self.folder))
        flat = not any((root / subtask).is_dir() for subtask in SUBTASKS) and any((root / f"{s}.txt").is_file() for s in SUBTASKS)
        if flat and pictures:
            raise RecipeError(f"{root} holds result files without pictures: a model cannot be asked. {_GET}")
        _demand_subtasks(root, ".txt" if flat else "")
        self._pictures: dict[str, Path] = {}
        self._questions = []
        for subtask in SUBTASKS:
            pairs = _pairs_of_file(root / f"{subtask}.txt") if flat else self._pairs_of_folder(root / subtask, pictures)
            if not pairs:
                raise RecipeError(f"{root} holds no questions of {subtask}. {_GET}")
            for image, pair in sorted(pairs.items()):
                for number, (text, truth) in enumerate(pair, start=1):
                    name = f"{subtask}/{image}"
                    prompt = self.filled(_bare(text))
                    self._questions.append(Question(f"{name}#{number}", prompt, (name,), truth, subtask, {"question": text}))
        self._ids = {_key(q.images[0], _asked_by_llava(q.facts["question"])): q.id for q in self._questions}

    def questions(self) -> list[Question]:
        """Two for each picture, by subtask and name of the picture."""
        return self._questions

    def read_image(self, name: str) -> bytes:
        """The picture `<subtask>/<file>`."""
        return read_picture(self._pictures[name])

    def describe(self) -> str:
        """The folder, and whether it holds all of the release."""
        found = len(self._questions)
        return f"MME in {self.folder}" + (f"; {found:,} questions instead of {_RELEASED:,}" if found not in (0, _RELEASED) else "")

    def normalize(self, answer: str) -> str:
        """`yes`, `no` or `other`, from the first four characters: `snow` is no, `I say yes` is other."""
        start = answer.lower()[:4]
        return "yes" if "yes" in start else "no" if "no" in start else "other"

    def tally(self, asked: Sequence[Question], answers: Mapping[str, str]) -> Tally:
        """What each picture counts in its subtask.

        Raises:
            RecipeError: A question of a pair or a whole subtask was not asked.
        """
        pairs: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for question in asked:
            pairs[question.group, unit(question)].append(question)
        if halves := [image for (_, image), pair in pairs.items() if len(pair) != 2]:
            raise RecipeError(f"MME asks two questions about a picture; not both were asked about {listed(halves)}.")
        if missing := [subtask for subtask in SUBTASKS if subtask not in {subtask for subtask, _ in pairs}]:
            raise RecipeError(f"MME's score is of all 14 subtasks, but nothing was asked of {', '.join(missing)}.")
        entries = []
        for (subtask, image), pair in pairs.items():
            counts = _counts([(question.reference.lower(), self.normalize(answers[question.id])) for question in pair])
            entries.append((subtask, image, {f"{name}/{subtask}": float(count) for name, count in counts.items()}))
        return tally(entries)

    def metrics(self, totals: Totals) -> dict[str, Any]:
        """Scores, accuracies, precision and recall (of yes, without `other`) of the subtasks, and the two sums of scores."""
        metrics: dict[str, Any] = {}
        for subtask in SUBTASKS:
            questions, images, correct, both, tp, fp, fn = (
                totals[f"{name}/{subtask}"] for name in ("questions", "images", "correct", "both", "tp", "fp", "fn")
            )
            accuracy, accuracy_plus = ratio(correct, questions), ratio(both, images)
            metrics[f"score/{subtask}"] = 100 * accuracy + 100 * accuracy_plus
            metrics[f"accuracy/{subtask}"] = accuracy
            metrics[f"accuracy_plus/{subtask}"] = accuracy_plus
            metrics[f"precision/{subtask}"] = ratio(tp, tp + fp, empty=0.0)
            metrics[f"recall/{subtask}"] = ratio(tp, tp + fn, empty=0.0)
        metrics["perception"] = sum(metrics[f"score/{subtask}"] for subtask in PERCEPTION)
        metrics["cognition"] = sum(metrics[f"score/{subtask}"] for subtask in COGNITION)
        return metrics

    def draw(self, limit: int | None) -> list[Question]:
        """Both questions about at most `limit` / 2 pictures, dealt from the subtasks in turn.

        Raises:
            RecipeError: There is not a picture for each subtask.
        """
        questions = self.questions()
        if limit is None or limit >= len(questions):
            return questions
        if limit < 2 * len(SUBTASKS):
            raise RecipeError(f"MME: a limit of {limit} questions leaves subtasks out. Make it at least {2 * len(SUBTASKS)}.")
        images: dict[str, list[str]] = defaultdict(list)
        for question in questions[::2]:
            images[question.group].append(unit(question))
        random = np.random.default_rng(SEED)
        turns = [
            (turn, i, image) for i, names in enumerate(images.values()) for turn, image in enumerate(random.permutation(names))
        ]
        drawn = {image for _, _, image in sorted(turns)[: limit // 2]}
        return [question for question in questions if unit(question) in drawn]

    def question_id(self, row: Mapping[str, Any]) -> str:
        """Our `id`, or that of LLaVA's picture (`question_id`) and text (`prompt`, which is that of its question file)."""
        if "id" in row:
            return str(row["id"])
        found = self._ids.get(_key(str(row.get("question_id")), str(row.get("prompt"))))
        if found is None:
            raise RecipeError(
                f"{self.describe()} has no question for the row {str(dict(row))[:200]}. "
                "A row gives our `id`, or LLaVA's `question_id` and `prompt` with the text of its question file."
            )
        return found

    def read_results(self, folder: Path) -> dict[str, str]:
        """Answers by question id from a folder of result files, `<subtask>.txt` with picture, question, Yes or No, answer.

        Raises:
            RecipeError: A file is missing, a line has another form or answers no question, or a question is answered twice.
        """
        remedy = "Name the folder of the 14 result files, <subtask>.txt."
        _demand_subtasks(folder, ".txt", remedy)
        answers: dict[str, str] = {}
        for subtask in SUBTASKS:
            for where, (image, text, _, answer) in _rows(folder / f"{subtask}.txt", (4,), remedy):
                found = self._ids.get(_key(f"{subtask}/{image}", _asked_by_llava(text)))
                if found is None:
                    raise RecipeError(f"{where}: {self.describe()} has no question {text!r} about {subtask}/{image}.")
                if answers.setdefault(found, answer) != answer:
                    raise RecipeError(f"{where}: {found} is answered already, and differently. Keep one of the lines.")
        return answers

    def _pairs_of_folder(self, folder: Path, pictures: bool) -> dict[str, list[tuple[str, str]]]:
        beside, apart = folder / "images", folder / "questions_answers_YN"
        image_folder, text_folder = (beside if beside.is_dir() else folder), (apart if apart.is_dir() else folder)
        images = {path.stem: path for path in _visible(image_folder) if path.suffix.lower() in _SUFFIXES}
        pairs = {}
        for file in _visible(text_folder):
            if file.suffix != ".txt":
                continue
            if pictures and file.stem not in images:
                raise RecipeError(f"{image_folder} has no picture {file.stem}.jpg or .png, about which {file} asks. {_GET}")
            image = images.get(file.stem, image_folder / f"{file.stem}{'.png' if folder.name in COGNITION else '.jpg'}")
            self._pictures[f"{folder.name}/{image.name}"] = image
            pairs[image.name] = _pair(str(file), [(text, truth) for _, (text, truth) in _rows(file, (2,))])
        return pairs


def _root(folder: Path) -> Path:
    """Where the subtasks lie: the folder itself, or one of those at most two levels down."""
    below = [path for parent in (folder, *_folders(folder)) for path in _folders(parent)]
    return max([folder, *sorted(below)], key=lambda path: sum((path / subtask).is_dir() for subtask in SUBTASKS))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and path.name != "__MACOSX"]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _demand_subtasks(root: Path, suffix: str, remedy: str = _GET) -> None:
    missing = [f"{subtask}{suffix}" for subtask in SUBTASKS if not (root / f"{subtask}{suffix}").exists()]
    if missing:
        found = ", ".join(path.name for path in _visible(root) if path.is_dir() or path.suffix == ".txt")
        raise RecipeError(f"{root} lacks {', '.join(missing)}. It holds {found or 'no folders and no .txt files'}. {remedy}")


def _pairs_of_file(file: Path) -> dict[str, list[tuple[str, str]]]:
    lines: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, (image, text, truth, *_answer) in _rows(file, (3, 4)):
        lines[image].append((text, truth))
    return {image: _pair(f"{file}, {image}", rows) for image, rows in lines.items()}


def _rows(file: Path, widths: tuple[int, ...], remedy: str = _GET) -> Iterator[tuple[str, list[str]]]:
    """Place and cells of each line. Cells are not stripped: the spaces before an answer count."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. {remedy}") from error
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if line.strip() and len(cells) not in widths:
            wanted = " or ".join(str(width) for width in widths)
            raise RecipeError(f"{file} line {number} has {len(cells)} cells separated by tabs instead of {wanted}: {line[:80]!r}.")
        if line.strip():
            yield f"{file} line {number}", cells


def _pair(where: str, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The two questions about a picture with their answers, in the order of the file."""
    pair = [(text.strip(), truth.strip().capitalize()) for text, truth in rows]
    if sorted(truth for _, truth in pair) != ["No", "Yes"] or _bare(pair[0][0]) == _bare(pair[1][0]):
        raise RecipeError(f"{where}: needs two different questions, one with Yes and one with No, and has {pair}. {_GET}")
    return pair


def _bare(text: str) -> str:
    """A question without the release's instruction."""
    return text.strip().removesuffix(_INSTRUCTION).rstrip()


def _asked_by_llava(text: str) -> str:
    return _PROMPT.replace("{question}", _bare(text))


def _key(image: str, text: str) -> tuple[str, str]:
    """What names a question everywhere: LLaVA's picture names have `images/` inside, those of result files end with `.txt`."""
    return f"{image.split('/')[0]}/{PurePosixPath(image).stem}", text


def _counts(said: list[tuple[str, str]]) -> dict[str, int]:
    """Right and given answer to both questions about a picture in, what they count out."""
    correct = sum(truth == answer for truth, answer in said)
    return {
        "questions": len(said),
        "images": 1,
        "correct": correct,
        "both": int(correct == len(said)),
        "other": sum(answer == "other" for _, answer in said),
        "tp": said.count(("yes", "yes")),
        "fn": said.count(("yes", "no")),
        "tn": said.count(("no", "no")),
        "fp": said.count(("no", "yes")),
    }
