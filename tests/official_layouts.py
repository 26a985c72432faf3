"""Drawn scenes in the file layouts of GQA, MME, VizWiz and POPE: what their loaders read is what they read at home."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from components.shapes_world import COLORS, SHAPES, Scene, Setting, draw_scene

SETTING = Setting(grid=2, min_objects=1, max_objects=3, image_size=32)
MME_SUBTASKS = {
    **dict.fromkeys(("artwork", "celebrity", "landmark", "posters", "scene"), True),
    **dict.fromkeys(("existence", "count", "position", "color", "OCR"), False),
    **dict.fromkeys(("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"), False),
}
"""Whether pictures and questions lie in folders of their own."""


def scene(number: int, setting: Setting = SETTING) -> tuple[Scene, np.random.Generator]:
    random = np.random.Generator(np.random.PCG64([77, number]))
    return draw_scene(setting, random, held_out_pairs=True), random


def save(drawn: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(drawn.picture())).save(path, quality=95, subsampling=0)


def yes_and_no(drawn: Scene, random: np.random.Generator) -> tuple[str, str]:
    """A question to answer with yes, and one like it to answer with no."""
    by_color = ("color", list(COLORS), "is there a {} object")
    kind, names, pattern = by_color if random.random() < 0.5 else ("shape", SHAPES, "is there a {}")
    there = {getattr(thing, kind) for thing in drawn.things}
    present, absent = (random.choice([name for name in names if (name in there) is wanted]) for wanted in (True, False))
    return pattern.format(present), pattern.format(absent)


def write_gqa(folder: Path, scenes: int = 30, setting: Setting = SETTING) -> Path:
    entries = {}
    for number in range(scenes):
        drawn, random = scene(number, setting)
        save(drawn, folder / "images" / f"n{number}.jpg")
        for question in drawn.one_of_each_kind(random):
            if question.kind == "relation":
                continue
            structural = "verify" if question.kind == "existence" else "query"
            entries[f"{number}{len(entries):05}"] = {
                "question": question.text,
                "imageId": f"n{number}",
                "answer": question.answer,
                "isBalanced": True,
                "entailed": [],
                "groups": {"global": question.kind, "local": "any"},
                "types": {"structural": structural, "semantic": "attr", "detailed": question.kind},
                "semantic": [{"operation": "select", "dependencies": [], "argument": question.kind}],
            }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(entries))
    return folder


def write_mme(folder: Path, scenes: int = 4, setting: Setting = SETTING) -> Path:
    root = folder / "MME_Benchmark_release_version"
    for place, (subtask, folders) in enumerate(MME_SUBTASKS.items()):
        for number in range(scenes):
            drawn, random = scene(1000 * (place + 1) + number, setting)
            stem = f"{number:04}"
            picture = root / subtask / ("images" if folders else "") / f"{stem}.{'jpg' if folders else 'png'}"
            save(drawn, picture)
            text = root / subtask / ("questions_answers_YN" if folders else "") / f"{stem}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            asked = zip(yes_and_no(drawn, random), ("Yes", "No"), strict=True)
            text.write_text("".join(f"{question} Please answer yes or no.\t{answer}\n" for question, answer in asked))
    return folder


def write_vizwiz(folder: Path, scenes: int = 30, setting: Setting = SETTING, split: str = "val") -> Path:
    entries = []
    types = {"count": "number", "existence": "yes/no"}
    for number in range(scenes):
        drawn, random = scene(5000 + number, setting)
        name = f"VizWiz_{split}_{number:08}.jpg"
        save(drawn, folder / split / name)
        asked = drawn.one_of_each_kind(random)
        question = asked[number % (len(asked) - (asked[-1].kind == "relation"))]
        answers = [question.answer] * 8 + ["unanswerable"] * 2
        entry = {"image": name, "question": question.text}
        if split != "test":
            entry |= {
                "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
                "answer_type": types.get(question.kind, "other"),
                "answerable": 1,
            }
        entries.append(entry)
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{split}.json").write_text(json.dumps(entries))
    return folder


def write_pope(folder: Path, scenes: int = 6, setting: Setting = SETTING) -> Path:
    for place, split in enumerate(("random", "popular", "adversarial")):
        rows = []
        for number in range(scenes):
            drawn, random = scene(9000 + number, setting)
            name = f"COCO_val2014_{number:012}.jpg"
            save(drawn, folder / "val2014" / name)
            for question, label in zip(yes_and_no(drawn, random), ("yes", "no"), strict=True):
                rows.append({"question_id": len(rows) + 1, "image": name, "text": question, "label": label})
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows[place:] + rows[:place]))
    return folder
