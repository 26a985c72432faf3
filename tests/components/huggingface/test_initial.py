"""Released weights as the start of a recipe: both layouts alike, and refusals of what is not the recipe's model."""

import json

import pytest
import torch
from llava_folders import (
    LAYERS,
    PATCH,
    ROWS,
    SIZE,
    TEXT,
    VISION,
    WORDS_KNOWN,
    clip_folder,
    hugging_face_folder,
    original_folder,
    state_of,
)
from safetensors.torch import save_file
from tiny import tiny_document
from transformers import LlavaForConditionalGeneration

from components.batch import IMAGE_TOKEN_ID, pack
from components.decoder import HuggingFaceDecoder
from components.errors import RecipeError
from components.projector import MLP
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates, VisionLanguageModel

TOWER = {
    "image_size": SIZE, "patch_size": PATCH, "width": VISION["hidden_size"], "layers": LAYERS, "head_width": 8, "mlp_ratio": 4.0,
    "quick_gelu": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("released")
    hf = hugging_face_folder(place / "hf", dtype=torch.float32)
    return {
        "hf": hf,
        "original": original_folder(place / "original", hf),
        "apart": original_folder(place / "apart", hf, projector_apart=True),
    }


def model_of(rows, initial_weights, tower=TOWER, pretrained=None, text=TEXT, depth=2, **decoder):
    return VisionLanguageModel(
        vision_tower=OpenClipTower(config=tower, pretrained=pretrained, feature_layer=-2),
        projector=MLP(depth=depth),
        decoder=HuggingFaceDecoder({"model_type": "llama", **text, "vocab_size": rows}, WordTokenizer(), **decoder),
        learning_rates=LearningRates(projector=1e-3, decoder=1e-3),
        initial_weights=str(initial_weights),
    )


def loaded(*arguments, **options):
    model = model_of(*arguments, **options)
    model.configure_model()
    return model.eval()


def documents():
    return [tiny_document(9, (0,)), tiny_document(7, (3,)), tiny_document(5)]


def test_both_layouts_give_the_same_logits_as_transformers(folders):
    """Ours from either layout, and transformers from its own, in float32."""
    batch = pack(documents())
    ours = loaded(ROWS, folders["hf"])(batch)
    theirs = LlavaForConditionalGeneration.from_pretrained(folders["hf"], dtype=torch.float32).eval()
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (OpenClipTower(config=TOWER).mean, OpenClipTower(config=TOWER).std)
    )
    expected = []
    for document in documents():
        ids = torch.from_numpy(document.input_ids).masked_fill(torch.from_numpy(document.input_ids == IMAGE_TOKEN_ID), WORDS_KNOWN)
        pixels = (torch.from_numpy(document.pixels) / 255 - mean) / std
        inputs = {"pixel_values": pixels} if len(pixels) else {}
        with torch.no_grad():
            logits = theirs(input_ids=ids[None], **inputs).logits[0]
        expected.append(logits[:-1][torch.from_numpy(document.labels[1:] >= 0)])
    assert (ours - torch.cat(expected)).abs().max() <= 1e-5 * ours.abs().max()
    for name in ("original", "apart"):
        tower = folders[name].with_name(f"{name}_clip")
        other = loaded(WORDS_KNOWN, folders[name], pretrained=str(tower))(batch)
        assert (other - ours[:, :WORDS_KNOWN]).abs().max() <= 1e-5 * ours.abs().max()


def test_a_lone_projector_leaves_the_other_parts_to_their_own_weights(folders, tmp_path):
    clip = clip_folder(tmp_path / "clip", folders["hf"])
    original = folders["original"]
    decoder = tmp_path / "decoder"
    theirs = LlavaForConditionalGeneration.from_pretrained(folders["hf"], dtype=torch.float32)
    save_file({"lm_head.weight": theirs.lm_head.weight.detach(), **{
        f"model.{name}": tensor.contiguous() for name, tensor in theirs.model.language_model.state_dict().items()
    }}, write_folder(decoder, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT, "vocab_size": ROWS}),
        metadata={"format": "pt"})  # fmt: skip
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "mm_projector.bin").write_bytes((folders["apart"] / "mm_projector.bin").read_bytes())
    one = loaded(ROWS, lone, pretrained=str(clip), weights=str(decoder))
    other = loaded(ROWS, folders["hf"])
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    with pytest.raises(RecipeError, match=r"holds no decoder.*State model.decoder.init_args.weights"):
        loaded(ROWS, lone, pretrained=str(clip))
    with pytest.raises(RecipeError, match=r"holds no vision tower.*State model.vision_tower.init_args.pretrained"):
        loaded(WORDS_KNOWN, original)


