"""A model that reads the brightness of a picture is asked by the real Trainer; a dictionary makes it err where we want."""

import io
import json
import os
from collections import Counter

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.validation import Validation
from components.batch import SampleFormat
from components.benchmarks import Benchmark, Question
from components.data import Preparation
from components.errors import RecipeError
from components.tokenizer import WordTokenizer, load_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging interval", "ignore:.*across ranks is zero"
)

LEVELS = {"dark.png": 10, "dim.png": 60, "gray.png": 120, "pale.png": 180, "white.png": 250}


class Brightness(Benchmark):
    """Seven questions about five pictures; one picture may be broken."""

    broken = None

    def setup(self, pictures=True):
        self.opened = pictures

    def questions(self):
        asked = [
            Question(f"q{number}", "<image>\nhow bright", (name,), str(level), "dark" if level < 100 else "light")
            for number, (name, level) in enumerate(LEVELS.items())
        ]
        asked.append(Question("q5", "<image>\nhow very very bright is that", ("gray.png",), "120", "light"))
        asked.append(Question("q6", "how many pictures", (), "5", "dark"))
        return asked

    def read_image(self, name):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 12), (LEVELS[name],) * 3).save(buffer, "PNG")
        return buffer.getvalue()[:40] if name == self.broken else buffer.getvalue()

    def describe(self):
        return "brightness of squares"


class Model(LightningModule):
    """Says the brightness it sees, or what `says` holds for a question."""

    def __init__(self, says=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.frozen = torch.nn.Dropout()
        self.says = says or {}
        self.asked = []

    def training_step(self, batch, batch_idx):
        assert self.training
        self.draws = [*getattr(self, "draws", []), torch.rand(()).item()]
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_start(self):
        self.frozen.eval()

    def generate(self, documents, max_new_tokens, end_token_id):
        assert end_token_id == 2  # of the template and tokenizer below
        assert not any(module.training for module in self.modules())
        assert max_new_tokens == 16
        self.asked.append([document.sample_id for document in documents])
        seen = [str(document.pixels[0, 0, 0, 0]) if len(document.pixels) else "5" for document in documents]
        return [self.says.get(document.sample_id, level) for document, level in zip(documents, seen, strict=True)]


class Data(LightningDataModule):
    def __init__(self, held_out=0, num_workers=0):
        super().__init__()
        self.layout = SampleFormat(WordTokenizer([]), 2, 8, (0.5, 0.5, 0.5))
        self.tokenizer = load_tokenizer(self.layout.tokenizer)
        self.preparation = Preparation("brief", "upright", "pad", 100)
        self.held_out = held_out
        self.num_workers = num_workers

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 1), batch_size=1)

    def val_dataloader(self):
        return [torch.utils.data.DataLoader(torch.ones(2, 1))] * (self.held_out or 1)

    test_dataloader = val_dataloader


def trainer(folder, validation, **options):
    return Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, "run", version=""),
        callbacks=validation,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=isinstance(validation, list),
        **options,
    )


def fit(folder, validation, model=None, data=None, **options):
    model = model or Model()
    fitted = trainer(folder, validation, **options)
    fitted.fit(model, datamodule=data or Data())
    return model, fitted


def record(folder, name):
    return json.loads((folder / "run" / "validation" / f"{name}.json").read_text())


@pytest.mark.parametrize("workers", [0, 1])
def test_every_question_is_answered_once_at_the_end(tmp_path, workers):
    benchmark = Brightness()
    model, _ = fit(tmp_path, Validation({"squares": benchmark}, batch_size=3), data=Data(num_workers=workers))
    assert benchmark.opened
    assert [len(batch) for batch in model.asked] == [3, 3, 1]
    assert model.asked[0][0] == "q5"  # the longest prompt first
    assert Counter(name for batch in model.asked for name in batch) == {f"q{number}": 1 for number in range(7)}


