"""Rank 0 of 128 by simulation, against counts, bytes and FLOPs worked out by hand from the shapes of the layers."""

import functools
from dataclasses import replace

import pytest
import torch
from thirteen_billion import (
    BLOCK,
    FULL_SHARD,
    HYBRID,
    LAYERS,
    PROJECTOR,
    ROOT,
    SAMPLE,
    TOKENS,
    TOWER_BLOCK,
    TOWER_REST,
    model_13b,
    numbers,
)
from tiny import DECODER_FROZEN, TOWER_FROZEN, tiny_model
from torch import distributed

from components.errors import RecipeError
from components.plan.communication import Collective, collectives
from components.plan.schedule import Schedule
from components.plan.simulate import Comparison, Simulation, compare, simulate
from components.plan.workload import workload_of
from components.sharding import Layout

RATES = {"decoder trains": TOWER_FROZEN, "decoder frozen": DECODER_FROZEN}


DEFERRED = replace(FULL_SHARD, defer_reduce_scatter=True)
# what does not depend on the number of shards is quicker with two
TWO = Layout(replicas=1, shards=2)
KEPT = replace(TWO, reshard_after_forward=False)
REPLICATED = replace(TWO, replicate_frozen=True)
SELECTIVE = replace(TWO, activation_checkpointing="selective")
RECOMPUTED = replace(TWO, activation_checkpointing="full")
LONG = replace(SAMPLE, text_tokens=1024)


@functools.cache
def _simulated(layout, accumulation, micro_batch, rates, sample):
    return simulate(model_13b(RATES[rates]), Schedule(layout, micro_batch, accumulation), sample)


def simulated(layout=FULL_SHARD, accumulation=1, micro_batch=1, rates="decoder trains", sample=SAMPLE):
    """A step, run once for all tests."""
    return _simulated(layout, accumulation, micro_batch, rates, sample)


def gathered(shards=128, passes=2):
    """All-gathers of a micro-batch: what gradients flow through twice, but for the root, which is not freed in between."""
    once = [TOWER_BLOCK] * LAYERS["tower"] + [TOWER_REST, ROOT]
    both = [BLOCK] * LAYERS["decoder"] + [PROJECTOR]
    units = once + passes * both
    return Collective(len(units), 2 * sum(numbers(unit, shards) for unit in units))


def reduced(shards=128):
    """Reduce-scatters of a micro-batch: the units of what trains."""
    units = [BLOCK] * LAYERS["decoder"] + [PROJECTOR, ROOT]
    return Collective(len(units), 4 * sum(numbers(unit, shards) for unit in units))


def against_formulas(step, rates, schedule):
    """The comparison that a plan prints."""
    model = model_13b(rates)
    with torch.device("meta"):
        model.build()
    samples = {"global_batch_size": schedule.global_batch_size, "max_steps": 1}
    work = workload_of(model, text_tokens=SAMPLE.text_tokens, target_tokens=SAMPLE.target_tokens, images_per_sample=1, **samples)
    again = work.recomputed_flops if schedule.layout.activation_checkpointing == "full" else 0
    flops = schedule.micro_batch * schedule.accumulation * (work.flops_per_sample + again)
    return compare(step, collectives(work, schedule), flops, peak_memory=0)


def total_peak(step):
    return sum(step.peak_memory.values())


def times(number, collective):
    return Collective(number * collective.calls, number * collective.bytes)


def test_full_shard():
    assert simulated().collectives == {"all_gather": gathered(), "reduce_scatter": reduced()}


def test_every_micro_batch_gathers_and_reduces():
    step = simulated(accumulation=5)
    assert step.collectives == {name: times(5, one) for name, one in simulated().collectives.items()}
    assert step.flops == 5 * simulated().flops == 5 * step.micro_batch_flops
    assert step.ran == 3


