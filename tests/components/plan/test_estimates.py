"""What schedules of the reference run cost, and which of them is the fastest."""

from dataclasses import replace

import pytest
from reference import ALIGN, FULL, machine, schedule, workload

from components.errors import RecipeError
from components.plan import Estimate, Workload, equivalents, estimate
from components.plan.estimates import HEADROOM
from components.vlm import LearningRates

STATED = schedule(1, 16)


def fastest(work: Workload, interconnect: str = "1.6Tb/s", gpu: str = "a100-80gb", **options) -> Estimate:
    return equivalents(work, machine(interconnect, gpu=gpu), STATED, **options)[0]


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
    how = schedule(micro_batch, accumulation, replicas=replicas, shards=128 // replicas, reduce_dtype=reduce)
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
    assert best.schedule == schedule(16, 1)
    assert best.bound == "compute"
    assert best.days == pytest.approx(8.6, abs=0.05)
    stated = estimate(workload(), machine(), STATED)
    assert stated.overlapped_seconds / best.overlapped_seconds == pytest.approx(3.7, abs=0.05)


def test_fastest_at_336_pixels():
    first, *others = equivalents(workload(336), machine(), STATED)
    assert first.schedule == schedule(16, 1, activation_checkpointing="selective")
    assert first.days < 18
    plain = next(one for one in others if one.schedule == schedule(8, 2))
    assert plain.days == pytest.approx(17.3, abs=0.05)
    assert plain.serial_seconds > first.serial_seconds
    assert not any(one.schedule == schedule(16, 1) for one in others)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        # fp32: among nodes an all-reduce of gradients moves 8 bytes a parameter, kept parameters and a reduce-scatter 6
        (224, {}, schedule(16, 1, activation_checkpointing="selective", reshard_after_forward=False, replicate_frozen=True)),
        # what would be kept leaves no room here
        (336, {}, schedule(16, 1, activation_checkpointing="selective")),
        # bf16: both move 4 bytes
        (
            224,
            {"reduce_dtype": "bfloat16"},
            schedule(16, 1, activation_checkpointing="selective", reshard_after_forward=False, reduce_dtype="bfloat16"),
        ),
        (
            336,
            {"reduce_dtype": "bfloat16"},
            schedule(8, 2, replicas=16, shards=8, activation_checkpointing="selective", reduce_dtype="bfloat16"),
        ),
    ],
)
def test_fastest_on_a_slow_network(size, options, expected):
    assert fastest(workload(size), "200Gb/s", **options).schedule == expected


def test_hybrid_is_fastest_where_a_slow_network_meets_accumulation():
    work = workload(336, batch=4 * 2048)  # 64 samples on each GPU
    assert is_hybrid(fastest(work, "200Gb/s"))
    assert is_hybrid(fastest(work, "200Gb/s", reduce_dtype="bfloat16"))
    assert fastest(work, "1.6Tb/s").schedule == schedule(16, 4, activation_checkpointing="selective")


def test_a_frozen_decoder_is_not_sharded():
    best = fastest(workload(rates=ALIGN))
    assert best.schedule == schedule(16, 1, replicate_frozen=True)
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
        assert not (layout.defer_reduce_scatter and one.schedule.accumulation == 1)
    assert {is_hybrid(one) for one in found} == {True, False}


def test_equivalents_keep_the_number_formats_and_compilation():
    how = schedule(1, 16, param_dtype="float32", compile_blocks=True)
    layouts = [one.schedule.layout for one in equivalents(workload(), machine(), how)]
    assert {(one.param_dtype, one.reduce_dtype, one.compile_blocks) for one in layouts} == {("float32", "float32", True)}


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

    assert [one.memory.total for one in of(1.02 * least)] == [least]
    assert of(0.99 * least) == []


def test_a_batch_that_cannot_be_dealt_has_no_schedule():
    assert equivalents(workload(batch=2000), machine(), STATED) == []


def test_checkpointing_costs_time_and_no_mfu_formula_hides_it():
    plain, selective, full = (
        estimate(workload(), machine(), schedule(16, 1, activation_checkpointing=what)) for what in ("none", "selective", "full")
    )
    assert selective.compute_seconds == pytest.approx(1.03 * plain.compute_seconds)
    work = workload()
    assert full.compute_seconds / plain.compute_seconds == pytest.approx(1 + work.recomputed_flops / work.flops_per_sample)
    assert plain.overlapped_mfu == pytest.approx(0.5)
    for one in (selective, full):
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
