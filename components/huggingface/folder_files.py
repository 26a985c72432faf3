"""The files of a Hugging Face LLaVA folder besides its weights: config, tokenizer, processor, chat template, generation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from components.data import Preparation
from components.decoder.architecture import architecture
from components.huggingface.layout import DECODING_KEY, TEMPLATE_KEY

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROW_MULTIPLE = 64
"""Tables that grow have a multiple of this many rows, as in the llava-hf releases."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of an export, and the rows of its tables.

    Args:
        tokenizer: The decoder's, with tokens for pictures and padding.
        image_token_id: Id of `<image>`.
        pad_token_id: Id of `<pad>`.
        rows: Rows of the embedding table and of the head, at least one for each token.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    pad_token_id: int
    rows: int


def extend(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Give a tokenizer the tokens that the layout needs, where it lacks them.

    Args:
        tokenizer: The decoder's tokenizer; it is changed.
        rows: Rows that the decoder's tables have now.
    """
    pad = tokenizer.pad_token
    if pad is None or pad in (tokenizer.eos_token, tokenizer.unk_token):  # padding must not be a word that is also said
        pad = PAD_TOKEN
    known = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, pad) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    tokenizer.pad_token = pad
    image_id, pad_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, pad])
    needed = max(image_id, pad_id) + 1
    return Vocabulary(tokenizer, image_id, pad_id, rows if needed <= rows else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE)


def write_config(
    folder: Path, model: Any, vocabulary: Vocabulary, layers: int, dtype: torch.dtype, preparation: Preparation
) -> None:
    """config.json, readable by transformers 4 and 5.

    Args:
        folder: Where it is written.
        model: A VisionLanguageModel.
        vocabulary: Tokens and rows.
        layers: Layers of the vision tower in the export.
        dtype: Number format of the weights.
        preparation: How samples were prepared in training.
    """
    tower = model.vision_tower
    # dictionaries, never the live config: transformers writes into a config that is handed to a second model
    text = architecture(model.decoder.config).to_dict()
    text |= {"vocab_size": vocabulary.rows, "pad_token_id": vocabulary.pad_token_id}
    text |= {"bos_token_id": vocabulary.tokenizer.bos_token_id, "eos_token_id": vocabulary.tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=tower.huggingface_config(layers),
        text_config=text,
        image_token_index=vocabulary.image_token_id,
        image_seq_length=tower.num_patches,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=tower.feature_layer % tower.num_layers - layers,
        vision_feature_select_strategy="default" if tower.has_class_token else "full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    content = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], DECODING_KEY: preparation.decoding}
    content[TEMPLATE_KEY] = preparation.template
    content |= {"pad_token_id": vocabulary.pad_token_id}
    name = str(dtype).removeprefix("torch.")
    for section in (content, content["text_config"], content["vision_config"]):
        section |= {"dtype": name, "torch_dtype": name}  # transformers 5, transformers 4
    _add_rope_of_transformers_4(content["text_config"])
    _write_json(folder / "config.json", content)


def write_processor(folder: Path, model: Any, vocabulary: Vocabulary, preparation: Preparation, chat_template: str) -> None:
    """Tokenizer, image processor and chat template, readable by transformers 4 and 5.

    Args:
        folder: Where they are written.
        model: A VisionLanguageModel.
        vocabulary: Tokens and rows.
        preparation: How pictures become squares.
        chat_template: The conversation template in Jinja.
    """
    tower = model.vision_tower
    size = tower.image_size
    side = {"height": size, "width": size}
    colors: dict[str, Any] = {"image_mean": list(tower.mean), "image_std": list(tower.std)}
    if preparation.image_mode == "pad":
        images: Any = LlavaImageProcessor(do_pad=True, size={"shortest_edge": size}, crop_size=side, **colors)
    elif preparation.image_mode == "crop":
        images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=side, **colors)
    else:
        images = SiglipImageProcessor(size=side, resample=3, do_convert_rgb=True, **colors)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=vocabulary.tokenizer,
        patch_size=tower.huggingface_config(tower.num_layers)["patch_size"],
        vision_feature_select_strategy="default" if tower.has_class_token else "full",
        num_additional_image_tokens=1 if tower.has_class_token else 0,
        chat_template=chat_template,
    )
    processor.save_pretrained(folder)
    # transformers 4 reads the image processor from a file of its own, and knows no TokenizersBackend
    _write_json(folder / "preprocessor_config.json", images.to_dict() | {"processor_class": "LlavaProcessor"})
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "chat_template": chat_template}
    stated.pop("backend", None)
    _write_json(folder / "tokenizer_config.json", stated)
    specials = {key: str(token) for key, token in vocabulary.tokenizer.special_tokens_map.items() if isinstance(token, str)}
    _write_json(folder / "special_tokens_map.json", specials)


def write_generation(folder: Path, vocabulary: Vocabulary, end_token_id: int) -> None:
    """generation_config.json: greedy, until the end token of the conversation template."""
    GenerationConfig(
        bos_token_id=vocabulary.tokenizer.bos_token_id,
        eos_token_id=end_token_id,
        pad_token_id=vocabulary.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)


def _add_rope_of_transformers_4(text: dict[str, Any]) -> None:
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        others = {key: value for key, value in rope.items() if key != "rope_theta"}
        text["rope_scaling"] = others if others.get("rope_type", "default") != "default" else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
