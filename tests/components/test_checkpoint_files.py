"""Weights of an earlier stage: a round trip through real checkpoints, and errors that name what does not fit."""

import shutil

import pytest
import torch
from tiny import (
    DECODER_FROZEN,
    LLAMA,
    TOWER_FROZEN,
    Prepared,
    built_model,
    fill,
    tiny_batch,
    tiny_model,
    tiny_trainer,
    weights,
)
from torch.distributed.checkpoint import FileSystemWriter, save

from callbacks.checkpoint import Checkpoint
from components.checkpoint_files import checkpoint_weights
from components.decoder import HuggingFaceDecoder
from components.errors import RecipeError
from components.manifest import seal
from components.projector import MLP, Linear
from components.run_folder import RECIPE, STATE, checkpoint_folder
from components.tokenizer import WordTokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two optimizer steps, with its weights at the end."""
    folder = tmp_path_factory.mktemp("runs") / "first_stage"
    folder.mkdir()
    (folder / RECIPE).write_text("model: tiny\n")
    model = tiny_model(DECODER_FROZEN)
    checkpoint = Checkpoint(every_n_steps=1)
    trainer = tiny_trainer(steps=2, callbacks=[checkpoint], enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(model, datamodule=Prepared([tiny_batch()] * 4))
    return folder, weights(model)


def test_whole_checkpoint_of_a_run(run):
    folder, expected = run
    model = built_model(TOWER_FROZEN, initial_weights=str(folder))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(model).items())
    assert not torch.equal(weights(built_model())["projector.layers.0.weight"], expected["projector.layers.0.weight"])
    trained = {name for name, part in model.parts.items() if all(p.requires_grad for p in part.parameters())}
    assert trained == {"projector", "decoder"}


def test_checkpoint_folder_of_an_earlier_step(run):
    folder, last = run
    model = built_model(initial_weights=str(checkpoint_folder(folder, 1)))
    assert not torch.equal(weights(model)["projector.layers.0.weight"], last["projector.layers.0.weight"])


@pytest.fixture
def sharded(tmp_path):
    """The sharded layout, written by one process."""
    model = built_model()
    fill(model, seed=7)
    folder = checkpoint_folder(tmp_path / "sharded_run", 4)
    folder.mkdir(parents=True)
    state = {"state_dict": model.state_dict(), "optimizer_0": {"step": torch.tensor(4.0)}}
    with pytest.warns(UserWarning, match="to save in a single process"):
        save(state, storage_writer=FileSystemWriter(folder / STATE), no_dist=True)
    (folder / RECIPE).write_text("model: tiny\n")
    seal(folder, step=4)
    return folder.parent.parent, weights(model)


def test_sharded_checkpoint(sharded):
    folder, expected = sharded
    model = built_model(initial_weights=str(folder))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(model).items())


def test_rows_of_a_sharded_checkpoint(sharded):
    folder, expected = sharded
    stored = checkpoint_weights(checkpoint_folder(folder, 4))
    for name in stored.infos:
        for rows in (slice(0, 0), slice(0, 1), slice(1, 9), slice(2, None)):
            assert torch.equal(stored.read_rows(name, rows), stored.read(name)[rows])
    assert torch.equal(stored.read_rows("projector.layers.0.weight", slice(3, 7)), expected["projector.layers.0.weight"][3:7])


def test_no_other_weights_are_read(run, monkeypatch):
    def unexpected(self):
        raise AssertionError("weights of the part were read, though all are replaced")

    monkeypatch.setattr(HuggingFaceDecoder, "load_weights", unexpected)
    built_model(initial_weights=str(run[0]))


@pytest.mark.parametrize("layout", ["run", "sharded"])
def test_what_does_not_fit_is_named(layout, request):
    folder, _ = request.getfixturevalue(layout)
    with pytest.raises(RecipeError) as raised:
        built_model(initial_weights=str(folder), projector=MLP(depth=3))
    assert "model.initial_weights: the weights in" in str(raised.value)
    assert "missing: projector.layers.4.weight" in str(raised.value)
    assert "missing: projector.layers.4.bias" in str(raised.value)

    with pytest.raises(RecipeError, match=r"unexpected: projector\.layers\.2\.weight"):
        built_model(initial_weights=str(folder), projector=Linear())

    wider = HuggingFaceDecoder({**LLAMA, "intermediate_size": 64}, WordTokenizer())
    with pytest.raises(RecipeError) as raised:
        built_model(initial_weights=str(folder), decoder=wider)
    assert "mismatched: decoder.lm.model.layers.0.mlp.gate_proj.weight is (48, 32), should be (64, 32)" in str(raised.value)

    deeper = HuggingFaceDecoder({**LLAMA, "num_hidden_layers": 4}, WordTokenizer())
    with pytest.raises(RecipeError, match="and 6 more"):  # nine tensors in a layer, twelve are shown
        built_model(initial_weights=str(folder), decoder=deeper)


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.initial_weights: .*nowhere does not exist"):
        built_model(initial_weights=str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="holds no complete checkpoint"):
        built_model(initial_weights=str(tmp_path))
    unfinished = tmp_path / "run"
    shutil.copytree(checkpoint_folder(run[0], 2), unfinished / "checkpoints" / "step_00000002.unfinished")
    with pytest.raises(RecipeError, match="holds no complete checkpoint"):
        built_model(initial_weights=str(unfinished))
