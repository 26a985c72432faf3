"""Model folders from here and from the hub: which files are fetched, what is told when they cannot be."""

from fnmatch import fnmatch

import pytest

from components.errors import RecipeError
from components.hub import fetch, looks_like_hub_id

SMALL = {
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
}  # fmt: skip
OTHERS = {"README.md", ".gitattributes", "flax_model.msgpack", "tf_model.h5", "open_clip_pytorch_model.bin", "training_args.bin"}
SAFETENSORS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
PICKLES = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one model: its files, what was fetched of them, and whether it can be reached."""

    class Hub:
        files = SMALL | OTHERS
        fetched = None
        cached = False
        reachable = True

        def list_repo_files(self, hub_id):
            if not self.reachable:
                raise ConnectionError("no route to the hub")
            return sorted(self.files)

        def snapshot_download(self, hub_id, allow_patterns, local_files_only=False):
            if local_files_only != (not self.reachable) or (local_files_only and not self.cached):
                raise FileNotFoundError("not in the cache")
            self.fetched = {name for name in self.files if any(fnmatch(name, pattern) for pattern in allow_patterns)}
            return str(tmp_path)

    hub = Hub()
    monkeypatch.setattr("components.hub.list_repo_files", hub.list_repo_files)
    monkeypatch.setattr("components.hub.snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (SAFETENSORS | PICKLES, SAFETENSORS),
        ({"model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"}, {"model.safetensors"}),
        (PICKLES, PICKLES),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
        (PICKLES | {"mm_projector.bin", "open_clip_model.safetensors"}, PICKLES | {"mm_projector.bin"}),
        ({"mm_projector.bin"}, {"mm_projector.bin"}),
    ],
)
def test_which_files_are_fetched(weights, wanted, hub, tmp_path):
    hub.files = SMALL | OTHERS | weights
    assert fetch("organization/name", "--weights") == tmp_path
    assert hub.fetched == SMALL | wanted


def test_without_network_the_cache_is_used(hub, tmp_path):
    hub.reachable, hub.cached = False, True
    assert fetch("organization/name", "--weights") == tmp_path


def test_neither_network_nor_cache(hub):
    hub.reachable = False
    with pytest.raises(
        RecipeError, match=r"^--weights: organization/name is no folder here .*no route to the hub\n.*name a folder"
    ):
        fetch("organization/name", "--weights")


def test_the_library_itself_says_so_when_it_is_offline():
    with pytest.raises(RecipeError, match="could not be fetched from the Hugging Face hub: .*offline"):
        fetch("organization/name", "--weights")


def test_a_folder_is_returned_as_it_is(hub, tmp_path, monkeypatch):
    hub.reachable = False
    (tmp_path / "organization" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path), "organization/name"):
        assert str(fetch(source, "--weights")) == source


@pytest.mark.parametrize("source", ["name", "/absent/folder", "./organization/name", "../name", "a/b/c", "https://host/name", ""])
def test_what_is_neither(source, hub):
    assert not looks_like_hub_id(source)
    with pytest.raises(RecipeError, match="--weights: .* is neither a folder nor a hub id"):
        fetch(source, "--weights")


def test_a_file_is_neither(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RecipeError, match="neither a folder nor a hub id"):
        fetch(str(tmp_path / "model.safetensors"), "--weights")
