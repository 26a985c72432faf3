"""The count of FLOPs against PyTorch's own counter on real steps, and the throughput callback against the batches."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_towers import TINY, add_tiny_siglip
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from callbacks import throughput
from callbacks.throughput import Throughput
from components.batch import Document, pack
from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.flops import gradients_flow, matmul_parameters, mfu, peak_flops, recomputed_flops, step_flops
from components.plan.simulate import _FLOPS
from components.projector import MLP, Linear, PixelShuffle, Resampler
from components.sharding.recomputation import recompute
from components.sharding.units import flowing_modules
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
PROJECTORS = {
    "linear": Linear,
    "mlp": partial(MLP, depth=3),
    "pixel_shuffle": partial(PixelShuffle, factor=2),
    "resampler": partial(Resampler, num_queries=5, depth=2, num_heads=2),
}
CASES = {f"{name}-{projector}": (rates, projector, None) for name, rates in RATES.items() for projector in PROJECTORS}
CASES |= {f"{name}-lora": (rates, "mlp", LORA) for name, rates in RATES.items() if rates.decoder is not None}
# the queries are wider than the model, and more than the keys
DECODER = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
PATCHES = 16


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


@pytest.fixture
def model_of(monkeypatch):
    """Makes models with or without a class token."""

    def make(rates, projector="mlp", class_token=True, lora=None):
        named = {"config": TINY} if class_token else {"model_name": add_tiny_siglip(monkeypatch)}
        return built_model(
            rates,
            vision_tower=OpenClipTower(**named, feature_layer=-2),
            projector=PROJECTORS[projector](),
            decoder=HuggingFaceDecoder({**LLAMA, **DECODER}, WordTokenizer(), lora=lora),
        )

    # one operator for a frozen layer of attention, which PyTorch's counter does not know
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield make
    torch.backends.mha.set_fastpath_enabled(before)


def batch_for(model):
    return batch_of([(40, 1), (100, 0), (7, 2)], model.projector.num_tokens(PATCHES))


def amounts(batch):
    squares = float((batch.cumulative_lengths.diff() ** 2).sum())
    return {
        "tokens": batch.num_tokens, "squared_lengths": squares, "targets": len(batch.targets), "images": len(batch.pixels),
    }  # fmt: skip


def counted(model, batch):
    """What PyTorch counts in a forward and backward pass, without the angles of the rotary embedding: one number each."""
    # the fused kernels of the CPU are not counted; the plain one computes the masked half of causal attention too
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss_sum(batch).backward()
    return without_angles(counter)


def without_angles(counter):
    angles = counter.get_flop_counts().get("TinyModel.decoder.lm.model.rotary_emb", {})
    return counter.get_total_flops() - sum(angles.values())


def masked_half(model, batch, passes):
    """The half of causal attention that our count leaves out, in that many passes: forward is one, backward two."""
    squares = amounts(batch)["squared_lengths"]
    return passes * DECODER["num_hidden_layers"] * 2 * squares * DECODER["num_attention_heads"] * DECODER["head_dim"]


def never_computed(model, batch):
    """Gradients of what nothing before the part makes: embeddings where adapters alone train, queries of a frozen resampler."""
    rates, projector = model.learning_rates, model.projector
    if rates.vision_tower and not rates.projector and isinstance(projector, Resampler):
        queries, keys, dim = projector.num_queries, PATCHES + projector.num_queries, model.vision_tower.feature_dim
        return len(batch.pixels) * (2 * queries * dim**2 + 2 * queries * keys * dim)  # their layer, and their part of attention
    if model.decoder.lora is None or rates.projector or rates.vision_tower:
        return 0
    first = model.decoder.blocks()[0].self_attn
    layers = [parameter for name in "qkv" for parameter in getattr(first, f"{name}_proj").parameters()]
    return 2 * batch.num_tokens * sum(p.numel() for p in layers if LLAMA["hidden_size"] in p.shape[1:])


@pytest.mark.parametrize(("rates", "projector", "lora"), CASES.values(), ids=CASES)
def test_equal_pytorchs_counter(rates, projector, lora, model_of):
    model = model_of(rates, projector, class_token=projector in ("mlp", "resampler"), lora=lora)
    batch = batch_for(model)
    ours = step_flops(model, matmul_parameters(model), **amounts(batch))
    expected = counted(model, batch) + never_computed(model, batch)
    assert ours + masked_half(model, batch, passes=3 if gradients_flow(model)["decoder"] else 1) == expected


def checkpointed(model, what):
    """The model with its blocks as a sharded run with checkpointing has them."""
    flowing = flowing_modules(model)
    for block in (block for part in model.parts.values() for block in part.blocks()):
        if block in flowing:
            recompute(block, what)
    return model


@pytest.mark.parametrize("projector", ["mlp", "resampler"])
@pytest.mark.parametrize("rates", [ALL, TOWER_FROZEN, DECODER_FROZEN], ids=["all", "tower_frozen", "projector_only"])
def test_what_full_checkpointing_adds(rates, projector, model_of):
    plain = model_of(rates, projector)
    batch = batch_for(plain)
    added = counted(checkpointed(model_of(rates, projector), "full"), batch) - counted(plain, batch)
    known = {name: number for name, number in amounts(batch).items() if name != "targets"}
    assert added == recomputed_flops(plain, matmul_parameters(plain), **known) + masked_half(plain, batch, passes=1)


def test_selective_checkpointing_adds_nothing(model_of):
    plain, selective = model_of(ALL), checkpointed(model_of(ALL), "selective")
    batch, counts = batch_for(plain), []
    for model in (plain, selective):
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:  # with the kernels of attention, which are kept
            model.loss_sum(batch).backward()
        counts.append(without_angles(counter))
    assert counts[0] == counts[1] == step_flops(plain, matmul_parameters(plain), **amounts(batch))


def test_matmul_parameters_by_hand():
    sizes = matmul_parameters(built_model())
    tower, decoder = 2 * 12 * 16**2, 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    patches = 3 * 8 * 8 * 16
    assert sizes == {
        "vision_tower": tower, "patch_embedding": patches, "decoder": decoder, "adapters": 0, "head": 32 * 260,
    }  # fmt: skip
    lora = LoRA(rank=3, alpha=1.0, target_modules=["q_proj", "down_proj"])
    adapted = matmul_parameters(built_model(decoder=HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=lora)))
    assert adapted == {**sizes, "adapters": 2 * 3 * ((32 + 32) + (48 + 32))}


def test_mfu():
    assert mfu(3e15, seconds=2.0, peak=8 * 312e12) == pytest.approx(3 / 2 / 2.496)


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


class Waits(TorchDispatchMode):
    """Counts the operators inside it that wait for a device: numbers that are read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_throughput_waits_for_the_device_at_its_own_steps_only(monkeypatch):
    waits = {}
    callback = Throughput(every_n_steps=2, peak_tflops=1.0)
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        real = getattr(callback, hook)

        def watched(trainer, *arguments, real=real):
            with Waits() as mode:
                real(trainer, *arguments)
            waits[trainer.global_step] = waits.get(trainer.global_step, 0) + mode.count

        monkeypatch.setattr(callback, hook, watched)
    tiny_trainer(callbacks=[callback]).fit(tiny_model(), datamodule=Prepared([tiny_batch(seed) for seed in range(4)]))
    # an end is counted with the start of the next step
    assert {step: count > 0 for step, count in waits.items()} == {0: False, 1: False, 2: True, 3: False, 4: True}


def test_no_mfu_without_a_known_peak():
    record = Record()
    tiny_trainer(callbacks=[Throughput(every_n_steps=1), record]).fit(tiny_model(), datamodule=Prepared([tiny_batch()]))
    assert record.steps[0]["train/tokens_per_second"] > 0
    assert "train/mfu" not in record.steps[0]


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"peak_tflops": 0.0}])
def test_throughput_arguments(arguments):
    with pytest.raises(RecipeError, match="throughput: "):
        Throughput(**arguments)
