"""The facts of a recipe without findings, to spoil one at a time."""

from dataclasses import replace
from typing import Any

from components.plan import Blocks, Collective, Communication, Estimate, Machine, Memory, Parameter, Part, Schedule, Unit, Workload
from components.plan.choices import Choice
from components.plan.facts import Asking, Facts, Running, Saving
from components.plan.samples import Lengths, Share
from components.sharding import Layout

LAYOUT = Layout(replicas=1, shards=8)
MACHINE = Machine.of(1, 8, "a100-80gb", "200Gb/s")


def _part(trained: bool) -> Part:
    size = 10**9
    return Part(size, size if trained else 0, 1, size - 10**6, 10**6, trained, trained)


WORKLOAD = Workload(
    parts={"vision_tower": _part(False), "projector": _part(True), "decoder": _part(True)},
    units=(Unit("decoder.lm.model.layers.0", (Parameter((10**6, 10**3), True),), True),),
    tower=Blocks(1, 64, 256, 64, 64),
    decoder=Blocks(1, 64, 256, 64, 64),
    vocab_size=1000,
    image_size=224,
    num_patches=256,
    tokens_per_image=256,
    images_per_sample=1.0,
    text_tokens=64.0,
    target_tokens=32.0,
    global_batch_size=128,
    max_steps=1000,
    flops={"vision_tower": 1e11, "projector": 1e10, "decoder": 2e12, "head": 1e10},
    recomputed_flops=1e12,
)
MEMORY = Memory(
    parameters=1.0,
    gradients=1.0,
    optimizer=2.0,
    frozen=0.5,
    gathered=1.0,
    reduction=1.0,
    activations=20.0,
    logits=0.5,
    allowance=2.0,
    usable=79.0,
)


def an_estimate(compute: float = 3.0, exchange: float = 1.0, micro_batch: int = 4, memory: Memory = MEMORY) -> Estimate:
    """A step of so many seconds on eight GPUs."""
    step = max(compute, exchange)
    return Estimate(
        schedule=Schedule(LAYOUT, micro_batch, 16 // micro_batch),
        memory=memory,
        communication=Communication({"all_gather": Collective(4, 10**9)}, {"all_gather": exchange}),
        compute_seconds=compute,
        overlapped_seconds=step,
        serial_seconds=compute + exchange,
        overlapped_mfu=0.5 * compute / step,
        serial_mfu=0.5 * compute / (compute + exchange),
        tokens_per_second=128 * 320 / step,
        days=1000 * step / 86400,
        gpu_hours=1000 * step * 8 / 3600,
        bound="compute",
    )


def a_choice(gain: float, accumulation: int = 1) -> Choice:
    return Choice("the fastest that fits", an_estimate(micro_batch=16 // accumulation), "trainer: {x: 1}", gain)


FACTS = Facts(
    run="some_recipe",
    workload=WORKLOAD,
    rates={"vision_tower": None, "projector": 1e-3, "decoder": 2e-5},
    unlearned=("projector",),
    seeded=True,
    warmup_steps=30,
    floor=0.0,
    running=Running(
        on_gpus=True,
        nodes=1,
        devices=8,
        accumulation=4,
        precision="32-true",
        strategy="HybridSharding",
        planned=True,
        full_state=False,
        layout=LAYOUT,
        limited={},
    ),
    saving=Saving(every_n_steps=None, every_n_minutes=30.0, keep=2, monitor=None),
    asking=Asking(benchmarks=("gqa",), every_n_steps=500, at_start=False, at_end=True),
    template="vicuna_v1",
    max_length=2048,
    workers=8,
    shares=(Share("captions", "a file", 1.0, 128_000, 1.0),),
    lengths=Lengths(64.0, 32.0, 1.0, "as the section plan states it"),
    machine=MACHINE,
    estimate=an_estimate(),
)


def spoiled(**changes: Any) -> Facts:
    """The facts with other values; `running={...}` and the like change single fields of a section."""
    sections = {
        name: replace(getattr(FACTS, name), **value)
        for name, value in changes.items()
        if isinstance(value, dict) and name != "rates"
    }
    return replace(FACTS, **{**changes, **sections})
