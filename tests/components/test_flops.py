"""The count of FLOPs against PyTorch's own counter on real steps, and the throughput callback against the batches."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    ALL,
    DECODER_FROZEN,
    LLAMA,
    TOWER_FROZEN,
    Prepared,
    Record,
    built_model,
    tiny_batch,
    tiny_documents,
    tiny_model,
    tiny_trainer,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from callbacks import throughput
from callbacks.throughput import Throughput
from components.batch import Document, pack
from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.flops import matmul_parameters, peak_flops, step_flops
from components.projector import MLP, PixelShuffle
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates

RATES = {
    "all": ALL,
    "tower_frozen": TOWER_FROZEN,
    "projector_only": DECODER_FROZEN,
    "decoder_only": LearningRates(decoder=1e-3),
    "tower_only": LearningRates(vision_tower=1e-3),
}
LORA = LoRA(rank=16, alpha=16.0)
CASES = {name: (rates, None) for name, rates in RATES.items()}
CASES |= {f"{name}_lora": (rates, LORA) for name, rates in RATES.items() if rates.decoder is not None}
PATCHES = 64
TOLERANCE = 0.02  # the table of the rotary embedding, the input gradient of a first layer


def batch_of(lengths_and_pictures, tokens_per_image):
    """Documents that begin with their pictures."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length, pictures in lengths_and_pictures:
        ids = torch.randint(3, 259, (pictures * tokens_per_image + length,), generator=generator)
        labels = ids.clone()
        ids[: pictures * tokens_per_image] = -200
        labels[: pictures * tokens_per_image + length // 2] = -100
        pixels = torch.randint(0, 256, (pictures, 3, 32, 32), dtype=torch.uint8, generator=generator)
        documents.append(Document("", ids.numpy(), labels.numpy(), pixels.numpy()))
    return pack(documents)


def counted(model, batch):
    """What PyTorch counts in a forward and backward pass, without the convolution that cuts the patches."""
    # the fused kernels of the CPU are not counted; the plain one computes the masked half of causal attention too
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss_sum(batch).backward()
    return sum(flops for operation, flops in counter.get_flop_counts()["Global"].items() if "convolution" not in str(operation))


@pytest.mark.parametrize("projector", [MLP(depth=2), PixelShuffle(factor=2)], ids=["mlp", "pixel_shuffle"])
@pytest.mark.parametrize(("rates", "lora"), CASES.values(), ids=CASES)
def test_equal_pytorchs_counter(rates, projector, lora):
    # adapters alone need no gradient of the first layer's inputs, which is less of a deeper decoder
    shape = {"hidden_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 2 if lora is None else 8}
    model = built_model(
        rates,
        vision_tower=OpenClipTower(
            config={"image_size": 32, "patch_size": 4, "width": 48, "layers": 3, "head_width": 16}, feature_layer=-2
        ),
        projector=projector,
        decoder=HuggingFaceDecoder({**LLAMA, **shape}, WordTokenizer(), lora=lora),
    )
    batch = batch_of([(40, 1), (100, 0), (7, 2)], projector.num_tokens(PATCHES))
    lengths = batch.cumulative_lengths.diff()
    squared = float((lengths**2).sum())
    amounts = {"tokens": batch.num_tokens, "targets": len(batch.targets), "images": len(batch.pixels)}
    sizes = matmul_parameters(model)
    ours = step_flops(model, sizes, squared_lengths=squared, **amounts)
    masked_half = ours - step_flops(model, sizes, squared_lengths=0.0, **amounts)
    assert masked_half > 2 * TOLERANCE * ours  # otherwise attention would not be tested
    assert ours + masked_half == pytest.approx(counted(model, batch), rel=TOLERANCE)


def test_matmul_parameters_by_hand():
    sizes = matmul_parameters(built_model())
    tower, decoder = 2 * 12 * 16**2, 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert sizes == {"vision_tower": tower, "projector": 16 * 32 + 32 * 32, "decoder": decoder, "adapters": 0, "head": 32 * 260}
    lora = LoRA(rank=3, alpha=1.0, target_modules=["q_proj", "down_proj"])
    adapted = matmul_parameters(built_model(decoder=HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=lora)))
    assert adapted == {**sizes, "adapters": 2 * 3 * ((32 + 32) + (48 + 32))}


def test_peaks():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("a device of tomorrow") is None


@pytest.fixture
def one_second_between_calls(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_counts_the_tokens_of_the_batches(accumulate, one_second_between_calls):
    batches = [pack(tiny_documents(seed)[seed % 3 :]) for seed in range(4 * accumulate)]
    record = Record()
    model = tiny_model()
    tiny_trainer(accumulate, callbacks=[Throughput(every_n_steps=2, peak_tflops=1e-6), record]).fit(
        model, datamodule=Prepared(batches)
    )
    sizes = matmul_parameters(model)
    for step, start in ((1, 0), (3, 2 * accumulate)):
        window = batches[start : start + 2 * accumulate]
        assert record.steps[step]["train/tokens_per_second"] == sum(batch.num_tokens for batch in window)
        assert record.steps[step]["train/samples_per_second"] == sum(len(batch.sample_ids) for batch in window)
        flops = [
            step_flops(
                model,
                sizes,
                batch.num_tokens,
                float((batch.cumulative_lengths.diff() ** 2).sum()),
                len(batch.targets),
                len(batch.pixels),
            )
            for batch in window
        ]
        assert record.steps[step]["train/mfu"] == pytest.approx(sum(flops) / 1e6)
    assert "train/tokens_per_second" not in record.steps[0]


def test_no_mfu_without_a_known_peak():
    record = Record()
    tiny_trainer(callbacks=[Throughput(every_n_steps=1), record]).fit(tiny_model(), datamodule=Prepared([tiny_batch()]))
    assert record.steps[0]["train/tokens_per_second"] > 0
    assert "train/mfu" not in record.steps[0]


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"peak_tflops": 0.0}])
def test_throughput_arguments(arguments):
    with pytest.raises(RecipeError, match="throughput: "):
        Throughput(**arguments)
