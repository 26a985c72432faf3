"""Weights read into shards: to the last bit those of one process, by rows or whole, and what is wrong ends both ranks."""

import math
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from safetensors.torch import load_file, save_file
from tiny import ALL, DECODER_FROZEN, LLAMA, TOWER, TOWER_FROZEN, Prepared, fill, tiny_batch, tiny_trainer, whole
from torch.distributed.tensor import DTensor
from training_runs import hybrid, rank_of

from callbacks.checkpoint import Checkpoint
from components import checkpoint_files
from components.checkpoint_files import checkpoint_weights
from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.named_tensors import SafetensorsFiles
from components.projector import MLP
from components.run_folder import RECIPE, checkpoint_folder
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import VisionLanguageModel
from tests.components.huggingface.llava_folders import LAYERS, ROWS, TEXT, hugging_face_folder

FSDP, HYBRID = hybrid(1, 2), hybrid(2, 1)
UNEVEN = {**LLAMA, "vocab_size": 261, "intermediate_size": 49}
TIED = {**UNEVEN, "tie_word_embeddings": True}
EXPERTS = {**UNEVEN, "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ADAPTED = LoRA(rank=3, alpha=6.0)


def model_of(
    config=UNEVEN, pretrained=None, weights=None, lora=None, rates=TOWER_FROZEN, initial_weights=None, tower=TOWER, layer=-1
):
    return VisionLanguageModel(
        vision_tower=OpenClipTower(config=tower, pretrained=pretrained, feature_layer=layer),
        projector=MLP(depth=2),
        decoder=HuggingFaceDecoder(config, WordTokenizer(), weights, lora),
        learning_rates=rates,
        initial_weights=initial_weights,
    )


def release(folder, config=UNEVEN, dtype=torch.float32, **options):
    """Weights of a tower and of a decoder, as a recipe names them."""
    model = model_of(config)
    model.configure_model()
    fill(model)
    model.to(dtype)
    save_file(model.vision_tower.visual.state_dict(), folder / "tower.safetensors")
    model.decoder.lm.save_pretrained(folder / "decoder", **options)
    return {"config": config, "pretrained": str(folder / "tower.safetensors"), "weights": str(folder / "decoder")}


def started(strategy, arguments, callbacks=(), **options):
    """The model of this rank as a run starts with it."""
    model = model_of(**arguments)
    trainer = tiny_trainer(steps=0, callbacks=list(callbacks), devices=2, strategy=strategy(), **options)
    trainer.fit(model, datamodule=Prepared([tiny_batch()]))
    return model


def unlike(strategy, arguments):
    """The tensors of this rank's sharded start that are not those of a whole one, and how many there are of either kind."""
    one = model_of(**arguments)
    one.configure_model()
    model = started(strategy, arguments)
    ours, theirs = model.state_dict(), one.state_dict()
    assert ours.keys() == theirs.keys()
    lm = model.decoder.lm
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == lm.config.tie_word_embeddings
    buffers = dict(one.named_buffers())
    found = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    for name, tensor in ours.items():
        assert isinstance(tensor, DTensor) and tensor.dtype == torch.float32
        found += [] if torch.equal(whole(tensor), theirs[name]) else [name]
    return found, len(ours)


# --- the same bits


@pytest.mark.parametrize(
    ("config", "lora", "options", "strategies"),
    [
        (UNEVEN, None, {}, [FSDP, HYBRID]),
        (UNEVEN, ADAPTED, {"dtype": torch.bfloat16, "max_shard_size": "20KB"}, [FSDP]),
        (TIED, None, {"dtype": torch.float16}, [FSDP, HYBRID]),
        (EXPERTS, None, {}, [FSDP]),
    ],
    ids=["uneven rows", "adapters beside several files", "tied", "experts"],
)
def test_released_weights(config, lora, options, strategies, pair, tmp_path):
    arguments = release(tmp_path, config, **options)
    for strategy in strategies:
        for found, count in pair.run(unlike, strategy, {**arguments, "lora": lora}):
            assert found == [] and count > 25


def test_a_pickle(pair, tmp_path):
    arguments = release(tmp_path)
    file = tmp_path / "decoder" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    for found, _ in pair.run(unlike, FSDP, arguments):
        assert found == []


def test_random_weights_beside_read_ones(pair, tmp_path):
    """A projector and adapters that no file holds are the same on all ranks, and as on one process."""
    arguments = release(tmp_path)
    for named in ({"pretrained": arguments["pretrained"]}, {"weights": arguments["weights"], "lora": ADAPTED}, {}):
        for found, _ in pair.run(unlike, FSDP, {"config": UNEVEN, **named}):
            assert found == []


def numbers_read(strategy, arguments):
    """How many numbers of its decoder's files this rank asks for, and how many it holds."""
    count, real = 0, {name: getattr(SafetensorsFiles, name) for name in ("read", "read_rows")}

    def counting(name):
        def read(self, *asked):
            nonlocal count
            tensor = real[name](self, *asked)
            count += tensor.numel()
            return tensor

        return read

    for name in real:
        setattr(SafetensorsFiles, name, counting(name))
    try:
        model = started(strategy, arguments)
    finally:
        for name, method in real.items():
            setattr(SafetensorsFiles, name, method)
    return count, sum(parameter.to_local().numel() for parameter in model.decoder.parameters())


def test_a_rank_reads_what_it_holds(pair, tmp_path):
    counts = pair.run(numbers_read, FSDP, release(tmp_path) | {"pretrained": None})
    assert all(read == held > 0 for read, held in counts)
    stored = SafetensorsFiles([tmp_path / "decoder" / "model.safetensors"])
    assert sum(held for _, held in counts) == sum(math.prod(info.shape) for info in stored.infos.values())


# --- later stages


def first_stage(folder, strategy, arguments, steps=1):
    """A checkpoint of the start of a run, sharded where a strategy is given, with adapters that are not zero."""
    model = model_of(**arguments)

    class Changes(Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                for number, parameter in enumerate(pl_module.parameters()):
                    parameter.add_(0.01 * (number % 7))

    options = {"devices": 2, "strategy": strategy()} if strategy else {}
    callbacks = [Changes(), Checkpoint(1)]
    trainer = tiny_trainer(steps=steps, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder, **options)
    trainer.fit(model, datamodule=Prepared([tiny_batch()] * steps))


def write_stage(folder, lora):
    init_args = {"lora": vars(lora) if lora else None}
    (folder / RECIPE).write_text(yaml.safe_dump({"model": {"decoder": {"init_args": init_args}}}))


@pytest.mark.parametrize("lora", [None, ADAPTED], ids=["plain", "adapters to be merged"])
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_second_stage(kind, lora, pair, tmp_path):
    write_stage(tmp_path, lora)
    arguments = {"config": UNEVEN, "lora": lora}
    if kind == "whole":
        first_stage(str(tmp_path), None, arguments)
    else:
        pair.run(first_stage, str(tmp_path), FSDP, arguments)
        stored = checkpoint_weights(checkpoint_folder(tmp_path, 1))
        for name in stored.infos:  # rows across the shards of both ranks
            rows = slice(stored.infos[name].shape[0] // 3, None)
            assert torch.equal(stored.read_rows(name, rows), stored.read(name)[rows])
    for strategy in (FSDP, HYBRID):
        for found, _ in pair.run(unlike, strategy, {"config": UNEVEN, "initial_weights": str(tmp_path), "lora": lora}):
            assert found == []


@pytest.mark.parametrize("lora", [None, ADAPTED], ids=["plain", "adapters"])
def test_a_released_llava_model(lora, pair, tmp_path):
    """Whose queries, keys and values of the tower are put together of three tensors."""
    folder = hugging_face_folder(tmp_path / "released")
    tower = {**TOWER, "layers": LAYERS, "mlp_ratio": 4.0, "quick_gelu": True}
    arguments = {"config": {"model_type": "llama", **TEXT, "vocab_size": ROWS}, "tower": tower, "layer": -2}
    for found, _ in pair.run(unlike, FSDP, {**arguments, "initial_weights": str(folder), "lora": lora}):
        assert found == []


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


# --- frozen parts that every rank holds


def rounded(arguments):
    one = model_of(**arguments)
    one.configure_model()
    model = started(hybrid(1, 2, param_dtype="bfloat16", replicate_frozen=True), arguments)
    found = {}
    for name, tensor in model.state_dict().items():
        frozen = not name.startswith("projector")
        assert isinstance(tensor, DTensor) != frozen and tensor.dtype == (torch.bfloat16 if frozen else torch.float32)
        expected = one.state_dict()[name]
        found[name] = torch.equal(whole(tensor), expected.bfloat16() if frozen else expected)
    return found


@pytest.mark.parametrize("config", [UNEVEN, TIED], ids=["plain", "tied"])
def test_frozen_parts_are_read_whole_and_rounded(config, pair, tmp_path):
    arguments = release(tmp_path, config) | {"rates": DECODER_FROZEN}
    for found in pair.run(rounded, arguments):
        assert found and all(found.values())


# --- what is wrong ends both ranks


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
    began = time.monotonic()
    messages = pair.run(refusal, FSDP, arguments, seconds=30)
    assert time.monotonic() - began < 30
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


@pytest.mark.parametrize("lora", [None, ADAPTED], ids=["plain", "adapters"])
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
