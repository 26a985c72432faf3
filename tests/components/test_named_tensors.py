"""Tensors in files: the same whatever the format, and a clear refusal of what is damaged or holds code."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from components.errors import RecipeError
from components.named_tensors import Paired, Pairing, Renamed, SafetensorsFiles, TorchFiles, differences, listed, weights_in

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(1, dtype=torch.bfloat16)}


def write(form, folder):
    first, second = {"a": TENSORS["a"]}, {name: TENSORS[name] for name in "bc"}
    if form == "safetensors":
        save_file(TENSORS, folder / "model.safetensors")
    elif form == "pickle":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    elif form == "old pickle":
        torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        suffix, stem = ("safetensors", "model") if form == "safetensors shards" else ("bin", "pytorch_model")
        save = save_file if suffix == "safetensors" else torch.save
        save(first, folder / f"{stem}-1.{suffix}")
        save(second, folder / f"{stem}-2.{suffix}")
        weight_map = {name: f"{stem}-{1 if name == 'a' else 2}.{suffix}" for name in TENSORS}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS = ["safetensors", "pickle", "old pickle", "safetensors shards", "pickle shards"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form, tmp_path):
    write(form, tmp_path)
    found = weights_in(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in found.infos.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())


ROWS = [slice(0, 0), slice(0, 1), slice(1, 3), slice(3, 3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_the_whole(form, rows, tmp_path):
    write(form, tmp_path)
    found = weights_in(tmp_path)
    renamed = Renamed(found, lambda name: f"x.{name}")
    paired = Paired(found, [Pairing("one", ("a",)), Pairing("both", ("a", "a")), Pairing("row", ("a",), leading_one=True)])
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read_rows(name, rows), tensor[rows])
        assert torch.equal(renamed.read_rows(f"x.{name}", rows), tensor[rows])
    assert all(torch.equal(paired.read_rows(name, rows), paired.read(name)[rows]) for name in paired.infos)


def test_a_folder_without_weights(tmp_path):
    assert weights_in(tmp_path) is None


@pytest.mark.parametrize("form", ["safetensors", "pickle", "safetensors shards", "pickle shards"])
def test_a_file_cut_short(form, tmp_path):
    write(form, tmp_path)
    file = next(path for path in sorted(tmp_path.iterdir()) if path.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RecipeError, match=rf"{file.name} is damaged or cut short.*Fetch it again"):
        weights_in(tmp_path)


@pytest.mark.parametrize("form", ["safetensors shards", "pickle shards"])
def test_a_shard_that_is_missing(form, tmp_path):
    write(form, tmp_path)
    file = next(path for path in tmp_path.iterdir() if "-2." in path.name)
    file.unlink()
    with pytest.raises(RecipeError, match=rf"{file.name} does not exist"):
        weights_in(tmp_path)


class Code:
    def __reduce__(self):
        return (print, ("the code ran",))


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_a_pickle_with_code_is_not_run(form, tmp_path, capsys):
    file = tmp_path / "pytorch_model.bin"
    if form == "zip":
        torch.save({"a": torch.ones(1), "b": Code()}, file)
    else:
        file.write_bytes(pickle.dumps({"b": Code()}))
    with pytest.raises(RecipeError, match=r"pytorch_model.bin holds code, not only tensors, and is not opened.*\n?.*safetensors"):
        TorchFiles([file])
    assert "the code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [({"a": 3}, "a is a int, not a tensor"), ([1], "holds no dictionary of tensors")])
def test_other_content(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(RecipeError, match=message):
        TorchFiles([tmp_path / "x.bin"])


def test_a_section_of_a_checkpoint(tmp_path):
    torch.save({"state_dict": TENSORS, "step": 3}, tmp_path / "x.bin")
    assert torch.equal(TorchFiles([tmp_path / "x.bin"], section="state_dict").read("a"), TENSORS["a"])


def test_other_names(tmp_path):
    write("safetensors", tmp_path)
    renamed = Renamed(SafetensorsFiles([tmp_path / "model.safetensors"]), lambda name: None if name == "c" else f"x.{name}")
    assert set(renamed.infos) == {"x.a", "x.b"}
    assert torch.equal(renamed.read("x.a"), TENSORS["a"])


def test_pairings_join_and_split(tmp_path):
    parts = {f"{name}_proj": torch.randn(2, 3) for name in "qkv"} | {"position": torch.randn(5, 3)}
    save_file(parts, tmp_path / "model.safetensors")
    joined = Pairing("in_proj", ("q_proj", "k_proj", "v_proj"))
    table = Pairing("pos_embed", ("position",), leading_one=True)
    ours = Paired(SafetensorsFiles([tmp_path / "model.safetensors"]), [joined, table, Pairing("gone", ("nowhere",))])
    assert {name: info.shape for name, info in ours.infos.items()} == {"in_proj": (6, 3), "pos_embed": (1, 5, 3)}
    assert torch.equal(ours.read("in_proj"), torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]]))
    back = joined.split(ours.read("in_proj")) | table.split(ours.read("pos_embed"))
    assert back.keys() == parts.keys() and all(torch.equal(back[name], tensor) for name, tensor in parts.items())


def test_differences_are_listed():
    problems = differences({"a": (2,), "b": (3,)}, {"b": (4,), "c": (1,)})
    assert problems == ["missing: a (2,)", "unexpected: c (1,)", "mismatched: b is (4,), should be (3,)"]
    assert listed(problems * 5, most=2).endswith("... and 13 more")
