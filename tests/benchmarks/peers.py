"""The same training step as others take it, with the modules of one of our models: transformers' LLaVA, and the original LLaVA.

Sources: `LlavaForConditionalGeneration` as transformers' Trainer calls it; `prepare_inputs_labels_for_multimodal` and the
`LlamaForCausalLM` of the original LLaVA (arXiv 2310.03744), written anew.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Document
from components.decoder.architecture import architecture
from components.decoder.attention import attention
from components.vlm import VisionLanguageModel

PADDING = 0


def transformers_llava(model: VisionLanguageModel) -> LlavaForConditionalGeneration:
    """Transformers' LLaVA around the decoder, head and projector of a built model, which keep their weights and their gradients.

    Its tower is transformers' own with all blocks: a frozen copy. Its image token is the last of the vocabulary.
    """
    tower, lm = model.vision_tower, model.decoder.lm
    parameter = next(tower.parameters())
    config = LlavaConfig(
        vision_config=tower.huggingface_config(tower.num_layers),
        text_config=architecture(model.decoder.config),  # anew: transformers writes into a config that a second model gets
        image_token_index=model.decoder.vocab_size - 1,
        projector_hidden_act="gelu",
        vision_feature_layer=tower.feature_layer % tower.num_layers - tower.num_layers,
        vision_feature_select_strategy="default",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.device(parameter.device):
        copy: Any = AutoModel.from_config(config.vision_config, attn_implementation="sdpa", dtype=parameter.dtype)
    copy.load_state_dict(_tower_weights(model), strict=False)  # the blocks after the features keep their random weights
    llava.model.vision_tower = copy.requires_grad_(False).eval()
    llava.model.multi_modal_projector.linear_1 = model.projector.layers[0]
    llava.model.multi_modal_projector.linear_2 = model.projector.layers[2]
    llava.model.language_model, llava.lm_head = lm.base_model, lm.get_output_embeddings()
    return llava


def padded(documents: list[Document], model: VisionLanguageModel, device: torch.device | str) -> dict[str, Tensor]:
    """What transformers' collator hands over: a row for each document, padded on the right, with normalised pictures."""
    last = model.decoder.vocab_size - 1
    if any(last in document.input_ids for document in documents):
        raise ValueError(f"A document holds id {last}, which is the image token here. Leave it out of the documents.")
    rows = [np.where(document.input_ids == IMAGE_TOKEN_ID, last, document.input_ids) for document in documents]
    return _collated(rows, [document.labels for document in documents], documents, model, device)


def marked(documents: list[Document], model: VisionLanguageModel, device: torch.device | str) -> dict[str, Tensor]:
    """What the original LLaVA's collator hands over: as `padded`, but with one marker for each picture."""
    each = model.sample_format().tokens_per_image
    kept = []
    for document in documents:
        slots = document.input_ids == IMAGE_TOKEN_ID
        kept.append(~slots | (slots & (np.cumsum(slots) % each == 1 % each)))
    rows = [document.input_ids[keep] for document, keep in zip(documents, kept, strict=True)]
    labels = [document.labels[keep] for document, keep in zip(documents, kept, strict=True)]
    return _collated(rows, labels, documents, model, device)


def transformers_loss(model: VisionLanguageModel, llava: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Mean loss of the supervised tokens by transformers' model itself, as the Trainer calls it."""
    with attention(model.decoder.lm, "sdpa"):
        return llava(**inputs).loss


def llava_style_loss(model: VisionLanguageModel, llava: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Mean loss of the supervised tokens as the original LLaVA computes it, from what `marked` collates.

    Every sample is split at its markers and put together again in Python, the rows are padded, and every position gets logits.
    """
    visual = llava.model.multi_modal_projector(patch_features(llava, inputs["pixel_values"]))
    rows, row_labels, used = [], [], 0
    for row_ids, row_mask, whole_row_labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        ids, labels = row_ids[row_mask.bool()], whole_row_labels[row_mask.bool()]
        markers = [-1, *torch.where(ids == IMAGE_TOKEN_ID)[0].tolist(), len(ids)]
        texts = [slice(before + 1, after) for before, after in pairwise(markers)]
        embeds = model.decoder.embed(torch.cat([ids[text] for text in texts]))
        parts, part_labels = [], []
        for number, part in enumerate(embeds.split([text.stop - text.start for text in texts])):
            parts.append(part)
            part_labels.append(labels[texts[number]])
            if number < len(texts) - 1:
                picture = visual[used]
                used += 1
                parts.append(picture.to(embeds.dtype))
                part_labels.append(torch.full((len(picture),), IGNORE_INDEX, device=labels.device, dtype=labels.dtype))
        rows.append(torch.cat(parts))
        row_labels.append(torch.cat(part_labels))

    longest = max(len(row) for row in rows)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool, device=rows[0].device)
    targets = torch.full((len(rows), longest), IGNORE_INDEX, device=rows[0].device)
    padded_rows = []
    for number, (row, labels) in enumerate(zip(rows, row_labels, strict=True)):
        filling = torch.zeros((longest - len(row), row.shape[1]), dtype=row.dtype, device=row.device)
        padded_rows.append(torch.cat([row, filling]))
        mask[number, : len(row)] = True
        targets[number, : len(row)] = labels
    with attention(model.decoder.lm, "sdpa"):
        hidden = model.decoder.lm.base_model(inputs_embeds=torch.stack(padded_rows), attention_mask=mask).last_hidden_state
    logits = llava.lm_head(hidden).float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def patch_features(llava: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Normalised pictures in, patch features out, as the original's tower gives them: all blocks, of which one is used."""
    seen = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return seen[llava.config.vision_feature_layer][:, 1:]


def _collated(
    rows: list[np.ndarray],
    labels: list[np.ndarray],
    documents: list[Document],
    model: VisionLanguageModel,
    device: torch.device | str,
) -> dict[str, Tensor]:
    tower = model.vision_tower
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    pixels = (torch.from_numpy(np.concatenate([document.pixels for document in documents])) / 255 - mean) / std

    def stacked(values: list[np.ndarray], filling: int) -> Tensor:
        return pad_sequence([torch.from_numpy(row) for row in values], batch_first=True, padding_value=filling).to(device)

    return {
        "input_ids": stacked(rows, PADDING),
        "attention_mask": stacked([np.ones(len(row), dtype=np.int64) for row in rows], 0),
        "labels": stacked(labels, IGNORE_INDEX),
        "pixel_values": pixels.to(device, next(tower.parameters()).dtype),
    }


def _tower_weights(model: VisionLanguageModel) -> dict[str, Tensor]:
    """The weights of our tower under transformers' names."""
    state = model.vision_tower.state_dict()
    named: dict[str, Tensor] = {}
    for pairing in model.vision_tower.huggingface_names():
        tensor = state[pairing.ours]
        named |= pairing.split(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return named
