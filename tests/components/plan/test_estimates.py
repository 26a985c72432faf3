"""What schedules of the reference run cost, and which of them is the fastest."""

from dataclasses import replace

import pytest
from reference import ALIGN, FULL, machine, schedule, workload

from components.errors import RecipeError
from components.plan import Estimate, Schedule, Workload, equivalents, estimate
from components.plan.estimates import HEADROOM
from components.sharding.layout import refusal
from components.vlm import LearningRates

STATED = schedule(1, 16, compile_blocks=True)


def fastest(work: Workload, interconnect: str = "1.6Tb/s", gpu: str = "a100-80gb", **options) -> Estimate:
    return equivalents(work, machine(interconnect, gpu=gpu), STATED, **options)[0]


def compiled(*numbers: int, **options) -> Schedule:
    return schedule(*numbers, compile_blocks=True, **options)


def is_hybrid(one: Estimate) -> bool:
    return one.schedule.layout.replicas > 1


MFU = {
    # image size, interconnect, micro-batch, accumulation, replicas, reduction; MFU in % with perfect overlap and with none
    "224 fast 1": (224, "1.6Tb/s", 1, 16, 1, "float32", 13.7, 10.7),
    "336 fast 1": (336, "1.6Tb/s", 1, 16, 1, "float32", 27.5, 17.7),
    "224 slow 1": (224, "200Gb/s", 1, 16, 1, "float32", 1.7, 1.7),
    "336 slow 1": (336, "200Gb/s", 1, 16, 1, "float32", 3.5, 3.2),
    "224 fast 16": (224, "1.6Tb/s", 16, 1, 1, "float32", 50, 40.7),
    "336 fast 16": (336, "1.6Tb/s", 16, 1, 1, "float32", 50, 44.9),
    "224 slow 16": (224, "200Gb/s", 16, 1, 1, "float32", 27.5, 17.8),
    "224 slow hybrid 8": (224, "200Gb/s", 8, 2, 16, "float32", 23.0, 15.7),
    "224 slow hybrid 8, bf16": (224, "200Gb/s", 8, 2, 16, "bfloat16", 42.4, 22.9),
    "336 fast hybrid 8, bf16": (336, "1.6Tb/s", 8, 2, 16, "bfloat16", 50, 42.0),
}


@pytest.mark.parametrize(
    ("size", "rate", "micro_batch", "accumulation", "replicas", "reduce", "best", "worst"), MFU.values(), ids=MFU
)
def test_mfu_of_the_published_table(size, rate, micro_batch, accumulation, replicas, reduce, best, worst):
    how = schedule(micro_batch, accumulation, replicas=replicas, shards=128 // replicas, reduce_dtype=reduce, compile_blocks=True)
    found = estimate(workload(size), machine(rate), how)
    assert 100 * found.overlapped_mfu == pytest.approx(best, rel=0.01, abs=0.05)
    assert 100 * found.serial_mfu == pytest.approx(worst, rel=0.01, abs=0.05)


def test_the_stated_schedule_is_bound_by_communication():
    found = estimate(workload(), machine(), STATED)
    assert found.bound == "communication"
    assert found.compute_seconds == pytest.approx(2.54, abs=0.005)
    assert found.overlapped_seconds == found.communication.seconds == pytest.approx(9.3, abs=0.05)
    assert found.serial_seconds == found.compute_seconds + found.communication.seconds
    assert found.days == pytest.approx(9.3 * 292969 / 86400, rel=0.01)
    assert found.gpu_hours == pytest.approx(found.days * 24 * 128)
    assert found.tokens_per_second == pytest.approx(2048 * 320 / found.overlapped_seconds)


def test_fastest_at_224_pixels():
    best = fastest(workload())
    assert best.schedule == compiled(16, 1, reshard_after_forward=False)
    assert best.bound == "compute"
    assert best.days == pytest.approx(8.6, abs=0.05)
    stated = estimate(workload(), machine(), STATED)
    assert stated.overlapped_seconds / best.overlapped_seconds == pytest.approx(3.7, abs=0.05)


def test_fastest_at_336_pixels():
    first, *others = equivalents(workload(336), machine(), STATED)
    assert first.schedule == compiled(8, 2, reshard_after_forward=False)
    assert first.days == pytest.approx(17.3, abs=0.05)
    others = {one.schedule: one for one in others}
    assert compiled(16, 1) not in others
    assert first.serial_seconds < others[compiled(8, 2)].serial_seconds
    # what is computed again costs a third, blocks that are not compiled nearly as much, and memory without need
    recomputed = others[compiled(16, 1, activation_checkpointing="full")]
    selective = others[schedule(16, 1, activation_checkpointing="selective")]
    assert first.serial_seconds < recomputed.serial_seconds < selective.serial_seconds
    assert recomputed.memory.total < selective.memory.total / 4


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        # fp32: among nodes an all-reduce of gradients moves 8 bytes a parameter, kept parameters and a reduce-scatter 6
        (224, {}, compiled(16, 1, reshard_after_forward=False, replicate_frozen=True)),
        # one micro-batch leaves no room here, and of two only what is gathered crosses the nodes twice
        (336, {}, compiled(8, 2, replicas=16, shards=8)),
        # bf16: both move 4 bytes
        (224, {"reduce_dtype": "bfloat16"}, compiled(16, 1, reshard_after_forward=False, reduce_dtype="bfloat16")),
        (336, {"reduce_dtype": "bfloat16"}, compiled(8, 2, replicas=16, shards=8, reduce_dtype="bfloat16")),
    ],
)
def test_fastest_on_a_slow_network(size, options, expected):
    assert fastest(workload(size), "200Gb/s", **options).schedule == expected


