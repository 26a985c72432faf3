"""Two processes answer what one does: any number of questions, answers of unequal length, a rank without pictures, a broken one."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tiny import (
    ALL,
    LLAMA,
    TOKENS_PER_IMAGE,
    TOWER,
    TOWER_FROZEN,
    Numbers,
    Prepared,
    TinyModel,
    tiny_batch,
    tiny_model,
    tiny_trainer,
    weights,
)
from training_runs import slow

from callbacks.checkpoint import Checkpoint
from callbacks.validation import Validation
from callbacks.validation.asking import ask, gather
from components.batch import SampleFormat
from components.benchmarks import Benchmark, Question
from components.benchmarks.records import read_record
from components.data import Preparation
from components.errors import RecipeError
from components.run_folder import BEST, CHECKPOINTS, RECIPE, find_checkpoint
from components.sharding import HybridSharding
from components.tokenizer import WordTokenizer, load_tokenizer

STRATEGIES = {"fsdp": {"replicas": 1, "shards": 2}, "hybrid": {"replicas": 2, "shards": 1}, "ddp": None}
BATCH = 3
COUNTS = sorted({max(0, 2 * each + odd) for each in (0, 1, BATCH - 1, BATCH, BATCH + 1) for odd in (-1, 0, 1)})
"""Questions, so that a rank has 0, 1, N - 1, N or N + 1 of them for batches of N, and the other as many or one more."""


class Noise(Benchmark):
    """Questions of unequal length, every `pictured`th with a picture; the picture `broken` cannot be decoded."""

    def __init__(self, count: int, pictured: int = 2, broken: str = "") -> None:
        self.count = count
        self.pictured = pictured
        self.broken = broken

    def setup(self, pictures: bool = True) -> None: ...

    def questions(self) -> list[Question]:
        asked = []
        for number in range(self.count):
            images = (f"{number}.png",) if number % self.pictured == 0 else ()
            prompt = "<image>\n" * len(images) + "what " * (1 + 7 * number % 5)
            asked.append(Question(f"q{number}", prompt, images, "5", f"{number % 2}"))
        return asked

    def read_image(self, name: str) -> bytes:
        pixels = np.random.default_rng(int(name.split(".")[0])).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()[:30] if name == self.broken else buffer.getvalue()

    def describe(self) -> str:
        return "noise"


class EarlyEnd(Preparation):
    """Takes a token for the end that some answers of the untrained model have early, some late and some never."""

    def end_token_id(self, tokenizer):
        return 24


class Questioned(Prepared):
    """Ready-made micro-batches, and what asking needs of the data."""

    def __init__(self) -> None:
        super().__init__([tiny_batch()])
        self.layout = SampleFormat(WordTokenizer(), TOKENS_PER_IMAGE, TOWER["image_size"], (0.5, 0.5, 0.5))
        self.tokenizer = load_tokenizer(self.layout.tokenizer)
        self.preparation = EarlyEnd("brief", "upright", "pad", LLAMA["max_position_embeddings"])
        self.num_workers = 0


class Asking(Callback):
    """Asks before training, and keeps what rank 0 gathered or why it could not."""

    def __init__(self, benchmarks: list[Benchmark]) -> None:
        self.benchmarks = benchmarks
        self.kept: list[dict[str, str] | str] = []

    def on_train_start(self, trainer, pl_module):
        pl_module.tokenizer = Numbers()
        for benchmark in self.benchmarks:
            try:
                answers = ask(trainer, pl_module, benchmark, benchmark.questions(), BATCH, 6, "noise")
                self.kept.append(gather(trainer, answers))
            except RecipeError as error:
                self.kept.append(str(error))


def options(strategy):
    """Of a trainer on this rank: two processes with a strategy, one without."""
    if strategy == "one process":
        return {}
    named = STRATEGIES[strategy]
    return {"devices": 2, "strategy": "ddp" if named is None else HybridSharding(param_dtype="float32", **named)}


def asked(strategy, benchmarks):
    asking = Asking(benchmarks)
    tiny_trainer(callbacks=[asking], **options(strategy)).fit(tiny_model(TOWER_FROZEN), datamodule=Questioned())
    return asking.kept


@pytest.mark.parametrize("strategy", ["fsdp", slow("hybrid"), slow("ddp")])
def test_any_number_of_questions(pair, strategy):
    benchmarks = [Noise(count) for count in COUNTS] + [Noise(2, pictured=2), Noise(2, pictured=1), Noise(5, pictured=9)]
    expected = asked("one process", benchmarks)
    assert [len(answers) for answers in expected] == [benchmark.count for benchmark in benchmarks]
    lengths = {len(answer.split()) for answers in expected for answer in answers.values()}
    assert len(lengths) > 1, "answers of the same length prove little"
    first, second = pair.run(asked, strategy, benchmarks, seconds=120)
    assert first == expected
    assert second == [{}] * len(benchmarks)


def test_a_picture_that_one_rank_cannot_read_ends_both(pair):
    benchmarks = [Noise(8, broken="6.png"), Noise(3)]
    broken, whole = asked("one process", benchmarks)
    assert isinstance(broken, str) and "noise, question q6 with picture 6.png: " in broken
    first, second = pair.run(asked, "fsdp", benchmarks)
    assert first == [broken, whole]
    assert second == [broken, {}]


def validated(strategy, folder, count):
    """The scores that this rank knows after a run with a validation at its end."""
    model = tiny_model(TOWER_FROZEN)
    logger = TensorBoardLogger(folder, "run", version="")
    validation = Validation({"noise": Noise(count)}, at_start=True, batch_size=BATCH, max_new_tokens=6, num_pictures=2)
    settings = options(strategy) | {"logger": logger, "log_every_n_steps": 1}
    trainer = tiny_trainer(steps=1, callbacks=[Asking([]), validation], **settings)
    try:
        trainer.fit(model, datamodule=Questioned())
    except RecipeError as error:
        return str(error)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("noise")}


def test_both_ranks_know_the_scores_of_one_process(pair, tmp_path):
    expected = validated("one process", str(tmp_path / "one"), 7)
    assert expected["noise/count"] == 7.0
    for scores in pair.run(validated, "fsdp", str(tmp_path / "two"), 7):
        assert scores == expected
    one, two = (read_record(Path(tmp_path, name, "run/validation/noise_step_1.json")) for name in ("one", "two"))
    assert one.answers == two.answers
    assert (two.facts["ranks"], one.facts["ranks"]) == (2, 1)
    assert len(list((tmp_path / "two/run/validation").glob("*.jsonl"))) == 2  # at the start and at the end, written once


def test_no_question_is_an_error_on_both_ranks(pair, tmp_path):
    for message in pair.run(validated, "fsdp", str(tmp_path), 0):
        assert "noise: there are no questions" in message


class SlowToRead(Checkpoint):
    """On the second rank the note of the best checkpoint is read half a second later than on the first."""

    def _is_best(self, run, score):
        time.sleep(0.5 * int(os.environ["LOCAL_RANK"]))
        return super()._is_best(run, score)


def monitored(folder):
    """The best checkpoint that a run of two ranks names, though one of them is slow."""
    run = Path(folder, "run")
    logger = TensorBoardLogger(folder, "run", version="")
    validation = Validation({"noise": Noise(4)}, batch_size=BATCH, max_new_tokens=6, num_pictures=0)
    best = SlowToRead(monitor="noise/accuracy")
    settings = options("fsdp") | {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
    trainer = tiny_trainer(steps=1, callbacks=[Asking([]), validation, best], **settings)
    trainer.fit(tiny_model(TOWER_FROZEN), datamodule=Questioned())
    return find_checkpoint(run / CHECKPOINTS / BEST, "monitor").name


def test_ranks_agree_on_the_best_checkpoint(pair, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECIPE).write_text("model: tiny\n")
    assert pair.run(monitored, str(tmp_path)) == ["step_00000001"] * 2


class Randomness(Callback):
    """A random number after every step, when everything else of the step is over."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn.append(torch.rand(()).item())


