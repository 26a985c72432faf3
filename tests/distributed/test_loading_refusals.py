"""What is wrong with the weights that a sharded run starts from ends all of its ranks; a run that continues needs none of them."""

import math
import re
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file, save_file
from starts import ADAPTED, FSDP, HYBRID, TIED, UNEVEN, first_stage, model_of, release, started, write_stage
from tiny import ALL, Prepared, tiny_batch, tiny_trainer, whole
from training_runs import rank_of, slow

from callbacks.checkpoint import Checkpoint
from components import checkpoint_files
from components.errors import RecipeError
from components.named_tensors import SafetensorsFiles
from components.run_folder import RECIPE, checkpoint_folder


def refusal(strategy, arguments, without=None):
    """What ends this rank; the file `without` is not there for the second one."""
    if without and rank_of(2):
        real = SafetensorsFiles.read_rows

        def missing(self, *asked):
            raise RecipeError(f"{without} does not exist.")

        SafetensorsFiles.read_rows = missing
    try:
        started(strategy, arguments)
    except RecipeError as error:
        return str(error)
    finally:
        if without and rank_of(2):
            SafetensorsFiles.read_rows = real


def spoil(arguments, change):
    file = Path(arguments["weights"]) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("row", [0, -1], ids=["rank 0", "rank 1"])
def test_a_number_that_is_none_in_the_rows_of_one_rank(row, pair, tmp_path):
    arguments = release(tmp_path)
    spoil(arguments, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][row].fill_(math.nan))
    messages = pair.run(refusal, FSDP, arguments, seconds=30)
    assert all("hold NaN or infinite numbers" in message for message in messages)
    assert all("\n  decoder.lm.model.layers.1.mlp.up_proj.weight\n" in message for message in messages)
    assert messages[1 if row == 0 else 0].startswith(f"Rank {0 if row == 0 else 1}: ")


def test_a_missing_tensor(pair, tmp_path):
    arguments = release(tmp_path)
    spoil(arguments, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for message in pair.run(refusal, HYBRID, arguments, seconds=30):
        assert "missing: model.layers.1.mlp.up_proj.weight (49, 32)" in message


def test_a_file_that_one_rank_does_not_see(pair, tmp_path):
    arguments = release(tmp_path)
    messages = pair.run(refusal, FSDP, arguments, "the file", seconds=30)
    assert messages == ["Rank 1: the file does not exist.", "the file does not exist."]


def other_checkpoint(folder):
    """What ends this rank when the second one finds another checkpoint as the newest of a run."""
    real = checkpoint_files.find_checkpoint
    if rank_of(2):
        checkpoint_files.find_checkpoint = lambda source, key: checkpoint_folder(Path(source), 1)
    try:
        started(FSDP, {"config": UNEVEN, "initial_weights": folder})
    except RecipeError as error:
        return str(error)
    finally:
        checkpoint_files.find_checkpoint = real


def test_ranks_that_find_different_checkpoints(pair, tmp_path):
    write_stage(tmp_path, None)
    first_stage(str(tmp_path), None, {"config": UNEVEN}, steps=2)
    for message in pair.run(other_checkpoint, str(tmp_path), seconds=30):
        assert re.search(r"Rank 1 read .*step_00000001.*rank 0 .*step_00000002", message)


# --- continuing


def continued(folder, arguments, state=None):
    """The weights at the end of three steps, or of those after a checkpoint, and whether any file was read."""
    model = model_of(**arguments)
    options = {"enable_checkpointing": True, "callbacks": [Checkpoint(1, keep=3)]} if state is None else {}
    trainer = tiny_trainer(steps=3, devices=2, strategy=FSDP(), default_root_dir=folder, **options)
    trainer.ckpt_path = state
    trainer.fit(model, datamodule=Prepared([tiny_batch(seed) for seed in range(3)]))
    assert trainer.global_step == 3
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("lora", [slow(None), ADAPTED], ids=["plain", "adapters"])
def test_a_sharded_run_continues_without_the_files_it_started_from(lora, pair, tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    arguments = release(tmp_path, TIED) | {"lora": lora, "rates": ALL}
    expected = pair.run(continued, str(tmp_path), arguments)[0]
    (tmp_path / "decoder").rename(tmp_path / "gone")
    (tmp_path / "tower.safetensors").unlink()
    state = str(checkpoint_folder(tmp_path, 1) / "state")
    for found in pair.run(continued, str(tmp_path), arguments, state):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


class Diverges(Callback):
    """Writes what is no number into the last row of a table, before the step is saved."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        table = pl_module.decoder.lm.lm_head.weight.to_local()
        if trainer.global_step == 1 and rank_of(2):
            table.data[-1, 0] = math.nan


def diverged(folder, arguments):
    """What ends this rank when the checkpoint that it continues from is not finite."""
    model, state = model_of(**arguments), checkpoint_folder(Path(folder), 1) / "state"
    options = {"enable_checkpointing": True, "callbacks": [Diverges(), Checkpoint(1)], "default_root_dir": folder}
    data = Prepared([tiny_batch(seed) for seed in range(3)])
    tiny_trainer(steps=1, devices=2, strategy=FSDP(), **options).fit(model, datamodule=data)
    try:
        continued(folder, arguments, str(state))
    except RecipeError as error:
        return str(error)


def test_a_checkpoint_of_a_run_that_has_diverged(pair, tmp_path):
    (tmp_path / RECIPE).write_text("model: tiny\n")
    messages = pair.run(diverged, str(tmp_path), {"config": UNEVEN}, seconds=30)
    assert all("hold NaN or infinite numbers, or nothing at all:\n  decoder.lm.lm_head.weight\n" in one for one in messages)
    assert messages[0].startswith("Rank 1: ")