def test_gradients_cross_the_replicas_once_per_step():
    calls = simulated(HYBRID, 2).collectives
    assert calls["all_reduce"] == Collective(reduced(8).calls, reduced(8).bytes // 8)
    assert calls["all_gather"] == times(2, gathered(8))
    assert calls["reduce_scatter"] == times(2, reduced(8))


def test_parameters_that_are_kept_are_gathered_once():
    step = simulated(KEPT)
    assert step.collectives == {"all_gather": gathered(2, passes=1), "reduce_scatter": reduced(2)}


def test_deferred_gradients_are_reduced_once_per_step():
    step = simulated(DEFERRED, accumulation=2)
    assert step.collectives == {"all_gather": times(2, gathered()), "reduce_scatter": reduced()}
    whole_gradients = 4 * numbers(LAYERS["decoder"] * BLOCK + PROJECTOR + ROOT)
    assert total_peak(step) > total_peak(simulated(accumulation=5)) + whole_gradients - 4 * numbers(ROOT)


def test_of_a_frozen_decoder_only_the_projector_is_reduced():
    calls = simulated(rates="decoder frozen").collectives
    assert calls == {"all_gather": gathered(), "reduce_scatter": Collective(1, 4 * numbers(PROJECTOR))}


def test_a_frozen_decoder_that_is_replicated_is_never_sent():
    step = simulated(REPLICATED, rates="decoder frozen")
    projector = numbers(PROJECTOR, shards=2)
    assert step.collectives == {"all_gather": Collective(2, 2 * 2 * projector), "reduce_scatter": Collective(1, 4 * projector)}
    frozen = 2 * numbers(LAYERS["decoder"] * BLOCK + ROOT + LAYERS["tower"] * TOWER_BLOCK + TOWER_REST, shards=1)
    assert step.peak_memory["replicated param"] == frozen
    assert step.shard_bytes == frozen + 4 * projector // 2


@pytest.mark.parametrize("layout", [SELECTIVE, RECOMPUTED], ids=["selective", "full"])
def test_what_is_computed_again_is_not_sent_again(layout):
    step = simulated(layout)
    assert step.collectives == {"all_gather": gathered(2), "reduce_scatter": reduced(2)}
    part = forward_flops()
    # the result of a block's last layer is not needed again
    last_layers = LAYERS["decoder"] * 2 * TOKENS * 5120 * 13824
    recomputed = part["blocks"] - last_layers + part["attention"] if layout == RECOMPUTED else 0
    assert step.flops - simulated().flops == recomputed


def forward_flops(tokens=TOKENS):
    """Matmul FLOPs of the forward pass by part: class token, patch embedding and all; causal attention is half of the square."""
    patches = 256
    return {
        "tower": LAYERS["tower"] * (2 * 257 * 12 * 1024**2 + 4 * 257**2 * 1024) + 2 * patches * (3 * 14 * 14) * 1024,
        "projector": 2 * patches * (1024 * 5120 + 5120 * 5120),
        "blocks": LAYERS["decoder"] * 2 * tokens * (4 * 5120**2 + 3 * 5120 * 13824),
        "attention": LAYERS["decoder"] * 2 * tokens**2 * 5120,
        "head": 2 * 64 * 5120 * 32000,
    }


def of_a_step(linear_layers, tokens=TOKENS):
    """FLOPs with backward: `linear_layers` times the decoder's forward; the first layer needs no gradient of the features."""
    part = forward_flops(tokens)
    projector = 3 * part["projector"] - 2 * 256 * 1024 * 5120
    return part["tower"] + projector + linear_layers * (part["blocks"] + part["head"]) + 3 * part["attention"]


def test_flops():
    assert simulated().flops == pytest.approx(of_a_step(linear_layers=3), rel=1e-5)  # the table of rotary angles
    assert simulated(rates="decoder frozen").flops == pytest.approx(of_a_step(linear_layers=2), rel=1e-5)


@pytest.mark.parametrize(("layout", "shards"), [(FULL_SHARD, 128), (HYBRID, 8)], ids=["full shard", "hybrid"])
def test_what_a_rank_holds_between_steps(layout, shards):
    trained = PROJECTOR + ROOT + LAYERS["decoder"] * BLOCK
    frozen = TOWER_REST + LAYERS["tower"] * TOWER_BLOCK
    step = simulated(layout, 2) if layout == HYBRID else simulated()
    peak = step.peak_memory
    assert peak["sharded param"] == 4 * numbers(trained + frozen, shards) // shards
    assert peak["optstate"] == 8 * numbers(trained, shards) // shards
    assert step.shard_bytes == peak["sharded param"]


def test_peak_memory():
    step, tokens = simulated(micro_batch=4, sample=LONG), 256 + LONG.text_tokens
    assert step.collectives == simulated().collectives
    assert step.flops == pytest.approx(4 * of_a_step(linear_layers=3, tokens=tokens), rel=1e-5)
    peak = step.peak_memory
    root, block = (2 * numbers(shapes) for shapes in (ROOT, BLOCK))
    assert root + block <= peak["unsharded param"] <= root + 2 * block
    kept = 4 * tokens * LAYERS["decoder"] * (16 * 5120 + 8 * 13824)  # where every norm and activation is one kernel
    assert kept < peak["activation"] < 1.6 * kept


@pytest.mark.parametrize(
    ("layout", "accumulation", "rates"),
    [
        (FULL_SHARD, 5, "decoder trains"),
        (HYBRID, 2, "decoder trains"),
        (KEPT, 1, "decoder trains"),
        (DEFERRED, 2, "decoder trains"),
        (FULL_SHARD, 1, "decoder frozen"),
        (REPLICATED, 1, "decoder frozen"),
        (SELECTIVE, 1, "decoder trains"),
        (RECOMPUTED, 1, "decoder trains"),
    ],
    ids=["full shard", "hybrid", "kept", "deferred", "frozen", "replicated", "selective", "recomputed"],
)
def test_the_formulas_of_the_plan_agree(layout, accumulation, rates):
    lines = against_formulas(simulated(layout, accumulation, rates=rates), RATES[rates], Schedule(layout, 1, accumulation))
    assert [line for line in lines if not line.agrees] == []
    assert all(line.difference == 0 for line in lines if line.quantity.endswith(("calls", "bytes")))


def test_leaves_no_trace():
    model = tiny_model()
    states = (torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.UntypedStorage.resize_, set(vars(model)))
    simulate(model, Schedule(Layout(replicas=1, shards=2), micro_batch=1, accumulation=1), SAMPLE)
    after = (torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.UntypedStorage.resize_, set(vars(model)))
    assert after == states
    assert not distributed.is_initialized()
    assert type(torch.zeros(2) + 1) is torch.Tensor


def test_leaves_no_process_group_after_an_error(monkeypatch):
    def fail(*_):
        raise ValueError("not today")

    monkeypatch.setattr("components.plan.simulate.shard", fail)
    with pytest.raises(ValueError, match="not today"):
        simulate(tiny_model(), Schedule(FULL_SHARD, micro_batch=1, accumulation=1), SAMPLE)
    assert not distributed.is_initialized()


def test_a_rank_of_a_run_simulates_nothing(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    with pytest.raises(RecipeError, match="without torchrun"):
        simulate(tiny_model(), Schedule(FULL_SHARD, micro_batch=1, accumulation=1), SAMPLE)


def test_comparison():
    simulation = Simulation({"all_gather": Collective(4, 100), "all_reduce": Collective(1, 8)}, 10**12, 10**12, {"a": 2**30}, 1, 1)
    lines = compare(simulation, {"all_gather": Collective(4, 101), "reduce_scatter": Collective(0, 0)}, 1.02e12, 2**31)
    verdicts = {line.quantity.split(" in ")[0]: (line.difference, line.agrees) for line in lines}
    assert verdicts == {
        "all_gather calls": (0.0, True),
        "all_gather bytes": (pytest.approx(0.01), False),
        "all_reduce calls": (-1.0, False),
        "all_reduce bytes": (-1.0, False),
        "reduce_scatter calls": (0.0, True),
        "reduce_scatter bytes": (0.0, True),
        "TFLOP": (pytest.approx(0.02), False),
        "peak memory": (1.0, True),
    }
    assert Comparison("TFLOP", 1.009, 1.0, 0.01).agrees
    assert Comparison("calls", 1, 0).difference == float("inf")