def test_pictures_are_decoded_in_the_workers(tmp_path):
    class Traced(Brightness):
        def read_image(self, name):
            with (tmp_path / "readers").open("a") as file:
                file.write(f"{os.getpid()}\n")
            return super().read_image(name)

    fit(tmp_path, Validation({"squares": Traced()}, num_pictures=0), data=Data(num_workers=1))
    readers = set((tmp_path / "readers").read_text().split())
    assert len(readers) == 1 and str(os.getpid()) not in readers


def test_table_log_and_files(tmp_path, capsys):
    validation = Validation({"squares": Brightness()}, shuffled_pictures=True)
    _, fitted = fit(tmp_path, validation, Model({"q0": "eleven", "q1": "60."}))
    # without pictures: one right of the five with the same words, and both others; exchanged: q1, said without looking, and q6
    table = (
        "squares at step 4: brightness of squares\n"
        "       questions  accuracy   95% interval  text-only best  shuffled pictures\n"
        "dark           3     0.667  0.000 - 1.000           0.667              0.667\n"
        "light          4     1.000                          0.250              0.000\n"
        "all            7     0.857  0.500 - 1.000           0.429              0.286\n"
    )
    assert table in capsys.readouterr().out
    files = tmp_path / "run" / "validation"
    assert sorted(file.name for file in files.iterdir()) == [f"squares_step_4.{kind}" for kind in ("json", "jsonl", "txt")]
    assert (files / "squares_step_4.txt").read_text() == table
    metrics = {"accuracy": 6 / 7, "accuracy/dark": 2 / 3, "accuracy/light": 1.0, "count": 7.0}
    kept = record(tmp_path, "squares_step_4")
    assert kept["metrics"] == metrics
    assert kept["text_only_best"]["accuracy"] == 3 / 7
    assert kept["shuffled_pictures"]["accuracy"] == 2 / 7
    assert (kept["step"], kept["partial"], kept["headline"]) == (4, False, {"accuracy": 6 / 7})
    assert (kept["template"], kept["image_decoding"], kept["image_mode"]) == ("brief", "upright", "pad")
    assert kept["decoding"] == {"method": "greedy", "max_new_tokens": 16, "batch_size": 64}
    assert torch.__version__.startswith(kept["versions"]["torch"])
    rows = [json.loads(line) for line in (files / "squares_step_4.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["eleven", "60.", "120", "180", "250", "120", "5"]
    for row in rows[2:6]:
        assert row["shuffled_answer"] == str(LEVELS[row["shuffled_images"][0]]) != row["answer"]

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name, value in metrics.items():
        (event,) = events.Scalars(f"squares/{name}")
        assert (event.step, event.value) == (4, pytest.approx(value))
    assert events.Scalars("squares/accuracy_shuffled_pictures")[0].value == pytest.approx(2 / 7)
    assert fitted.callback_metrics["squares/accuracy"] == pytest.approx(6 / 7)
    (sheet,) = events.Images("squares/answers")
    assert sheet.step == 4
    assert Image.open(io.BytesIO(sheet.encoded_image_string)).width > 4 * 256


def test_steps_on_the_way_are_optimizer_steps(tmp_path):
    validation = Validation({"squares": Brightness()}, every_n_steps=2, shuffled_pictures=True)
    fit(tmp_path, validation, accumulate_grad_batches=3)
    assert [name for name in ("squares_step_2", "squares_step_4") if "shuffled_pictures" in record(tmp_path, name)] == [
        "squares_step_4"
    ]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("squares/accuracy")] == [2, 4]


def test_an_interrupted_run_is_not_validated(tmp_path):
    class Interrupted(Model):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = True

    model, fitted = fit(tmp_path, Validation({"squares": Brightness()}), Interrupted(), min_epochs=0)
    assert 0 < fitted.global_step < 4
    assert model.asked == []


def test_a_limit_makes_every_name_partial_and_draws_the_same_questions(tmp_path, capsys):
    model, fitted = fit(tmp_path, Validation({"squares": Brightness()}, every_n_steps=2, limit=3))
    first, second = model.asked
    assert first == second
    assert len(set(first)) == 3
    assert "squares_partial at step 2: 3 of 7 questions, brightness of squares" in capsys.readouterr().out
    kept = record(tmp_path, "squares_partial_step_4")
    assert (kept["partial"], kept["questions_asked"], kept["questions"], kept["metrics"]["count"]) == (True, 3, 7, 3.0)
    assert "squares_partial/accuracy" in fitted.callback_metrics
    assert "squares/accuracy" not in fitted.callback_metrics


@pytest.mark.parametrize("workers", [0, 1])
def test_training_does_not_notice(tmp_path, workers):
    torch.manual_seed(0)
    alone, _ = fit(tmp_path / "alone", None)
    torch.manual_seed(0)
    asked, _ = fit(tmp_path / "asked", Validation({"squares": Brightness()}, every_n_steps=1), data=Data(num_workers=workers))
    assert len(asked.asked) == 4
    assert asked.draws == alone.draws
    assert asked.layer.training
    assert not asked.frozen.training


@pytest.mark.parametrize("held_out", [1, 2])
@pytest.mark.parametrize(("command", "name", "count"), [("validate", "squares_partial", 3), ("test", "squares", 7)])
def test_commands_ask_at_the_step_of_the_checkpoint(tmp_path, held_out, command, name, count):
    _, fitted = fit(tmp_path, None)
    fitted.save_checkpoint(tmp_path / "weights.ckpt")
    model = Model()
    validation = Validation({"squares": Brightness()}, limit=3, batch_size=10)
    asking = getattr(trainer(tmp_path, validation), command)
    asking(model, datamodule=Data(held_out), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert [len(batch) for batch in model.asked] == [count]
    assert record(tmp_path, f"{name}_step_4")["metrics"]["accuracy"] == 1.0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars(f"{name}/accuracy")] == [4]


def test_the_page_shows_the_worst_and_what_was_said(tmp_path):
    fit(tmp_path, Validation({"squares": Brightness()}, num_pictures=7), Model({"q0": "eleven", "q1": "60."}))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (page,) = events.Tensors("squares/report/text_summary")
    text = page.tensor_proto.string_val[0].decode()
    assert (page.step, text.splitlines()[0]) == (4, "### squares at step 4: brightness of squares")
    worst = text[text.index("#### Worst categories") :].splitlines()
    assert worst[4] == "| dark | 0.667 | 3 |"
    assert "| dark | 10 | eleven | 1 |" in text
    assert "| how very very bright is that | 120 | 120 | 1 |" in text


def test_at_start_is_before_the_first_step_and_not_after_a_restart(tmp_path):
    model, fitted = fit(tmp_path, Validation({"squares": Brightness()}, at_start=True, at_end=False))
    assert len(model.asked) == 1
    assert record(tmp_path, "squares_step_0")["step"] == 0
    fitted.save_checkpoint(tmp_path / "weights.ckpt")
    again = Model()
    validation = Validation({"squares": Brightness()}, at_start=True, at_end=False)
    trainer(tmp_path, validation).fit(again, datamodule=Data(), ckpt_path=tmp_path / "weights.ckpt", weights_only=False)
    assert again.asked == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(tmp_path, workers):
    benchmark = Brightness()
    benchmark.broken = "pale.png"
    with pytest.raises(RecipeError) as caught:
        fit(tmp_path, Validation({"squares": benchmark}), data=Data(num_workers=workers))
    assert "brightness of squares, question q3 with picture pale.png: The" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_what_is_missing_shows_before_training(tmp_path):
    class Missing(Brightness):
        def setup(self, pictures=True):
            raise RecipeError("There is no file. Download it.")

    model = Model()
    with pytest.raises(RecipeError, match=r"validation\.benchmarks\.squares: There is no file"):
        fit(tmp_path, Validation({"squares": Missing()}), model)
    assert not hasattr(model, "draws")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"limit": 0}, "'limit': 0"), ({"every_n_steps": -1}, "'every_n_steps': -1"), ({"num_pictures": -1}, "num_pictures = -1")],
)
def test_values_out_of_range(values, words):
    with pytest.raises(RecipeError, match=words):
        Validation({}, **values)
