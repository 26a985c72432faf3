"""A recipe that trains in a second, and a callback that writes down what it trained on."""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer

import main
from components.shapes_world import WORDS

RECIPE = {
    "seed_everything": 1,
    "max_steps": 4,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    },
    "model": {
        "vision_tower": {
            "class_path": "components.vision_tower.OpenClipTower",
            "init_args": {"config": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}},
        },
        "projector": {"class_path": "components.projector.MLP", "init_args": {"depth": 2}},
        "decoder": {
            "class_path": "components.decoder.HuggingFaceDecoder",
            "init_args": {
                "config": {
                    "model_type": "llama",
                    "vocab_size": 400,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
                "tokenizer": {"words": list(WORDS)},
            },
        },
        "learning_rates": {"vision_tower": 1e-3, "projector": 1e-3, "decoder": 1e-3},
    },
    "data": {
        "sources": {
            "shapes": {
                "class_path": "components.data.ShapesWorld",
                "init_args": {
                    "setting": {"grid": 2, "max_objects": 2, "image_size": 16},
                    "num_scenes": 60,
                    "questions_per_scene": 1,
                    "validation_fraction": 0.1,
                },
            }
        },
        "template": "brief",
        "global_batch_size": 4,
        "num_workers": 0,
    },
    "warmup": {"steps": 2},
    "checkpoint": {"every_n_steps": 2},
    "validation": {"benchmarks": {}},
}


def write_recipe(path: Path, **changes: Any) -> Path:
    """The recipe with some keys changed: `trainer={"devices": 2}` leaves the trainer's other keys as they are."""
    path.write_text(yaml.safe_dump(merged(RECIPE, changes), sort_keys=False))
    return path


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(tree[key], changes[key]) for key in tree.keys() & changes.keys() if isinstance(changes[key], dict)}
    return {**tree, **changes, **both}


def fit(recipe: Path, *options: str) -> int:
    """`python main.py fit` in this process."""
    return main.main(["fit", "--config", str(recipe), *options])


class Diary(Callback):
    """A line in the run's diary for every micro-batch and validation. PAUSE (seconds a micro-batch) and CRASH (step) disturb it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if os.environ.get("CRASH") == str(trainer.global_step):
            raise ZeroDivisionError("the test wants it so")
        time.sleep(float(os.environ.get("PAUSE", "0")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self._write(trainer, "train", {"samples": batch.sample_ids, "rates": rates, "loss": outputs["loss"].item()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "validation", {"loss": trainer.callback_metrics["val/loss/shapes"].item()})

    def _write(self, trainer: Trainer, what: str, entry: dict[str, Any]) -> None:
        with (Path(trainer.log_dir or ".") / "diary.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, "step": trainer.global_step} | entry) + "\n")


def diary(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "diary.jsonl").read_text().splitlines()]
