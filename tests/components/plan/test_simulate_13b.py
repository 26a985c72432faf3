"""Rank 0 of 128 on LLaMA-2 13B, against counts and bytes that were measured on another program of the same model."""

import resource
from dataclasses import replace

import pytest
import torch
from thirteen_billion import FULL_SHARD, HYBRID, LAYERS, PROJECTOR, ROOT, SAMPLE, TOWER_BLOCK, TOWER_REST, model_13b, numbers

from components.plan import Machine, Schedule, collectives, memory_of, workload_of
from components.plan.simulate import compare, simulate
from tests.recipes.recipe_book import instantiate

pytestmark = pytest.mark.slow

# That program has no tower; projector, embeddings, head and norm are one unit, which is freed after forward as a block is. Source:
# 8 layers, two micro-batches, fp32 reduction, 2.897 billion parameters; then all 40 layers, one micro-batch.
ALL_GATHERS = {"full shard": (36, 23.2), "kept": (18, 11.6), "deferred": (36, 23.2), "hybrid": (36, 23.2)}
REDUCE_SCATTERS = {"full shard": (18, 23.2), "kept": (18, 23.2), "deferred": (9, 11.6), "hybrid": (18, 23.2)}
HYBRID_ALL_REDUCES = (9, 1.45)
LAYOUTS = {
    "full shard": FULL_SHARD,
    "kept": replace(FULL_SHARD, reshard_after_forward=False),
    "deferred": replace(FULL_SHARD, defer_reduce_scatter=True),
    "hybrid": HYBRID,
}


def as_that_program(step, layout, tower_blocks, accumulation):
    """Calls and GB of a simulated step, without what our units do otherwise."""
    passes = 2 if layout.reshard_after_forward else 1
    tower = [TOWER_BLOCK] * tower_blocks + [TOWER_REST]
    gathers, reductions = step.collectives["all_gather"], step.collectives["reduce_scatter"]
    # our projector is a unit of its own, and our root is not gathered a second time
    more_calls = len(tower) + passes - (passes - 1)
    more_bytes = 2 * (sum(numbers(unit, layout.shards) for unit in tower) - (passes - 1) * numbers(ROOT, layout.shards))
    reduced = 1 if layout.defer_reduce_scatter else accumulation
    return {
        "all_gather": (gathers.calls - accumulation * more_calls, (gathers.bytes - accumulation * more_bytes) / 1e9),
        "reduce_scatter": (reductions.calls - reduced, reductions.bytes / 1e9),
    }


def recipe_model():
    return instantiate(("--config", "recipes/meta_llava_13b_pretrain.yaml", "--trainer.logger=false")).model


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_slice_of_eight_layers(name):
    layout = LAYOUTS[name]
    step = simulate(model_13b(num_hidden_layers=8), Schedule(layout, micro_batch=1, accumulation=2), SAMPLE)
    ours = as_that_program(step, layout, tower_blocks=LAYERS["tower"], accumulation=2)
    for kind, (calls, gigabytes) in {"all_gather": ALL_GATHERS[name], "reduce_scatter": REDUCE_SCATTERS[name]}.items():
        assert ours[kind] == (calls, pytest.approx(gigabytes, rel=3e-3))
    if "all_reduce" in step.collectives:
        calls, gigabytes = HYBRID_ALL_REDUCES
        crossing = step.collectives["all_reduce"]
        assert (crossing.calls - 1, crossing.bytes / 1e9) == (calls, pytest.approx(gigabytes, rel=3e-3))


def test_the_whole_model_of_the_recipe():
    model = recipe_model()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = simulate(model, Schedule(FULL_SHARD, micro_batch=1, accumulation=1), SAMPLE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "GiB that a model of no memory took"
    ours = as_that_program(step, FULL_SHARD, tower_blocks=23, accumulation=1)
    assert ours == {"all_gather": (82, pytest.approx(52.19, abs=5e-3)), "reduce_scatter": (41, pytest.approx(52.19, abs=5e-3))}
    assert step.flops == pytest.approx(24.76e12, rel=1e-3)
    held = numbers(PROJECTOR + ROOT) / 128
    assert step.peak_memory["optstate"] == pytest.approx(8 * (held + 12.688e9 / 128), rel=1e-3)


def test_the_formulas_agree_on_the_schedule_of_the_recipe():
    model = recipe_model()
    schedule = Schedule(HYBRID, micro_batch=1, accumulation=16)
    step = simulate(model, schedule, SAMPLE)
    with torch.device("meta"):
        model.build()
    machine = Machine.of(16, 8, "a100-80gb", "1.6Tb/s")
    work = workload_of(model, text_tokens=64, target_tokens=64, images_per_sample=1, global_batch_size=2048, max_steps=1)
    memory = memory_of(work, machine, schedule)
    lines = compare(step, collectives(work, schedule), 16 * work.flops_per_sample, (memory.total - memory.allowance) * 2**30)
    assert [line for line in lines if not line.agrees] == []
    assert abs(lines[-1].difference) < 0.05  # peak memory
