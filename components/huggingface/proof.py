"""The two halves of a certificate, each a process of its own: our model computes, then transformers does with the export.

`python -m components.huggingface.proof ours FOLDER` and `... theirs FOLDER` read `job.json` in FOLDER and write their tensors and
token ids beside it. One model is in memory at a time.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.batch import IMAGE_TOKEN_ID, Document, pack
from components.causality import prove_causal
from components.checkpoint_files import merged_weights
from components.data import Sample
from components.huggingface.initial import allocate
from components.huggingface.memory import peak_mib
from components.named_tensors import NamedTensors, fill
from components.rebuild import read_checkpoint_recipe, rebuild
from components.turns import Turn

JOB, OURS, THEIRS = "job.json", "ours", "theirs"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A question about pictures.

    Args:
        name: What the case stands for.
        question: The question.
        images: Picture files, which come before it.
    """

    name: str
    question: str
    images: list[str]


class Rounded(NamedTensors):
    """Tensors rounded to another number format, and back to float32."""

    def __init__(self, source: NamedTensors, dtype: torch.dtype) -> None:
        self.where, self.infos = source.where, source.infos
        self._source, self._dtype = source, dtype

    def read(self, name: str) -> Tensor:
        """The tensor in float32, with the precision of the other format."""
        return self._source.read(name).to(self._dtype).float()


def ours(folder: Path, job: dict[str, Any]) -> None:
    """Our model with the weights as the export rounds them, in float32 on the CPU."""
    checkpoint = Path(job["checkpoint"])
    model, preparation = rebuild(read_checkpoint_recipe(checkpoint))
    allocate(model, torch.float32)
    model.eval()
    weights = merged_weights(checkpoint)
    cases = [Case(**case) for case in job["cases"]]
    end = preparation.end_token_id(model.tokenizer)
    layout = model.sample_format()
    prompts = []
    for case in cases:
        turn = Turn("user", "<image>\n" * len(case.images) + case.question)
        sample = Sample(case.name, [turn], [Path(name).read_bytes() for name in case.images])
        prompts.append(preparation.prompt(sample, model.tokenizer, layout))

    dtype = getattr(torch, job["dtype"])
    fill(model.state_dict(), weights)
    unrounded = (
        [model.generate_ids([prompt], NEW_TOKENS, end_token_id=end)[0] for prompt in prompts] if dtype != torch.float32 else None
    )
    fill(model.state_dict(), Rounded(weights, dtype))
    tensors: dict[str, Tensor] = {}
    answers = []
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            new = model.generate_ids([prompt], NEW_TOKENS, end_token_id=end)[0]
            answers.append({"prompt": prompt.input_ids.tolist(), "new": new, "text": model.tokenizer.decode(new)})
            tensors[f"logits.{number}"] = model(pack([_whole_row(prompt, new)]))
            if len(prompt.pixels):
                pixels = torch.from_numpy(prompt.pixels)
                tensors[f"features.{number}"] = model.vision_tower(pixels)
                tensors[f"pixels.{number}"] = _normalised(pixels, model.vision_tower)
    result = {
        "answers": answers,
        "without_rounding": unrounded,
        "causality": prove_causal(model),
        "image_token_id": IMAGE_TOKEN_ID,
    }
    _save(folder, OURS, tensors, result)


def theirs(folder: Path, job: dict[str, Any]) -> None:
    """Transformers with the exported folder alone: its config, processor and chat template, in float32 with eager attention."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

    export = job["export"]
    asked = json.loads((folder / f"{OURS}.json").read_text())["answers"]
    processor: Any = AutoProcessor.from_pretrained(export, backend="pil")
    torchvision: Any = AutoImageProcessor.from_pretrained(export, backend="torchvision")
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, loading = loaded
    model.eval()
    tensors: dict[str, Tensor] = {}
    answers = []
    levels = [0.0]
    conversations = [_conversation(Case(**case)) for case in job["cases"]]
    with torch.no_grad():
        for number, (conversation, answer) in enumerate(zip(conversations, asked, strict=True)):
            inputs = _tokenized(processor, [conversation])
            new = _generated(model, inputs)[0]
            prompt = inputs["input_ids"][0].tolist()
            answers.append({"prompt": prompt, "new": new, "text": processor.tokenizer.decode(new)})
            ids = torch.tensor([prompt + answer["new"]])
            row = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tensors[f"logits.{number}"] = model(**row).logits[0, :-1]
            if "pixel_values" in inputs:
                tensors[f"pixels.{number}"] = pixels = inputs["pixel_values"]
                seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
                tensors[f"features.{number}"] = seen[:, 1:] if model.config.vision_feature_select_strategy == "default" else seen
                pictures = [Image.open(name) for name in job["cases"][number]["images"]]
                others = torchvision(pictures, return_tensors="pt")["pixel_values"]
                std = torch.tensor(processor.image_processor.image_std)[:, None, None]
                levels.append(((others - pixels) * std * 255).abs().max().item())
        together = _generated(model, _tokenized(processor, conversations[:2]))
        causality = _their_causality(model, asked[-1]["prompt"] + asked[-1]["new"])
    result = {
        "answers": answers,
        "loading": {kind: sorted(map(str, names)) for kind, names in loading.items() if names},
        "two_in_a_batch": together,
        "causality": causality,
        "torchvision_levels": max(levels),
        "image_token_id": model.config.image_token_index,
    }
    _save(folder, THEIRS, tensors, result)


def _whole_row(prompt: Document, new: list[int]) -> Document:
    """The prompt and its answer; every position but the last predicts a token."""
    ids = torch.cat([torch.from_numpy(prompt.input_ids), torch.tensor(new, dtype=torch.int64)]).numpy()
    return Document(prompt.sample_id, ids, ids.copy(), prompt.pixels)


def _normalised(pixels: Tensor, tower: Any) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return (pixels.float() / 255 - mean) / std


def _conversation(case: Case) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = [{"type": "image", "path": name} for name in case.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": case.question}]}]


def _tokenized(processor: Any, conversations: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    return dict(inputs)


def _generated(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    """New ids up to and with the end token."""
    end = model.generation_config.eos_token_id
    rows = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def _their_causality(model: Any, text: list[int]) -> float:
    """How much earlier logits change with the last token of a text; 0 for a causal model."""
    ids = torch.tensor([text])
    other = ids.clone()
    other[0, -1] = int(ids[0, -1] == 0)
    return (model(input_ids=ids).logits[0, :-1] - model(input_ids=other).logits[0, :-1]).abs().max().item()


def _save(folder: Path, name: str, tensors: dict[str, Tensor], result: dict[str, Any]) -> None:
    save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(result | {"peak_mib": round(peak_mib())}))


if __name__ == "__main__":
    half, place = sys.argv[1], Path(sys.argv[2])
    (ours if half == OURS else theirs)(place, json.loads((place / JOB).read_text()))
