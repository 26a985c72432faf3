"""Model folders: a local one as it is, one on the Hugging Face hub fetched once into its cache."""

import re
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from components.errors import RecipeError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SMALL = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template*", "tokenizer*",
    "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "mm_projector.bin",
]  # fmt: skip
"""Configs, processors, tokenizers, and the projector of original LLaVA releases."""
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is not on this disk may be a hub id, `organization/name`."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def fetch(source: str, key: str) -> Path:
    """A folder with a model's files.

    Args:
        source: A folder, which is returned as it is, or a hub id. Of a hub model only configs, tokenizer and weights are fetched:
            safetensors where it has them, else PyTorch files. Without network, what an earlier fetch left in the cache is used.
        key: The option that named it, for the error message.

    Raises:
        RecipeError: Neither is there, or it cannot be fetched.
    """
    if source and Path(source).is_dir():  # the path of an empty source is the current folder
        return Path(source)
    if not looks_like_hub_id(source):
        raise RecipeError(f"{key}: {source} is neither a folder nor a hub id (organization/name). Correct it.")
    try:
        return _download(source)
    except Exception as error:  # OSError, ValueError, and what the hub's HTTP library of the day raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"{key}: {source} is no folder here and could not be fetched from the Hugging Face hub: {lines[0][:200]}\nCorrect it, "
            "fetch it once where the network is reachable (it is cached; gated models need `hf auth login`), or name a folder."
        ) from error


def _download(hub_id: str) -> Path:
    try:
        names = list_repo_files(hub_id)
    except Exception as unreachable:
        # the same patterns as online: a listing beside the cache tells whether all that they match is there
        try:
            return Path(snapshot_download(hub_id, allow_patterns=[*_SMALL, *_SAFETENSORS], local_files_only=True))
        except Exception:
            raise unreachable from None  # it says more: no such model, no permission, no network
    weights = _SAFETENSORS if any(_is_safetensors(name) for name in names) else _PICKLES
    return Path(snapshot_download(hub_id, allow_patterns=[*_SMALL, *weights]))


def _is_safetensors(name: str) -> bool:
    return name == "model.safetensors" or (name.startswith("model-") and name.endswith(".safetensors"))