def write_folder(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def copied(folder, target, tensors=None, **config):
    """A copy of a folder with other tensors and config values; `vision_config={...}` changes single values inside."""
    target.mkdir()
    stated = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        stated[key] = {**stated[key], **value} if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(stated))
    save_file(state_of(folder) if tensors is None else tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, r"vision_config.hidden_act: gelu there, quick_gelu in the recipe"),
        ({"vision_config": {"image_size": 24}}, r"vision_config.image_size: 24 there, 16 in the recipe"),
        ({"projector_hidden_act": "relu"}, r"projector_hidden_act: relu there, gelu in the recipe"),
        ({"vision_feature_layer": -1}, r"block of the vision tower that is used: 2 there, 1 in the recipe"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer: \[-2, -1\] there, one layer counted from the end"),
        ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy: full there, default in the recipe"),
        ({"text_config": {"rms_norm_eps": 1e-6}}, r"rms_norm_eps: 1e-05 in the recipe, 1e-06 there"),
    ],
)
def test_another_model_is_refused_by_its_config(changes, message, folders, tmp_path):
    folder = copied(folders["hf"], tmp_path / "other", **changes)
    with pytest.raises(RecipeError, match=rf"(?s)model.initial_weights: .*is not the model of the recipe:.*{message}"):
        loaded(ROWS, folder)


def test_another_vocabulary_is_refused_with_the_remedy(folders):
    with pytest.raises(RecipeError, match=rf"vocab_size: {WORDS_KNOWN} in the recipe, {ROWS} there\n.*and its tokenizer"):
        loaded(WORDS_KNOWN, folders["hf"])


def test_other_colors_are_refused(folders, tmp_path):
    folder = copied(folders["hf"], tmp_path / "other")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(RecipeError, match=r"image_mean: \(0.5, 0.5, 0.5\) there, \(0.48"):
        loaded(ROWS, folder)


def test_a_missing_projector_never_starts_at_random(folders, tmp_path):
    kept = {name: tensor for name, tensor in state_of(folders["hf"]).items() if not name.startswith("multi_modal")}
    with pytest.raises(RecipeError, match=r"holds no projector .* it would start from random weights"):
        loaded(ROWS, copied(folders["hf"], tmp_path / "other", kept))


def test_what_is_missing_unexpected_or_mismatched_is_listed(folders, tmp_path):
    state = state_of(folders["hf"])
    del state["language_model.model.norm.weight"]
    state["language_model.model.extra.weight"] = torch.zeros(2)
    state["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
    with pytest.raises(RecipeError) as caught:
        loaded(ROWS, copied(folders["hf"], tmp_path / "other", state))
    message = str(caught.value)
    assert "missing: language_model.model.norm.weight (32,)" in message
    assert "unexpected: language_model.model.extra.weight (2,)" in message
    assert "mismatched: multi_modal_projector.linear_1.bias is (7,), should be (32,)" in message


def test_a_file_cut_short(folders, tmp_path):
    folder = copied(folders["hf"], tmp_path / "other")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match=r"model.safetensors is damaged or cut short"):
        loaded(ROWS, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: linear there, mlp2x_gelu in the recipe"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: True there, False in the recipe"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size: 1024 there, 16 in the recipe"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: cls_patch there, patch in the recipe"),
        ({"mm_vision_select_layer": -1}, "block of the vision tower that is used: 2 there, 1 in the recipe"),
    ],
)
def test_another_original_model_is_refused(changes, message, folders, tmp_path):
    file = folders["original"] / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        with pytest.raises(RecipeError, match=message):
            loaded(WORDS_KNOWN, folders["original"], pretrained=str(folders["original"].with_name("original_clip")))
    finally:
        file.write_text(before)
