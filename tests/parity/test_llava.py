"""The whole model against transformers' LLaVA with the same weights, and against what the original LLaVA code computed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    ALL,
    DECODER_FROZEN,
    LLAMA,
    TOWER,
    TOWER_FROZEN,
    Prepared,
    Record,
    assert_equal,
    built_model,
    gradients,
    tiny_document,
    tiny_model,
    tiny_trainer,
)
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Document, pack
from components.decoder import HuggingFaceDecoder
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates

THEIR_IMAGE_TOKEN = LLAMA["vocab_size"]  # LLaVA's layout has an embedding row for it
PADDING = 0
DOCUMENTS = [
    tiny_document(7, (0,)),
    tiny_document(12, (5,)),
    tiny_document(5),
    tiny_document(9, (0, 4, 4)),
    tiny_document(6, (5,)),
]


def clip_names(state, layers, prefix=""):
    """Weights of our tower under transformers' names."""
    named = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
    }
    pairs = {"out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2"}
    where = {"out_proj": "attn.", "c_fc": "mlp.", "c_proj": "mlp."}
    for kind in ("weight", "bias"):
        named[f"pre_layrnorm.{kind}"] = state[f"ln_pre.{kind}"]
        for layer in range(layers):
            ours, theirs = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            for part, tensor in zip("qkv", state[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                named[f"{theirs}.self_attn.{part}_proj.{kind}"] = tensor
            for name, other in pairs.items():
                named[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{where.get(name, '')}{name}.{kind}"]
    return {prefix + name: tensor for name, tensor in named.items()}


def their_names(tensors):
    """Tensors of our parameters under the names of transformers' LLaVA."""
    visual = {name.removeprefix("vision_tower.visual."): t for name, t in tensors.items() if name.startswith("vision_tower.")}
    named = clip_names(visual, layers=TOWER["layers"], prefix="model.vision_tower.") if visual else {}
    for kind in ("weight", "bias"):
        named[f"model.multi_modal_projector.linear_1.{kind}"] = tensors[f"projector.layers.0.{kind}"]
        named[f"model.multi_modal_projector.linear_2.{kind}"] = tensors[f"projector.layers.2.{kind}"]
    for name, tensor in tensors.items():
        if name.startswith("decoder.lm.model."):
            named["model.language_model." + name.removeprefix("decoder.lm.model.")] = tensor
    named["lm_head.weight"] = tensors["decoder.lm.lm_head.weight"]
    return named


def with_image_row(named):
    """Their vocabulary has one more row, which nothing reads: slots are overwritten, and no label is an image token."""
    rows = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    return {name: torch.cat([t, torch.zeros_like(t[:1])]) if name in rows else t for name, t in named.items()}


@pytest.fixture(scope="module")
def theirs():
    vision = CLIPVisionConfig(
        image_size=TOWER["image_size"],
        patch_size=TOWER["patch_size"],
        hidden_size=TOWER["width"],
        intermediate_size=4 * TOWER["width"],
        num_hidden_layers=TOWER["layers"],
        num_attention_heads=TOWER["width"] // TOWER["head_width"],
        hidden_act="gelu",
    )
    text = LlamaConfig(**{**LLAMA, "vocab_size": LLAMA["vocab_size"] + 1})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=THEIR_IMAGE_TOKEN,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").train()


def load_ours_into(theirs, ours):
    """Every weight of ours has a place, and what of theirs stays as it was cannot matter."""
    state = with_image_row(their_names(ours.state_dict()))
    left_over = theirs.load_state_dict(state, strict=False)
    assert not left_over.unexpected_keys
    assert all("post_layernorm" in name for name in left_over.missing_keys)


def right_padded(documents, tower):
    """Their batch: one row for each document, padding masked, pictures normalised."""
    length = max(len(document.input_ids) for document in documents)
    ids = torch.full((len(documents), length), PADDING)
    labels = torch.full((len(documents), length), IGNORE_INDEX)
    mask = torch.zeros((len(documents), length), dtype=torch.int64)
    for row, document in enumerate(documents):
        size = len(document.input_ids)
        ids[row, :size] = torch.from_numpy(document.input_ids).masked_fill(
            torch.from_numpy(document.input_ids == IMAGE_TOKEN_ID), THEIR_IMAGE_TOKEN
        )
        labels[row, :size] = torch.from_numpy(document.labels)
        mask[row, :size] = 1
    pixels = torch.cat([torch.from_numpy(document.pixels) for document in documents]) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": (pixels - mean) / std if len(pixels) else None}, labels


@pytest.mark.parametrize("rates", [ALL, TOWER_FROZEN], ids=["tower_trained", "tower_frozen"])
@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[2:3]], ids=["mixed", "text_only"])
def test_logits_loss_and_gradients_equal_transformers(theirs, documents, rates):
    ours = built_model(rates)
    load_ours_into(theirs, ours)
    theirs.zero_grad(set_to_none=True)
    batch = pack(documents)

    logits = ours(batch)
    loss = ours.loss_sum(batch)
    loss.backward()

    inputs, labels = right_padded(documents, ours.vision_tower)
    output = theirs(**inputs)
    shifted = labels[:, 1:] != IGNORE_INDEX
    their_logits = output.logits[:, :-1][shifted][:, :-1]
    # the added row is no word of ours
    their_loss = functional.cross_entropy(their_logits, labels[:, 1:][shifted], reduction="sum")
    their_loss.backward()

    assert_equal({"logits": logits}, {"logits": their_logits})
    assert_equal({"loss": loss}, {"loss": their_loss})
    ours_named = their_names(gradients(ours))
    assert any("vision_tower" in name for name in ours_named) == (rates is ALL)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = {name: gradient for name, gradient in expected.items() if name in ours_named and "k_proj.bias" not in name}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert not expected[name][-1].any()
        expected[name] = expected[name][:-1]
    assert_equal({name: ours_named[name] for name in expected}, expected)
    for name in ours_named.keys() - expected.keys():
        # nothing reaches their tower and projector without a picture; ours get zeros, which keeps ranks together
        assert not ours_named[name].any()
        assert documents is not DOCUMENTS or "k_proj.bias" in name


def test_one_sample_at_a_time_equals_transformers(theirs):
    """Without padding on their side either."""
    ours = built_model(TOWER_FROZEN).eval()
    load_ours_into(theirs, ours)
    sums = 0.0
    for document in DOCUMENTS:
        inputs, labels = right_padded([document], ours.vision_tower)
        with torch.no_grad():
            logits = theirs(**inputs).logits[0, :-1, :-1]
            sums += functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=IGNORE_INDEX)
    assert_equal({"loss": ours.loss_sum(pack(DOCUMENTS)).detach()}, {"loss": sums})