def trained(folder, asking):
    """Weights, modes and random numbers of this rank after a short run."""
    torch.manual_seed(3)
    drawn, rank = Randomness(), int(os.environ["LOCAL_RANK"])
    data = Questioned()
    data.train = [tiny_batch(seed=10 * step + rank) for step in range(3)]
    validation = Validation({"noise": Noise(5)}, every_n_steps=1, at_start=True, batch_size=BATCH, max_new_tokens=6, num_pictures=0)
    settings = options("fsdp") | {"logger": TensorBoardLogger(folder, "run", version=""), "log_every_n_steps": 1}
    model = Unseeded(**vars_of(tiny_model(ALL)))
    tiny_trainer(steps=3, callbacks=[Asking([]), *([validation] if asking else []), drawn], **settings).fit(model, datamodule=data)
    return weights(model), [module.training for module in model.modules()], drawn.drawn


class Unseeded(TinyModel):
    """Draws random numbers as they come, instead of anew at every micro-batch: one drawn by a validation would show."""

    def on_train_batch_start(self, batch, batch_idx):
        """Nothing."""


def vars_of(model):
    return {name: getattr(model, name) for name in ("vision_tower", "projector", "decoder", "learning_rates")}


def test_training_on_two_ranks_does_not_notice(pair, tmp_path):
    alone = pair.run(trained, str(tmp_path / "alone"), False)
    asked = pair.run(trained, str(tmp_path / "asked"), True)
    assert len(list((tmp_path / "asked/run/validation").glob("*.json"))) == 4
    for (ours, modes, numbers), (theirs, their_modes, their_numbers) in zip(asked, alone, strict=True):
        assert (modes, numbers) == (their_modes, their_numbers)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
