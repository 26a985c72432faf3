"""LLaVA folders: which of the known layouts one has, its tensors under one set of names, and what its config says.

Canonical names are those on disk of the public llava-hf models: `vision_tower.vision_model.*`, `multi_modal_projector.linear_1.*`,
`language_model.model.*`, `language_model.lm_head.weight`.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from components.decoder import without_adapters
from components.errors import RecipeError
from components.named_tensors import NamedTensors, Pairing, Renamed, TorchFiles, weights_in

TOWER, PROJECTOR, DECODER = "vision_tower.vision_model.", "multi_modal_projector.", "language_model."
PROJECTOR_FILE = "mm_projector.bin"
Layout = Literal["hugging_face", "original", "projector"]
DECODING_KEY, TEMPLATE_KEY = "image_decoding", "conversation_template"
"""Keys of an exported config.json that say what a processor does not: how pictures were decoded, and our name of the template."""

_RULES = tuple(
    (re.compile(pattern), canonical)
    for pattern, canonical in (
        (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
        (r"(?:model\.)?multi_modal_projector\.(.+)", rf"{PROJECTOR}\1"),
        (r"model\.language_model\.(.+)", rf"{DECODER}model.\1"),
        (r"language_model\.(.+)", rf"{DECODER}\1"),
        (r"(model\..+|lm_head\..+)", rf"{DECODER}\1"),
    )
)
"""Names of transformers 4 and 5, in memory and on disk, and of the original code."""

_ORIGINAL_PROJECTOR = re.compile(r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.(\d+)\.(weight|bias)")
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")
"""Tensors of old files that are computed, not learned."""


def canonical(name: str) -> str | None:
    """A tensor's name in any layout in, its canonical name out; None for what is computed."""
    if name.endswith(_COMPUTED):
        return None
    if found := _ORIGINAL_PROJECTOR.fullmatch(name):
        return f"{PROJECTOR}linear_{int(found[1]) // 2 + 1}.{found[2]}"
    for pattern, new in _RULES:
        if found := pattern.fullmatch(name):
            return found.expand(new)
    return name


def pairings(model: Any) -> list[Pairing]:
    """Which canonical tensors make up which of a built model's; the model may be on the meta device.

    Args:
        model: A VisionLanguageModel.

    Raises:
        RecipeError: A part has no place in the layout.
    """
    tower = [
        Pairing(f"vision_tower.{p.ours}", tuple(TOWER + name for name in p.theirs), p.leading_one)
        for p in model.vision_tower.huggingface_names()
    ]
    projector, decoder = [], []
    for name in without_adapters(model.state_dict()):
        if found := re.fullmatch(r"projector\.layers\.(\d+)\.(weight|bias)", name):
            projector.append(Pairing(name, (f"{PROJECTOR}linear_{int(found[1]) // 2 + 1}.{found[2]}",)))
        elif name.startswith("projector."):
            raise RecipeError(
                f"The projector {type(model.projector).__name__} has no place in the LLaVA layout, which holds linear layers alone."
            )
        elif name.startswith("decoder."):
            inner = name.removeprefix("decoder.lm.")
            if not inner.startswith(("model.", "lm_head.")):
                raise RecipeError(f"The decoder's {inner} has no place in the LLaVA layout, whose decoders are like LLaMA.")
            if not (inner == "lm_head.weight" and tied(model)):
                decoder.append(Pairing(name, (DECODER + inner,)))
    return tower + projector + decoder


def tied(model: Any) -> bool:
    """Whether the decoder's head is its embedding table."""
    return bool(model.decoder.lm.config.tie_word_embeddings)


@dataclass(frozen=True)
class LlavaFolder:
    """What a LLaVA folder holds.

    Args:
        folder: The folder.
        layout: `hugging_face`, `original` (of the first LLaVA code), or `projector` (a lone mm_projector.bin).
        tensors: Its tensors under canonical names.
        config: Its config.json; empty for a lone projector.
        text_config: What the config says of the decoder.
    """

    folder: Path
    layout: Layout
    tensors: NamedTensors
    config: dict[str, Any]
    text_config: PreTrainedConfig | None = None

    def holds(self, prefix: str) -> bool:
        """Whether any tensor of a part is there."""
        return any(name.startswith(prefix) for name in self.tensors.infos)

    @property
    def feature_block(self) -> int | None:
        """The index of the vision transformer block whose output is used, counted from the end (-1 is the last)."""
        layer = self.config.get("vision_feature_layer" if self.layout == "hugging_face" else "mm_vision_select_layer", -2)
        if self.layout == "projector" or not isinstance(layer, int) or (self.layout == "original" and layer >= 0):
            return None
        # transformers counts the embeddings as layer 0
        return layer if layer < 0 else layer - 1 - self.config["vision_config"]["num_hidden_layers"]


