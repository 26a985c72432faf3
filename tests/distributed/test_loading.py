"""Weights read into shards: to the last bit those of one process, by rows or whole, whatever they are read from."""

import math

import pytest
import torch
from safetensors.torch import load_file
from starts import ADAPTED, EXPERTS, FSDP, HYBRID, TIED, UNEVEN, first_stage, model_of, release, started, write_stage
from tiny import DECODER_FROZEN, TOWER, whole
from torch.distributed.tensor import DTensor
from training_runs import hybrid, slow

from components.checkpoint_files import checkpoint_weights
from components.named_tensors import SafetensorsFiles
from components.run_folder import checkpoint_folder
from tests.components.huggingface.llava_folders import LAYERS, ROWS, TEXT, hugging_face_folder


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


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("whole", None), slow("whole", ADAPTED), slow("sharded", None), ("sharded", ADAPTED)],
    ids=["whole-plain", "whole-adapters to be merged", "sharded-plain", "sharded-adapters to be merged"],
)
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


@pytest.mark.parametrize("lora", [slow(None), ADAPTED], ids=["plain", "adapters"])
def test_a_released_llava_model(lora, pair, tmp_path):
    """Whose queries, keys and values of the tower are put together of three tensors."""
    folder = hugging_face_folder(tmp_path / "released")
    tower = {**TOWER, "layers": LAYERS, "mlp_ratio": 4.0, "quick_gelu": True}
    arguments = {"config": {"model_type": "llama", **TEXT, "vocab_size": ROWS}, "tower": tower, "layer": -2}
    for found, _ in pair.run(unlike, FSDP, {**arguments, "initial_weights": str(folder), "lora": lora}):
        assert found == []


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


@pytest.mark.parametrize("config", [slow(UNEVEN), TIED], ids=["plain", "tied"])
def test_frozen_parts_are_read_whole_and_rounded(config, pair, tmp_path):
    arguments = release(tmp_path, config) | {"rates": DECODER_FROZEN}
    for found in pair.run(rounded, arguments):
        assert found and all(found.values())
