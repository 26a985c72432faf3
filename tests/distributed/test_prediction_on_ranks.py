"""A file of questions answered by two processes: one file, as one process writes it, and continued from what each had written."""

import json
from pathlib import Path

import numpy as np
import pytest
from lightning import Callback
from PIL import Image
from test_questions_on_ranks import BATCH, Questioned, options
from tiny import TOWER_FROZEN, Numbers, tiny_batch, tiny_model, tiny_trainer
from torch.utils.data import DataLoader

from callbacks.prediction import Prediction
from components.benchmarks import QuestionFile
from components.errors import RecipeError


class Predicting(Questioned):
    def predict_dataloader(self):
        return DataLoader([tiny_batch()], batch_size=None)


class WithNumbers(Callback):
    """Answers as the numbers of their tokens: those of an untrained model are no text."""

    def on_predict_start(self, trainer, pl_module):
        pl_module.tokenizer = Numbers()


def predicted(strategy, folder, name):
    """What goes wrong, if anything, when this rank answers the folder's questions."""
    prediction = Prediction(QuestionFile(f"{folder}/questions.jsonl", folder), Path(folder, name), "tiny", BATCH, max_new_tokens=6)
    trainer = tiny_trainer(callbacks=[WithNumbers(), prediction], **options(strategy))
    try:
        trainer.predict(tiny_model(TOWER_FROZEN), datamodule=Predicting(), return_predictions=False)
    except RecipeError as error:
        return str(error)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    rows = [{"question_id": number, "image": f"{number % 3}.png", "text": "what " * (1 + number % 4)} for number in range(7)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_two_processes_write_the_file_of_one(pair, folder):
    assert predicted("one process", str(folder), "one.jsonl") is None
    whole = (folder / "one.jsonl").read_text()
    assert pair.run(predicted, "fsdp", str(folder), "two.jsonl") == [None, None]
    assert (folder / "two.jsonl").read_text() == whole

    # killed after each rank had written an answer, and one of them in the middle of a line
    lines = [json.dumps(json.loads(line) | {"text": f"before {n}"}) + "\n" for n, line in enumerate(whole.splitlines())]
    (folder / "two.jsonl").unlink()
    (folder / "two.jsonl.0.part").write_text(lines[6])
    (folder / "two.jsonl.1.part").write_text(lines[2] + lines[4][:20])
    assert pair.run(predicted, "fsdp", str(folder), "two.jsonl") == [None, None]
    expected = [lines[n] if n in (2, 6) else line for n, line in enumerate(whole.splitlines(keepends=True))]
    assert (folder / "two.jsonl").read_text() == "".join(expected)
    assert not list(folder.glob("*.part"))


def test_what_one_rank_finds_ends_both(pair, folder):
    (folder / "1.png").unlink()
    for message in pair.run(predicted, "fsdp", str(folder), "two.jsonl"):
        assert "picture 1.png is not in" in message
    Image.new("RGB", (16, 16)).save(folder / "1.png")
    (folder / "two.jsonl").write_text("mine\n")
    for message in pair.run(predicted, "fsdp", str(folder), "two.jsonl"):
        assert "two.jsonl line 1 is no JSON. Name another --output." in message
    assert (folder / "two.jsonl").read_text() == "mine\n"