def open_llava(folder: Path, key: str) -> LlavaFolder:
    """A folder in, its layout, config and tensors out; no tensor is read.

    Args:
        folder: The folder.
        key: The option that named it, for the error messages.

    Raises:
        RecipeError: It is no LLaVA folder, or a file in it cannot be read.
    """
    file = folder / "config.json"
    projector = folder / PROJECTOR_FILE
    if not file.is_file():
        if projector.is_file():
            return LlavaFolder(folder, "projector", Renamed(TorchFiles([projector]), canonical), {})
        raise RecipeError(f"{key}: {folder} has no config.json. Name a folder or hub id of a LLaVA model.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError(f"{key}: {file} is not JSON: {error}. Fetch it again.") from error
    layout: Layout
    text: PreTrainedConfig | None
    try:
        if "vision_config" in config and "text_config" in config:
            # transformers writes into the dictionaries it is given
            parsed: Any = LlavaConfig(**copy.deepcopy(config))
            config = {**config, "vision_config": parsed.vision_config.to_dict()}
            layout, text = "hugging_face", parsed.text_config
        elif "mm_hidden_size" in config or "mm_projector_type" in config:
            layout, text = "original", _original_text_config(config, f"{key}: {file}")
        else:
            raise RecipeError(
                f"{key}: {folder} is a {config.get('model_type')} model, not a LLaVA model. Name a decoder's folder as "
                "model.decoder.init_args.weights, a vision tower's as model.vision_tower.init_args.pretrained."
            )
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{key}: {file} is not a LLaVA config: {str(error).splitlines()[0]}") from error
    found = weights_in(folder)
    sources = [found] if found else []
    has_projector = found is not None and any((canonical(name) or "").startswith(PROJECTOR) for name in found.infos)
    if projector.is_file() and not has_projector:
        sources.append(TorchFiles([projector]))
    if not sources:
        raise RecipeError(f"{key}: {folder} holds no weights (*.safetensors, pytorch_model*.bin or {PROJECTOR_FILE}).")
    lone = layout == "original" and found is None
    tensors = Joined([Renamed(source, canonical) for source in sources], str(folder))
    return LlavaFolder(folder, "projector" if lone else layout, tensors, config, None if lone else text)


def preprocessing(folder: Path) -> dict[str, Any]:
    """What a folder says of its image processor, which transformers 4 and 5 write into different files; empty if nothing."""
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            stated = json.loads((folder / name).read_text())
            return (stated.get(section) or {}) if section else stated
    return {}


def vision_config(folder: Path) -> dict[str, Any]:
    """The config of a CLIP or SigLIP folder's vision tower.

    Raises:
        RecipeError: The folder has none.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"{folder} has no config.json of a vision tower: {str(error).splitlines()[0]}") from error
    return getattr(config, "vision_config", config).to_dict()


def _original_text_config(config: dict[str, Any], where: str) -> PreTrainedConfig:
    """The decoder's config among the original's, where the keys of both stand side by side."""
    kinds = [name for name in config.get("architectures") or [] if name.startswith("Llava")]
    kind = "mistral" if any("Mistral" in name for name in kinds) else "llama"
    if kinds and not any(known in kinds[0] for known in ("LlavaLlama", "LlavaMistral")):
        raise RecipeError(f"{where}: decoders of {kinds[0]} are not supported. Use a model on LLaMA or Mistral.")
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    return AutoConfig.for_model(kind, **copy.deepcopy({name: value for name, value in config.items() if name in known}))


class Joined(NamedTensors):
    """The tensors of several sources together.

    Args:
        sources: The sources.
        where: Their common place, for messages.
    """

    def __init__(self, sources: list[NamedTensors], where: str) -> None:
        self.where = where
        self._source_of = {name: source for source in sources for name in source.infos}
        self.infos = {name: source.infos[name] for name, source in self._source_of.items()}

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self._source_of[name].read(name)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor."""
        return self._source_of[name].read_rows(name, rows)