@pytest.fixture
def original(golden):
    """The weights of the original's tiny model in ours, and what the original made of its batches."""
    folder = golden / "llava" / "tiny_llava"
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    theirs = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())
    tower = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
    }
    llama = {key: theirs[key] for key in [*LLAMA, "rms_norm_eps", "rope_theta"] if key != "model_type"}

    def build(rates):
        model = tiny_model(
            rates,
            vision_tower=OpenClipTower(config=tower, feature_layer=theirs["mm_vision_select_layer"]),
            decoder=HuggingFaceDecoder({"model_type": "llama", **llama}, WordTokenizer()),
        )
        model.configure_model()
        prefix = "model.vision_tower.vision_tower.vision_model."
        named = {
            **clip_names(model.vision_tower.visual.state_dict(), layers=tower["layers"] - 1, prefix=prefix),
            **{f"model.mm_projector.{name}": tensor for name, tensor in model.projector.layers.state_dict().items()},
            **model.decoder.lm.state_dict(),
        }
        with torch.no_grad():  # all of these are views of the model's own weights
            for name, tensor in named.items():
                tensor.copy_(state[name])
        return model

    return build, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"), folder


def original_documents(model, name, inputs, tensors):
    """The original's padded batch as our documents."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.vision_tower.mean, model.vision_tower.std))
    pixels = ((inputs[f"{name}.pixel_values"] * std + mean) * 255).round().to(torch.uint8)
    mask = tensors[f"{name}.expanded_attention_mask"].bool()

    documents = []
    for row, (ids, kept) in enumerate(zip(inputs[f"{name}.input_ids"], inputs[f"{name}.attention_mask"].bool(), strict=True)):
        counts = torch.where(ids[kept] == IMAGE_TOKEN_ID, model.vision_tower.num_patches, 1)
        input_ids = ids[kept].repeat_interleave(counts).numpy()
        labels = tensors[f"{name}.expanded_labels"][row][mask[row]].numpy()
        images = [pixels[row].numpy()] if IMAGE_TOKEN_ID in input_ids else []
        documents.append(Document(str(row), input_ids, labels, np.array(images, np.uint8).reshape(-1, *pixels.shape[1:])))
    return documents


@pytest.mark.parametrize(("name", "rates"), [("finetune_v1", TOWER_FROZEN), ("pretrain_plain", DECODER_FROZEN)])
def test_original_llava(original, name, rates):
    """Features, embeddings, loss, logits and gradients of the original on its own batches."""
    build, inputs, tensors, folder = original
    expected = json.loads((folder / "expected.json").read_text())
    stated, columns = expected["batches"][name], expected["logits_columns"]
    model = build(rates)
    documents = original_documents(model, name, inputs, tensors)
    batch = pack(documents)
    mask = tensors[f"{name}.expanded_attention_mask"].bool()

    pictures = [row for row, document in enumerate(documents) if len(document.pixels)]
    features = model.vision_tower(batch.pixels)
    assert_equal({"features": features}, {"features": tensors[f"{name}.vision_features"][pictures]})
    assert_equal({"visual": model.projector(features)}, {"visual": tensors[f"{name}.image_features"][pictures]})
    assert_equal({"embeds": model.fuse(batch)}, {"embeds": tensors[f"{name}.inputs_embeds"][mask]})

    logits = model(batch)
    supervised = (tensors[f"{name}.expanded_labels"][:, 1:] != IGNORE_INDEX) & mask[:, 1:]
    assert_equal({"logits": logits[:, columns]}, {"logits": tensors[f"{name}.logits_columns"][:, :-1][supervised]})
    assert logits.argmax(1).tolist() == tensors[f"{name}.argmax"][:, :-1][supervised].tolist()
    loss = model.loss_sum(batch) / len(batch.targets)
    assert len(batch.targets) == sum(stated["label_tokens_per_row"])
    assert loss.item() == pytest.approx(stated["loss"], rel=1e-5)

    loss.backward()
    prefix = f"{name}.grad.model.mm_projector."
    theirs = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert_equal(gradients(model.projector.layers), theirs)
    norms = {f"model.mm_projector.{key}": g.norm().item() for key, g in gradients(model.projector.layers).items()}
    norms |= {key: g.norm().item() for key, g in gradients(model.decoder.lm).items()}
    assert norms == pytest.approx(stated["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("name", ["finetune_v1", "pretrain_plain"])
def test_original_adamw(original, name):
    """Losses and gradient norms of the original's optimizer steps, with clipping, through our Trainer."""
    build, inputs, tensors, folder = original
    stated = json.loads((folder / "expected.json").read_text())["batches"][name]["adamw"]
    rate = stated["lr"]
    model = build(LearningRates(projector=rate, decoder=rate if name == "finetune_v1" else None))
    batch = pack(original_documents(model, name, inputs, tensors))
    record = Record()
    steps = len(stated["loss_before_each_step"])
    tiny_trainer(callbacks=[record], gradient_clip_val=stated["clip_grad_norm"]).fit(model, datamodule=Prepared([batch] * steps))
    assert record.series("train/loss") == pytest.approx(stated["loss_before_each_step"], rel=1e-5)
    assert record.series("norm/gradient") == pytest.approx(stated["grad_norm_before_clipping"], rel=1e-5)
