"""A run with validations is the run without them, bit for bit: weights, losses, order of the data, randomness."""

from pathlib import Path

import pytest
import torch
from small_recipe import RECIPE, diary, fit, write_recipe
from tiny import weights

from components.rebuild import load
from components.run_folder import checkpoint_folder

SHAPES = {
    "class_path": "components.benchmarks.ShapesWorld",
    "init_args": {"setting": RECIPE["data"]["sources"]["shapes"]["init_args"]["setting"], "num_scenes": 3},
}
DROPOUT = {"lora": {"rank": 2, "alpha": 2.0, "dropout": 0.5, "target_modules": "all-linear"}}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_training_with_and_without_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shared = {
        "data": {"num_workers": 1, "global_batch_size": 8},
        "model": {"decoder": {"init_args": DROPOUT}},  # draws random numbers at every step
        "trainer": {"callbacks": [{"class_path": "small_recipe.Diary"}], "accumulate_grad_batches": 2},
    }
    asking = {"benchmarks": {"shapes": SHAPES}, "every_n_steps": 1, "at_start": True, "shuffled_pictures": True}
    asking |= {"max_new_tokens": 4, "num_pictures": 2}
    assert fit(write_recipe(tmp_path / "without.yaml", **shared)) == 0
    monitored = {"validation": asking, "checkpoint": {"every_n_steps": 2, "monitor": "shapes/accuracy"}}
    assert fit(write_recipe(tmp_path / "with.yaml", **shared, **monitored)) == 0
    assert len(list(Path("runs/with/validation").glob("*.json"))) == 5
    assert "--ckpt_path runs/with/checkpoints/best.json" in capsys.readouterr().out
    assert diary(Path("runs/with")) == diary(Path("runs/without"))
    asked, alone = (weights(load(checkpoint_folder(Path("runs", name), 4))[0]) for name in ("with", "without"))
    assert asked.keys() == alone.keys()
    assert all(torch.equal(asked[name], alone[name]) for name in asked)
