"""Model folders: a local one as it is, one on the Hugging Face hub fetched once into its cache."""

import re
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from components.errors import RecipeError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = ["*.json", "*.jinja", "*.model", "tokenizer*", "mm_projector.bin"]
"""Configs, tokenizers, processors, and the projector of original LLaVA releases."""


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is not on this disk may be a hub id, `organization/name`."""
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith(".") and not Path(source).exists()


def fetch(source: str, key: str) -> Path:
    """A folder with a model's files.

    Args:
        source: A folder, which is returned as it is, or a hub id. Of a hub model only configs, tokenizer and weights are fetched:
            safetensors where it has them, else PyTorch files.
        key: The option that named it, for the error message.

    Raises:
        RecipeError: Neither is there.
    """
    if Path(source).is_dir():
        return Path(source)
    if not looks_like_hub_id(source):
        raise RecipeError(f"{key}: {source} is neither a folder nor a hub id (organization/name). Correct it.")
    try:
        return _download(source)
    except (OSError, ValueError) as error:  # what huggingface_hub raises without network, model or permission
        raise RecipeError(
            f"{key}: {source} is no folder here and could not be fetched from the Hugging Face hub. Fetch it once where the network "
            f"is reachable (it is cached), or name a local folder.\n{str(error).strip().splitlines()[0][:200]}"
        ) from error


def _download(hub_id: str) -> Path:
    try:
        names = list_repo_files(hub_id)
    except OSError:  # without network: what an earlier fetch has left in the cache
        return Path(snapshot_download(hub_id, local_files_only=True))
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
    return Path(snapshot_download(hub_id, allow_patterns=[*_SMALL, weights]))
