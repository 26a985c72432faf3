"""Small released LLaVA models, made by transformers: in Hugging Face's layout, and the same weights in the original one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from components.shapes_world import WORDS
from components.tokenizer import WordTokenizer

SIZE, PATCH, LAYERS = 16, 8, 3
VISION = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": PATCH, "hidden_act": "quick_gelu", "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


def tokenizer(with_image: bool) -> PreTrainedTokenizerBase:
    built = WordTokenizer(list(WORDS)).build()
    if with_image:
        built.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")])
        built.pad_token = "<pad>"
    return built


WORDS_KNOWN = len(tokenizer(with_image=False))
ROWS = -(-(WORDS_KNOWN + 2) // 64) * 64


def hugging_face_folder(folder: Path, dtype: torch.dtype = torch.float16, shards: int = 2, **changes: Any) -> Path:
    """A folder like llava-hf/llava-1.5-7b-hf, with random weights that are large enough for everything to matter."""
    text = LlamaConfig(**TEXT, vocab_size=ROWS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION).to_dict(), text_config=text.to_dict(), image_token_index=WORDS_KNOWN,
        image_seq_length=(SIZE // PATCH) ** 2, **changes,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        value = noise * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1 + noise / 10
        state[disk_name(name)] = value.to(dtype)
    folder.mkdir(parents=True)
    names = list(state)
    parts = [names[number::shards] for number in range(shards)]
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    images = LlavaImageProcessor(do_pad=True, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(with_image=True), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def disk_name(name: str) -> str:
    """transformers' name in memory in, the name in the llava-hf releases out."""
    for memory, disk in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(memory):
            return disk + name.removeprefix(memory).removeprefix("vision_model.")
    raise AssertionError(name)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def original_folder(folder: Path, hugging_face: Path, projector_apart: bool = False) -> Path:
    """The same weights like liuhaotian/llava-v1.5-7b: pickled shards, no tower, tables without rows for pictures and padding."""
    state = {}
    for name, tensor in state_of(hugging_face).items():
        if name.startswith("language_model."):
            rows = tensor[:WORDS_KNOWN] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
            state[name.removeprefix("language_model.")] = rows.clone()
        elif name.startswith("multi_modal_projector."):
            layer, kind = name.removeprefix("multi_modal_projector.").split(".")
            state[f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{kind}"] = tensor
    folder.mkdir(parents=True)
    if projector_apart:
        projector = {name: state.pop(name) for name in list(state) if "mm_projector" in name}
        torch.save(projector, folder / "mm_projector.bin")
    names = list(state)
    files = [f"pytorch_model-{number}-of-00002.bin" for number in ("00001", "00002")]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(files, (names[::2], names[1::2]), strict=True) for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tower = clip_folder(folder.with_name(f"{folder.name}_clip"), hugging_face)
    config = {
        **LlamaConfig(**TEXT, vocab_size=WORDS_KNOWN).to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(tower), "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(with_image=False).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, hugging_face: Path) -> Path:
    """The tower alone, as openai/clip-vit-large-patch14-336 is laid out."""
    model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    prefix = "vision_tower.vision_model."
    state = {name.removeprefix(prefix): t.float() for name, t in state_of(hugging_face).items() if name.startswith(prefix)}
    model.load_state_dict({name: state[name.removeprefix("vision_model.")] for name in model.state_dict()})
    model.save_pretrained(folder)
    return folder
