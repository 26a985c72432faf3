"""Every finding is found where its reason is, alone, and not where it is not."""

from dataclasses import replace

import pytest
from some_facts import FACTS, LAYOUT, MEMORY, WORKLOAD, a_choice, an_estimate, spoiled

from components.plan.contradictions import CONTRADICTIONS
from components.plan.facts import FirstStage
from components.plan.findings import FINDINGS, findings_of
from components.plan.samples import Share

FROZEN_DECODER = {**WORKLOAD.parts, "decoder": replace(WORKLOAD.parts["decoder"], trained_parameters=0)}
FULL = replace(MEMORY, activations=75.0)
HUGE = replace(MEMORY, optimizer=90.0)
LONG = replace(WORKLOAD, text_tokens=3000.0)
TIMES_12 = (Share("small", "a file", 0.25, 2_000, 16.0), Share("large", "a file", 0.75, 96_000, 1.0))
NO_LAYOUT = {"layout": None, "strategy": "auto"}
FAILS = {"nodes": 16, "layout": replace(LAYOUT, shards=128), "accumulation": 1}

CASES = {
    "warmup": ({"warmup_steps": 1000}, {"warmup_steps": 999}, "1,000 steps"),
    "global_batch": ({"running": {"accumulation": 3}}, {"running": {"accumulation": 16}}, "8 ranks x 3"),
    "ranks": (
        {"running": {"layout": replace(LAYOUT, shards=4)}, "estimate": None},
        {"running": {"layout": replace(LAYOUT, replicas=2, shards=4)}},
        "1 replicas x 4 shards = 4 ranks",
    ),
    "strategy_options": (
        {"running": {"precision": "bf16-mixed"}},
        {"running": {"precision": "bf16-mixed", **NO_LAYOUT}},
        "32-true",
    ),
    "strategy_options, deferral": (
        {"running": {"layout": replace(LAYOUT, defer_reduce_scatter=True), "accumulation": 1}},
        {"running": {"layout": replace(LAYOUT, defer_reduce_scatter=True)}},
        "defer_reduce_scatter",
    ),
    "strategy_options, compiled": (
        {"running": {"layout": replace(LAYOUT, compile_blocks=True, activation_checkpointing="selective")}},
        {"running": {"layout": replace(LAYOUT, compile_blocks=True, activation_checkpointing="full")}},
        "compile_blocks has its own choice",
    ),
    "strategy_options, frozen": (
        {
            "running": {"layout": replace(LAYOUT, replicate_frozen=True)},
            "rates": {"vision_tower": 1e-6, "projector": 1e-3, "decoder": 2e-5},
            "workload": {"parts": {**WORKLOAD.parts, "vision_tower": WORKLOAD.parts["decoder"]}},
        },
        {"running": {"layout": replace(LAYOUT, replicate_frozen=True)}},
        "replicate_frozen",
    ),
    "nothing_trains": (
        {"workload": {"parts": FROZEN_DECODER}},
        {"workload": {"parts": FROZEN_DECODER}, "rates": {"vision_tower": None, "projector": 1e-3, "decoder": None}},
        "model.learning_rates.decoder is 2e-05",
    ),
    "resolution": (
        {"first_stage": FirstStage("runs/first", 336, 576)},
        {"first_stage": FirstStage("runs/first", 224, 256)},
        "224 px, 256 visual tokens, but model.initial_weights = runs/first was trained at 336 px, 576 visual tokens",
    ),
    "monitor": (
        {"saving": {"monitor": "mme/perception"}},
        {"saving": {"monitor": "gqa_partial/accuracy"}},
        "mme/perception is no score",
    ),
    "monitor, never": (
        {"saving": {"monitor": "gqa/accuracy"}, "asking": {"every_n_steps": None, "at_end": False, "at_start": True}},
        {"saving": {"monitor": "gqa/accuracy"}, "asking": {"every_n_steps": None}},
        "neither on the way nor at_end",
    ),
    "visual_tokens": (
        {"max_length": 256},
        {"max_length": 320},
        "256 visual tokens",
    ),
    "static_memory": (
        {"estimate": an_estimate(memory=HUGE)},
        {"estimate": an_estimate(memory=replace(HUGE, usable=140.0))},
        "alone need 92 GiB",
    ),
    "memory": (
        {"estimate": an_estimate(memory=FULL), "choices": (a_choice(0.9, accumulation=8),)},
        {"estimate": an_estimate(memory=replace(FULL, usable=90.0))},
        "micro-batches of 4 need about 84 GiB",
    ),
    "communication": (
        {"estimate": an_estimate(exchange=9.0)},
        {"estimate": an_estimate(exchange=2.9)},
        "exchanges for 9.0 s and computes for 3.0 s",
    ),
    "accumulation": ({"choices": (a_choice(1.5),)}, {"choices": (a_choice(1.1),)}, "1 with 16 fits and is 1.5 x faster"),
    "schedule": ({"choices": (a_choice(1.5, accumulation=4),)}, {"choices": (a_choice(1.1, accumulation=4),)}, "1.5 x faster"),
    "lengths": ({"lengths": None}, {}, "plan: {text_tokens"),
    "stated_lengths": ({"measured_text": 100.0, "measured": 64}, {"measured_text": 70.0, "measured": 64}, "have 100 on average"),
    "stated_lengths, too many": ({"measured_text": 40.0, "measured": 64}, {"measured_text": 60.0, "measured": 64}, "have 40"),
    "max_length": ({"workload": LONG}, {"workload": LONG, "max_length": 4096}, "3256 tokens, 3192 of them visual"),
    "max_length, some": ({"measured": 64, "truncated": 4}, {"measured": 64, "truncated": 3}, "4 of the first 64"),
    "bad_samples": ({"bad": ("a.json line 3: no picture",), "measured": 63}, {"measured": 64}, "1 of the first 64"),
    "epochs": ({"shares": TIMES_12}, {"shares": TIMES_12[1:]}, "data.sources.small comes by 16 times"),
    "epochs, on a laptop": (
        {"shares": TIMES_12},
        {"shares": TIMES_12, "running": {"on_gpus": False, **NO_LAYOUT}, "estimate": None, "machine": None},
        "small",
    ),
    "workers": ({"workers": 0}, {"workers": 1}, "data.num_workers"),
    "random_and_frozen": (
        {"unlearned": ("vision_tower", "projector")},
        {"unlearned": ("decoder", "projector")},
        "vision_tower is null",
    ),
    "precision": (
        {"running": {"precision": "16-mixed", **NO_LAYOUT}},
        {"running": {"precision": "bf16-mixed", **NO_LAYOUT}},
        "float16 overflows",
    ),
    "precision, too coarse": (
        {"running": {"precision": "bf16-true", **NO_LAYOUT}},
        {"running": {"precision": "bf16-mixed", **NO_LAYOUT}},
        "bf16-true",
    ),
    "precision, slow": (
        {"running": {"precision": "32-true", **NO_LAYOUT}},
        {"running": {"precision": "32-true", "on_gpus": False, **NO_LAYOUT}},
        "many times slower",
    ),
    "precision, of the strategy": (
        {"running": {"layout": replace(LAYOUT, param_dtype="float32")}},
        {"running": {"layout": LAYOUT}},
        "param_dtype",
    ),
    "ends_early": ({"running": {"limited": {"limit_train_batches": "0.1"}}}, {}, "trainer.limit_train_batches = 0.1"),
    "seed": ({"seeded": False}, {}, "seed_everything"),
    "never_asked": (
        {"asking": {"every_n_steps": 1001, "at_end": False}},
        {"asking": {"every_n_steps": 1000, "at_end": False}},
        "every_n_steps = 1001 of 1,000",
    ),
    "unsaved": (
        {"saving": {"every_n_minutes": None, "every_n_steps": 1000}},
        {"saving": {"every_n_minutes": None, "every_n_steps": 999}},
        "nothing is saved before the end",
    ),
    "rare_checkpoints": (
        {"running": FAILS, "saving": {"every_n_minutes": 200.0}, "estimate": None},
        {"running": FAILS, "saving": {"every_n_minutes": 30.0}, "estimate": None},
        "every 200 minutes",
    ),
    "rare_checkpoints, by steps": (
        {"running": FAILS, "saving": {"every_n_minutes": None, "every_n_steps": 999}, "estimate": an_estimate(compute=60.0)},
        {"running": FAILS, "saving": {"every_n_minutes": None, "every_n_steps": 999}, "estimate": an_estimate(compute=1.0)},
        "every 1016 minutes",
    ),
    "full_state": (
        {"running": {"full_state": True, "planned": False, **NO_LAYOUT, "strategy": "FSDPStrategy", "precision": "bf16-mixed"}},
        {},
        "FSDPStrategy gathers every checkpoint whole, 28 GB",
    ),
    "unknown_strategy": (
        {"running": {"planned": False, **NO_LAYOUT, "strategy": "DeepSpeedStrategy", "precision": "bf16-mixed"}},
        {},
        "DeepSpeedStrategy is none of ours",
    ),
}
"""Facts with the finding, facts without, and what it says."""


def test_a_sound_recipe_has_no_findings():
    assert findings_of(FACTS) == []


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found(case):
    wrong, right, said = CASES[case]
    name = case.partition(",")[0]
    found = findings_of(spoiled(**wrong))
    assert [finding.name for finding in found] == [name]
    assert said in found[0].text
    assert name not in {finding.name for finding in findings_of(spoiled(**right))}


def test_every_check_is_tested_and_has_a_severity():
    checks = {check.__name__ for check in (*CONTRADICTIONS, *FINDINGS)}
    assert checks == {case.partition(",")[0] for case in CASES}
    for case, (wrong, _, _) in CASES.items():
        expected = "contradiction" if case.partition(",")[0] in {check.__name__ for check in CONTRADICTIONS} else "finding"
        assert [finding.severity for finding in findings_of(spoiled(**wrong))] == [expected]


@pytest.mark.parametrize("case", ["communication", "memory", "static_memory", "accumulation"])
def test_a_remedy_is_an_overlay_where_there_is_one(case):
    facts = spoiled(**{"choices": (a_choice(1.5),), **{k: v for k, v in CASES[case][0].items() if k != "choices"}})
    assert "trainer: {x: 1}" in next(finding.text for finding in findings_of(facts) if finding.name == case)
