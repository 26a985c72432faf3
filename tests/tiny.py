"""A tiny model, tiny documents and a Trainer for them: the real parts, small enough that a training step takes milliseconds."""

import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch, Document, pack
from components.data.micro_batches import FromStep
from components.decoder import HuggingFaceDecoder
from components.projector import MLP
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates, VisionLanguageModel

TOWER = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TOKENS_PER_IMAGE = 4
LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ALL = LearningRates(vision_tower=1e-3, projector=2e-3, decoder=3e-3)
TOWER_FROZEN = LearningRates(projector=2e-3, decoder=3e-3)
DECODER_FROZEN = LearningRates(projector=2e-3)


class TinyModel(VisionLanguageModel):
    """The model, with the same weights whenever and wherever it is built, large enough that everything in it matters."""

    def build(self, on_meta: Collection[str] = ()) -> None:
        super().build(on_meta)
        fill(self)


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1 + noise / 10)


def tiny_model(rates: LearningRates = ALL, **overrides: Any) -> TinyModel:
    """The model before it is built; `overrides` are arguments of VisionLanguageModel."""
    arguments = {
        "vision_tower": OpenClipTower(config=TOWER, feature_layer=-1),
        "projector": MLP(depth=2),
        "decoder": HuggingFaceDecoder(LLAMA, WordTokenizer()),
        "learning_rates": rates,
    }
    return TinyModel(**{**arguments, **overrides})


def built_model(rates: LearningRates = ALL, **overrides: Any) -> TinyModel:
    """The model with its layers, as at the start of training."""
    model = tiny_model(rates, **overrides)
    model.configure_model()
    model.set_modes()
    return model


def tiny_document(words: int, images: tuple[int, ...] = (), seed: int = 0, targets: int | None = None) -> Document:
    """A document of `words` text tokens, with pictures before the words that `images` counts; its last words are supervised."""
    generator = np.random.default_rng([seed, words, *images])
    targets = (words + 1) // 2 if targets is None else targets
    input_ids: list[int] = []
    labels: list[int] = []
    for position, word in enumerate(generator.integers(3, LLAMA["vocab_size"] - 1, words).tolist()):
        slots = TOKENS_PER_IMAGE * images.count(position)
        input_ids += [IMAGE_TOKEN_ID] * slots + [word]
        labels += [IGNORE_INDEX] * slots + [word if position >= words - targets else IGNORE_INDEX]
    side = TOWER["image_size"]
    pixels = generator.integers(0, 256, (len(images), 3, side, side), dtype=np.uint8)
    return Document(f"{words} words, pictures at {images}", np.array(input_ids), np.array(labels), pixels)


def tiny_documents(seed: int = 0) -> list[Document]:
    """Unequal documents: a picture first, in the middle and at the end, two pictures, none, and one without targets."""
    return [
        tiny_document(7, (0,), seed),
        tiny_document(12, (5,), seed),
        tiny_document(5, (), seed),
        tiny_document(9, (0, 4), seed),
        tiny_document(6, (5,), seed),
        tiny_document(4, (1,), seed, targets=0),
    ]


def tiny_batch(seed: int = 0) -> Batch:
    return pack(tiny_documents(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return _without_key_bias({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # the state dict, since FSDP2 leaves parameters gathered after a forward pass without backward
    return _without_key_bias({name: whole(tensor) for name, tensor in model.state_dict().items()})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor that may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _without_key_bias(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A softmax does not see the bias of its keys: its gradient is rounding error, which AdamW blows up."""
    for name, tensor in named.items():
        if name.endswith("in_proj_bias"):
            tensor.chunk(3)[1].zero_()
    return named


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """The same names, and values that differ by at most `tolerance` of the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs().max()
        assert difference <= tolerance * expected.abs().max(), f"{name}: {difference} of {expected.abs().max()}"


class Numbers:
    """A tokenizer whose text is the ids: random weights choose bytes that are no text."""

    def __init__(self, eos_token_id: int = 2) -> None:
        self.eos_token_id = eos_token_id

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(str(int(one)) for one in ids)


class Prepared(LightningDataModule):
    """Packed micro-batches of this rank, ready made; a resumed run gets the rest of them."""

    def __init__(self, train: list[Batch], validation: dict[str, list[Batch]] | None = None) -> None:
        super().__init__()
        self.train = train
        self.validation = validation or {}

    @property
    def validation_names(self) -> list[str]:
        return list(self.validation)

    def train_dataloader(self) -> DataLoader:
        accumulate = self.trainer.accumulate_grad_batches
        rest = FromStep(self.trainer.global_step, len(self.train) // accumulate, accumulate)
        return DataLoader(self.train, batch_size=None, sampler=rest)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(batches, batch_size=None) for batches in self.validation.values()]  # type: ignore[arg-type]


class Record(Callback):
    """What was logged at every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def series(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def tiny_trainer(accumulate: int = 1, steps: int = -1, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    """A Trainer as the recipes set it, on the CPU and without files."""
    # ready-made batches need no workers, and a few steps no logger
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    recipe = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "max_epochs": 1, "limit_val_batches": 0}
    return Trainer(**{**quiet, **recipe, **options}, max_steps=steps, accumulate_grad_batches=accumulate, callbacks=callbacks or [])