def test_hybrid_is_fastest_where_a_slow_network_meets_accumulation():
    work = workload(336, batch=4 * 2048)  # 64 samples on each GPU
    assert is_hybrid(fastest(work, "200Gb/s"))
    assert is_hybrid(fastest(work, "200Gb/s", reduce_dtype="bfloat16"))
    assert fastest(work, "1.6Tb/s").schedule == compiled(8, 8, reshard_after_forward=False)


def test_a_frozen_decoder_is_not_sharded():
    best = fastest(workload(rates=ALIGN))
    assert best.schedule == compiled(16, 1, replicate_frozen=True)
    assert best.communication.seconds < 0.01
    stated = estimate(workload(rates=ALIGN, text_tokens=32), machine(), STATED)
    assert stated.compute_seconds == pytest.approx(1.5, abs=0.05)
    assert stated.communication.seconds == pytest.approx(4.7, abs=0.05)
    assert estimate(workload(rates=ALIGN), machine("200Gb/s"), STATED).communication.seconds == pytest.approx(37, abs=0.5)


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("rates", [FULL, ALIGN], ids=["full", "align"])
def test_equivalents_compute_the_same_step_and_fit(size, rates):
    work = workload(size, rates)
    found = equivalents(work, machine(), STATED)
    assert len({one.schedule for one in found}) == len(found) > 50
    for one in found:
        layout = one.schedule.layout
        assert one.schedule.global_batch_size == work.global_batch_size
        assert (layout.param_dtype, layout.reduce_dtype) == ("bfloat16", "float32")
        assert one.memory.total <= (1 - HEADROOM) * one.memory.usable
        assert one.bound != "memory"
        assert refusal(layout, one.schedule.accumulation) is None
    assert {is_hybrid(one) for one in found} == {True, False}


def test_equivalents_keep_the_number_formats():
    how = schedule(1, 16, param_dtype="float32", compile_blocks=True)
    layouts = [one.schedule.layout for one in equivalents(workload(), machine(), how)]
    assert {(one.param_dtype, one.reduce_dtype) for one in layouts} == {("float32", "float32")}


def test_only_the_options_that_are_named_differ():
    how = schedule(1, 16)
    found = equivalents(workload(), machine(), how, options=("replicas", "shards", "activation_checkpointing"))
    assert {replace(one.schedule.layout, replicas=1, shards=128, activation_checkpointing="none") for one in found} == {how.layout}
    assert {one.schedule.layout.activation_checkpointing for one in found} == {"none", "selective", "full"}


def test_nothing_frozen_nothing_kept_whole():
    rates = LearningRates(vision_tower=1e-5, projector=1e-5, decoder=1e-5)
    found = equivalents(workload(rates=rates), machine(), STATED)
    assert found
    assert not any(one.schedule.layout.replicate_frozen for one in found)


def test_one_node_has_one_mesh():
    work = workload(batch=64)
    found = equivalents(work, machine(nodes=1, gpu="h200-141gb"), schedule(1, 8, shards=8))
    assert found
    assert {(one.schedule.layout.replicas, one.schedule.layout.shards) for one in found} == {(1, 8)}


def test_where_nothing_leaves_room_what_fits_is_listed():
    work, full_size = workload(), machine()
    least = min(one.memory.total for one in equivalents(work, full_size, STATED))

    def of(memory: float) -> list[Estimate]:
        return equivalents(work, replace(full_size, gpu=replace(full_size.gpu, memory_gib=memory)), STATED)

    assert [one.memory.total for one in of(1.001 * least)] == [least]
    assert of(0.99 * least) == []


def test_a_batch_that_cannot_be_dealt_has_no_schedule():
    assert equivalents(workload(batch=2000), machine(), STATED) == []


def test_checkpointing_costs_time_and_no_mfu_formula_hides_it():
    plain, full = (estimate(workload(), machine(), compiled(16, 1, activation_checkpointing=what)) for what in ("none", "full"))
    uncompiled, selective = (
        estimate(workload(), machine(), schedule(16, 1, activation_checkpointing=what)) for what in ("none", "selective")
    )
    assert uncompiled.compute_seconds == pytest.approx(0.780 / 0.603 * plain.compute_seconds, rel=5e-3)
    assert selective.compute_seconds == pytest.approx(1.03 * uncompiled.compute_seconds)
    work = workload()
    assert full.compute_seconds / plain.compute_seconds == pytest.approx(1 + work.recomputed_flops / work.flops_per_sample)
    assert plain.overlapped_mfu == pytest.approx(0.5)
    for one in (uncompiled, selective, full):
        assert one.overlapped_mfu == pytest.approx(0.5 * plain.compute_seconds / one.compute_seconds)


def test_what_does_not_fit_is_bound_by_memory():
    assert estimate(workload(336), machine(), schedule(16, 1)).bound == "memory"


def test_sizes_that_differ():
    with pytest.raises(RecipeError, match=r"1 replicas x 64 shards = 64 ranks, but there are 16 nodes x 8 GPUs = 128"):
        estimate(workload(), machine(), schedule(2, 16, shards=64))
    with pytest.raises(
        RecipeError, match=r"128 ranks x 2 samples x 16 micro-batches are 4096 samples, but data.global_batch_size is 2048"
    ):
        estimate(workload(), machine(), schedule(2, 16))
