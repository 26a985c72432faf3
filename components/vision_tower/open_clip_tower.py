"""Vision towers: the patch features of an open_clip image encoder, as LLaVA reads them (arXiv 2304.08485, section 4.1)."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, UInt8
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.pretrained import download_pretrained
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import PatchEmbed
from torch import Tensor, nn

from components.errors import RecipeError
from components.hub import fetch, looks_like_hub_id
from components.named_tensors import NamedTensors, Paired, Pairing, Renamed, assign, fill
from components.vision_tower.base import VisionTower
from components.vision_tower.hugging_face import CLIP, FINAL_NORM, SIGLIP, Family, blocks_of, config_of
from components.vision_tower.weights import Split, demand_fit, folder_tensors, open_clip_tensors, their_shapes

KEY = "model.vision_tower.init_args.pretrained"
CLIP_TABLE = "positional_embedding"
REQUIRED_CONFIG_KEYS = ("image_size", "patch_size", "width", "layers", "head_width")
OPTIONAL_CONFIG_KEYS = ("mlp_ratio", "quick_gelu")


class OpenClipTower(VisionTower):
    """Pictures in, patch features of one open_clip vision transformer block out (CLIP; SigLIP and others through timm).

    Only what the features need is built: no text tower, no block after `feature_layer`, no final norm, pooling or projection.

    Args:
        model_name: Name of an open_clip model, such as ViT-L-14 or ViT-SO400M-14-SigLIP-384. OpenAI's weights need the names
            that end in -quickgelu. Exactly one of `model_name` and `config` is stated.
        pretrained: An open_clip tag of `model_name`, such as openai; a checkpoint file (.pt, .pth, .bin, .safetensors) of a whole
            open_clip model or of its vision tower; or a folder or hub id of a Hugging Face CLIP, SigLIP or LLaVA model, such as
            openai/clip-vit-large-patch14-336. A file does not tell its activation or colours: those of `model_name` hold (a mean
            on which all its tags agree, else OpenAI's); a folder's must agree, but that the first SigLIP models run with the exact
            GELU here and with its tanh approximation in transformers. CLIP's position table is resized to the tower's picture
            size. null: random weights.
        config: An architecture instead of a name: image_size and patch_size in pixels, width, layers, head_width, and
            optionally mlp_ratio (default 4.0) and quick_gelu (default false).
        feature_layer: Index of the block whose output is used, without a norm, as a Python index: -2 is the last but one, as in
            LLaVA. Legal range: -layers to layers - 1.

    Raises:
        RecipeError: Unknown name, tag, file or config key, or weights that were trained with another activation.

    Source: LLaVA `clip_encoder.py` (`hidden_states[-2][:, 1:]` of transformers' CLIPVisionModel), matched to 1e-5 by a test.
    """

    def __init__(
        self,
        model_name: str | None = None,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        feature_layer: int = -2,
    ) -> None:
        super().__init__()
        if model_name is not None and config is None:
            self._architecture = _named_architecture(model_name)
        elif config is not None and model_name is None:
            self._architecture = _stated_architecture(config)
        else:
            raise RecipeError(f"The vision tower has model_name: {model_name} and config: {config}. State exactly one of them.")
        self.model_name = model_name
        self.pretrained = pretrained
        self.feature_layer = feature_layer
        self._tag = _pretrained_tag(model_name, pretrained, self._architecture)
        self.mean, self.std = _normalisation(model_name, self._tag)

        with torch.device("meta"):
            visual = self._whole_tower()
        if isinstance(visual, TimmModel):
            self.num_patches, self.feature_dim = visual.trunk.patch_embed.num_patches, visual.trunk.embed_dim
        else:
            self.num_patches, self.feature_dim = visual.grid_size[0] * visual.grid_size[1], visual.transformer.width
        self.image_size = visual.image_size[0]
        self.has_class_token = not isinstance(visual, TimmModel)
        self._shapes = _shapes(visual.state_dict())
        self.num_layers = layers = len(blocks_of(visual))
        if not -layers <= feature_layer < layers:
            raise RecipeError(
                f"feature_layer {feature_layer} of the vision tower does not exist: {model_name or 'the config'} has {layers} "
                f"blocks. Choose {-layers} to {layers - 1}."
            )

    def build(self) -> None:
        """Creates the blocks up to `feature_layer` and what feeds them, with random weights."""
        visual = self._whole_tower()
        # parameters that never run would still be sharded, gathered and saved
        keep = [self.feature_layer % self.num_layers]
        if isinstance(visual, TimmModel):
            visual.trunk.prune_intermediate_layers(keep, prune_norm=True, prune_head=True)
            visual.head = nn.Identity()
        else:
            visual.prune_intermediate_layers(keep, prune_norm=True, prune_head=True)
            visual.attn_pool = visual.attn_pool_contrastive = None
        self.visual = visual

    @property
    def has_weights(self) -> bool:
        """Whether `pretrained` is stated."""
        return self.pretrained is not None

    def load_weights(self) -> None:
        """Reads `pretrained` into the built layers, which must be in memory; they may be sharded already.

        Raises:
            RecipeError: The weights cannot be fetched or read, or are of another architecture.
        """
        if self.pretrained is None:
            return
        state = self.visual.state_dict()
        given: NamedTensors
        if self._is_folder():
            given = Renamed(Paired(self._folder_tensors(), self.huggingface_names()), lambda name: name.removeprefix("visual."))
        else:
            given = self._file_tensors()
            unused = self._shapes.keys() - state.keys()
            needed = Renamed(given, lambda name: None if name in unused else name)
            demand_fit(needed, _shapes(state), CLIP_TABLE, self.pretrained)
        if (table := state.pop(CLIP_TABLE, None)) is not None:
            assign(table, self._resized(given.read(CLIP_TABLE)))
        fill(state, given)

    def forward(self, pixels: UInt8[Tensor, "images 3 size size"]) -> Float[Tensor, "images patches feature_dim"]:
        """Patch features, in reading order, of pictures that are normalised here, on the device."""
        # numbers instead of buffers: nothing to restore after a meta build, nothing to copy to the device
        channels = [(pixels[:, c].float() / 255 - self.mean[c]) / self.std[c] for c in range(3)]
        images = torch.stack(channels, dim=1).to(next(self.visual.parameters()).dtype)
        features = self.visual.forward_intermediates(
            images, indices=[-1], normalize_intermediates=False, intermediates_only=True, output_fmt="NLC"
        )
        return features["image_intermediates"][0]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks up to `feature_layer`."""
        return blocks_of(self.visual)

    def huggingface_names(self) -> list[Pairing]:
        """Our tensors and transformers' names of them; the layers need not be built."""
        self.huggingface_config(self.num_layers)  # or an error: the names alone do not tell
        used = self._family.pairings(self.feature_layer % self.num_layers + 1)
        return [pair for pair in used if not pair.theirs[0].startswith(FINAL_NORM)]

    def huggingface_config(self, layers: int) -> dict[str, Any]:
        """The `vision_config` of CLIPVisionModel, or of SiglipVisionModel for towers that come through timm."""
        with torch.device("meta"):
            visual = self._whole_tower()
        is_large_14 = isinstance(visual, VisionTransformer) and (self.feature_dim, visual.patch_size[0]) == (1024, 14)
        # a tower with a config has no projection; the published value keeps what an export of CLIP L/14 says the same
        return config_of(visual, layers, 768 if is_large_14 else self._architecture["embed_dim"])

    def unused_weights(self) -> NamedTensors | None:
        """The blocks after `feature_layer` and the final norm, from `pretrained`."""
        used = {pair.ours for pair in self.huggingface_names()}
        if self.pretrained is None:
            return None
        unused = [pair for pair in self._family.pairings(self.num_layers) if pair.ours not in used]
        if self._is_folder():
            names = {name for pair in unused for name in pair.theirs}
            return Renamed(self._folder_tensors(), lambda name: name if name in names else None)
        shapes = {pair.ours: self._shapes[pair.ours.removeprefix("visual.")] for pair in unused}
        given = Renamed(self._file_tensors(), lambda name: f"visual.{name}" if f"visual.{name}" in shapes else None)
        demand_fit(given, shapes, None, self.pretrained)
        return Split(given, unused)

    @property
    def _family(self) -> Family:
        return CLIP if self.has_class_token else SIGLIP

    def _is_folder(self) -> bool:
        """Whether `pretrained` is a Hugging Face folder or hub id."""
        pretrained = str(self.pretrained)
        if self._tag is not None or Path(pretrained).is_file():
            return False
        return Path(pretrained).is_dir() or (looks_like_hub_id(pretrained) and not _is_file_name(pretrained))

    def _folder_tensors(self) -> NamedTensors:
        """The tensors of the folder's whole encoder under transformers' names; its config and shapes are checked."""
        ours = self.huggingface_config(self.num_layers)
        shapes = their_shapes(
            self._family.pairings(self.num_layers), {f"visual.{name}": shape for name, shape in self._shapes.items()}
        )
        colors = {"image_mean": self.mean, "image_std": self.std}
        return folder_tensors(fetch(str(self.pretrained), KEY), ours, shapes, colors, KEY)

    def _file_tensors(self) -> NamedTensors:
        """The tensors of the tag's or the stated checkpoint file, named as in `visual`."""
        return open_clip_tensors(Path(self._checkpoint_file()), str(self.pretrained))

    def _resized(self, table: Tensor) -> Tensor:
        """CLIP's position table for this tower's picture size."""
        holder = {f"visual.{CLIP_TABLE}": table.float()}
        resize_pos_embed(holder, self)
        return holder[f"visual.{CLIP_TABLE}"]

    def _whole_tower(self) -> VisionTransformer | TimmModel:
        visual = _build_vision_tower(**self._architecture)
        if isinstance(visual, VisionTransformer):
            return visual
        # a convolutional stem (BatchNorm) or a computed table (rotary positions, lost by a meta build) has no place here
        is_plain = isinstance(visual, TimmModel) and isinstance(getattr(visual.trunk, "patch_embed", None), PatchEmbed)
        if is_plain and hasattr(visual.trunk, "blocks") and not list(visual.buffers()):
            return visual
        raise RecipeError(
            f"The open_clip model {self.model_name} is no plain vision transformer (convolutions, windows or rotary positions). "
            f"Choose a model such as ViT-L-14-336-quickgelu or ViT-SO400M-14-SigLIP-384."
        )

    def _checkpoint_file(self) -> str:
        if self._tag is None:
            if not Path(str(self.pretrained)).is_file():
                raise RecipeError(
                    f"The vision tower's weights '{self.pretrained}' are not a file, nor a folder or hub id. Correct the path, "
                    f"or state an open_clip tag."
                )
            return str(self.pretrained)
        try:
            return download_pretrained(self._tag)
        except OSError as error:
            raise RecipeError(
                f"The vision tower's weights '{self.pretrained}' could not be fetched: {error}. Fetch them once where the network "
                f"is reachable (they are cached), or state a checkpoint file or folder."
            ) from error


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _is_file_name(pretrained: str) -> bool:
    return Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors")


def _suggest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=5, cutoff=0.5)
    return f"Close matches: {', '.join(close)}." if close else f"Known: {', '.join(known)}."


def _named_architecture(model_name: str) -> dict[str, Any]:
    # the list first: open_clip would take names that are web addresses or folders
    if model_name not in open_clip.list_models():
        raise RecipeError(f"open_clip has no model named '{model_name}'. {_suggest(model_name, open_clip.list_models())}")
    config = open_clip.get_model_config(model_name)
    # every patch is a visual token, and weights come from `pretrained` alone
    vision = {**config["vision_cfg"], "patch_dropout": 0.0, "timm_model_pretrained": False}
    return {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": config.get("quick_gelu", False)}


def _stated_architecture(config: dict[str, Any]) -> dict[str, Any]:
    legal = [*REQUIRED_CONFIG_KEYS, *OPTIONAL_CONFIG_KEYS]
    for key in config:
        if key not in legal:
            raise RecipeError(f"The vision tower's config has the unknown key '{key}'. {_suggest(key, legal)}")
    missing = [key for key in REQUIRED_CONFIG_KEYS if key not in config]
    if missing:
        raise RecipeError(f"The vision tower's config lacks {', '.join(missing)}. It needs {', '.join(REQUIRED_CONFIG_KEYS)}.")
    for whole, part in (("width", "head_width"), ("image_size", "patch_size")):
        if config[whole] % config[part]:
            raise RecipeError(
                f"The vision tower's {whole} {config[whole]} is no multiple of its {part} {config[part]}. Change one of them."
            )
    vision = {key: value for key, value in config.items() if key != "quick_gelu"}
    return {"embed_dim": config["width"], "vision_cfg": vision, "quick_gelu": config.get("quick_gelu", False)}


def _pretrained_tag(model_name: str | None, pretrained: str | None, architecture: dict[str, Any]) -> dict[str, Any] | None:
    """What open_clip knows of the tag; None when `pretrained` is null or a file."""
    if pretrained is None:
        return None
    looks_like_file = "/" in pretrained or _is_file_name(pretrained)
    if model_name is None:
        if looks_like_file:
            return None
        raise RecipeError(
            f"pretrained '{pretrained}' is no checkpoint file. A vision tower with a config has no tags: state a path or a hub id."
        )
    base_name = model_name.removesuffix("-quickgelu")
    tag = open_clip.get_pretrained_cfg(model_name, pretrained) or open_clip.get_pretrained_cfg(base_name, pretrained)
    if not tag:
        if looks_like_file:
            return None
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        raise RecipeError(f"open_clip has no weights '{pretrained}' for {model_name}. {_suggest(pretrained, tags)}")
    wants_quick_gelu = tag.get("quick_gelu", False)
    if wants_quick_gelu != architecture["quick_gelu"]:
        activation, other_name = ("QuickGELU", f"{base_name}-quickgelu") if wants_quick_gelu else ("GELU", base_name)
        has_other = other_name != model_name and other_name in open_clip.list_models()
        raise RecipeError(
            f"The weights '{pretrained}' were trained with {activation}, which {model_name} does not use: its features would be "
            f"wrong without any other sign. {f'State model_name: {other_name}' if has_other else 'Choose other weights'}."
        )
    return tag


def _normalisation(
    model_name: str | None, tag: dict[str, Any] | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std of the tag; without one, those on which all tags of the model agree, else OpenAI's."""
    if tag is not None:
        return tuple(tag["mean"]), tuple(tag["std"])
    tags = [open_clip.get_pretrained_cfg(model_name, name) for name in open_clip.list_pretrained_tags_by_model(model_name)]
    stated = {(tuple(one["mean"]), tuple(one["std"])) for one in tags}
    return stated.pop() if len(stated) == 1 else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
