"""`python main.py plan`: every recipe by its findings, mistakes told as fit tells them, and what the command prints and writes."""

import json
import os
import re
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_recipe import fit, merged, write_recipe

import main
from components import planning
from components.command_line import RecipeCLI
from components.plan.findings import findings_of
from components.plan.gather import Target, facts_of
from components.plan.samples import FirstSamples
from components.plan.schedule import Schedule
from components.sharding.layout import demand_fit
from tests.recipes.recipe_book import COMMANDS, RECIPES, instantiate

pytestmark = pytest.mark.usefixtures("shards_expanded_once")

REFERENCE = ["--config", str(RECIPES / "meta_llava_13b_pretrain.yaml")]
BOUND = ("communication", "accumulation")
"""Micro-batches of one sample, sixteen times: the reference run as it is told."""
EXPECTED = {
    "meta_llava_13b_pretrain": BOUND,
    "meta_llava_13b_pretrain+pretrain_projector_only": BOUND,
    "meta_llava_13b_pretrain+projector_rate_1e-3": BOUND,
    "meta_llava_13b_pretrain+resolution_336": BOUND,
    "meta_llava_13b_finetune": BOUND,
    "meta_llava_13b_finetune+no_alignment": BOUND,
    "meta_llava_13b_finetune+resolution_336": BOUND,
    "meta_llava_13b_finetune+template_llava_llama_2": BOUND,
    **{
        f"meta_llava_13b_{stage}+no_accumulation_{what}": ("schedule",)
        for stage in ("pretrain", "finetune")
        for what in ("full", "selective")
    },
    "llava15_7b_pretrain+projector_pixel_shuffle": ("accumulation",),
    "llava15_7b_pretrain+projector_resampler_64": ("accumulation",),
    "llava15_7b_finetune+projector_resampler_64": ("accumulation",),
    "quickstart+tower_frozen": ("random_and_frozen",),
    "shapes_world_exam+tower_frozen": ("random_and_frozen",),
    "own_pictures": ("lengths",),
    "own_conversations": ("lengths",),
}
"""Names of what is found in a recipe, or in one with an overlay; nothing is found in the others."""


def resolved(run, target):
    """The facts of a run, without a parser of its own."""
    recipe = instantiate(COMMANDS[run])
    stage = planning.first_stage(recipe.model.initial_weights, RECIPES, lambda files: instantiate(_configs(files)))
    return facts_of(run, recipe, planning.first_samples(recipe), target, stage)


def _configs(files):
    return tuple(word for file in files for word in ("--config", str(file)))


DIFFERENT = {"quickstart", "own_pictures", "llava15_7b_finetune", "llava15_7b_lora_finetune", "meta_llava_13b_pretrain"}
"""Recipes with findings of their own, or on a machine of their own; the others are as one of them."""
RUNS = [pytest.param(run, marks=[] if run in DIFFERENT else [pytest.mark.slow], id=run) for run in sorted(COMMANDS)]


@pytest.mark.parametrize("run", RUNS)
def test_findings_of_every_recipe(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data, no runs
    facts = resolved(run, Target())
    assert tuple(finding.name for finding in findings_of(facts)) == EXPECTED.get(run, ())
    for choice in facts.choices:
        changed = yaml.safe_load(choice.overlay)["trainer"]
        layout = replace(facts.running.layout, **changed.get("strategy", {}).get("init_args", {}))
        accumulation = changed.get("accumulate_grad_batches", facts.running.accumulation)
        assert choice.estimate.schedule == Schedule(
            layout, facts.workload.global_batch_size // layout.ranks // accumulation, accumulation
        )
        run = {"world_size": facts.running.ranks, "precision": facts.running.precision, "accumulate_grad_batches": accumulation}
        demand_fit(layout, SimpleNamespace(**run, strategy=SimpleNamespace(_timeout=timedelta(minutes=1))))


def test_every_expectation_is_of_a_recipe():
    assert EXPECTED.keys() <= COMMANDS.keys()


OF_LIGHTNING = "lightning.pytorch.strategies."
READ = {
    "lightning's FSDP": ({"trainer": {"strategy": "fsdp"}}, {"full_state"}),
    "its class, by default": ({"trainer": {"strategy": {"class_path": f"{OF_LIGHTNING}FSDPStrategy"}}}, {"full_state"}),
    "its class, sharded": (
        {"trainer": {"strategy": {"class_path": f"{OF_LIGHTNING}FSDPStrategy", "init_args": {"state_dict_type": "sharded"}}}},
        {"unknown_strategy"},
    ),
    "one of no plan": ({"trainer": {"strategy": "deepspeed_stage_3"}}, {"unknown_strategy"}),
    "DDP": ({"trainer": {"strategy": "ddp"}}, set()),
    "FSDP1": (
        {
            "trainer": {
                "strategy": {"class_path": "components.sharding.FullyShardedV1", "init_args": {"replicas": 1, "shards": 4}},
                "precision": "32-true",
            }
        },
        set(),
    ),
    "too few ranks": (
        {
            "trainer": {
                "strategy": {"class_path": "components.sharding.HybridSharding", "init_args": {"replicas": 1, "shards": 2}},
                "precision": "32-true",
            }
        },
        {"ranks"},
    ),
    "a tenth of the batches": ({"trainer": {"limit_train_batches": 0.1}}, {"ends_early"}),
    "any seed": ({"seed_everything": True}, {"seed"}),
    "a frozen projector": ({"model": {"learning_rates": {"projector": None}}}, {"random_and_frozen"}),
    "no workers": ({"data": {"num_workers": 0}}, {"workers"}),
    "no checkpoint": ({"checkpoint": {"every_n_steps": None}}, {"unsaved"}),
    "other lengths than stated": ({"plan": {"text_tokens": 200}}, {"stated_lengths"}),
    "a long warmup": ({"warmup": {"steps": 4}}, {"warmup"}),
    "devices of a list": ({"trainer": {"devices": [0, 1, 2]}, "data": {"global_batch_size": 32}}, {"global_batch"}),
}
"""What of a recipe is found how: the same names as in the findings' own tests, here read from recipes."""


@pytest.mark.parametrize("what", READ)
def test_facts_are_read_from_a_recipe(what, tmp_path, monkeypatch):
    prepare = FirstSamples.prepare
    monkeypatch.setattr(FirstSamples, "prepare", lambda first: prepare(first, 4))  # as telling here as more
    changes, expected = READ[what]
    sound = {"trainer": {"accelerator": "gpu", "devices": 4, "precision": "bf16-mixed"}, "data": {"num_workers": 1}}
    recipe = instantiate(("--config", str(write_recipe(tmp_path / "small.yaml", **merged(sound, changes)))))
    found = findings_of(facts_of("small", recipe, planning.first_samples(recipe), Target()))
    # a model of this size waits for every exchange
    assert {finding.name for finding in found} - {"communication", "accumulation", "schedule"} == expected


# --- the command


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own: exit code, what it printed, and what it said of mistakes."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main.main(["plan", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def test_the_reference_run_waits_for_its_network_and_an_overlay_mends_it(plan):
    code, report, _ = plan(*REFERENCE)
    assert code == 0
    assert "292,969 x 2,048 samples = 600,000,512" in report
    assert re.search(r"communication-bound: a step exchanges for 7\.9 s and computes for 2\.5 s", report)
    row = re.search(r"^A +1 x 128 +16 +1 +none .* 8\.6 days$", report, re.MULTILINE)[0].split()
    overlay = re.search(r"^A  .*?: (trainer: .*)$", report, re.MULTILINE)[1]
    sharding = "{init_args: {replicas: 1, shards: 128, reshard_after_forward: false}}"
    assert overlay == f"trainer: {{accumulate_grad_batches: 1, strategy: {sharding}}}"
    assert Path("runs/meta_llava_13b_pretrain/plan.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in Path("runs/meta_llava_13b_pretrain").iterdir()] == ["plan.html"]

    Path("overlay.yaml").write_text(overlay)
    code, again, _ = plan(*REFERENCE, "--config", "overlay.yaml")
    assert code == 0 and "no findings" in again
    assert re.search(r"^recipe .*$", again, re.MULTILINE)[0].split()[1:] == row[1:]


@pytest.mark.parametrize(
    ("overlays", "days"), [(("no_accumulation",), 9), (("resolution_336", "no_accumulation"), 18)], ids=["224", "336"]
)
def test_the_shipped_overlays_of_the_reference_run(overlays, days):
    files = [RECIPES / "meta_llava_13b_pretrain.yaml", *(RECIPES / "ablations" / f"{name}.yaml" for name in overlays)]
    recipe = instantiate(_configs(files))
    facts = facts_of("reference", recipe, planning.first_samples(recipe), Target(16, 8, "a100-80gb", "1.6Tb/s", mfu=0.5))
    assert facts.workload.samples >= 600_000_000
    assert facts.estimate.memory.fits and facts.estimate.days <= days
    assert findings_of(facts) == []


def test_another_machine(plan):
    _, report, _ = plan(
        *REFERENCE, "--nodes", 8, "--gpus-per-node", 4, "--gpu", "h200-141gb", "--mfu", 0.4, "--interconnect", "25GB/s"
    )
    assert "8 x 4 h200-141gb, 200 Gb/s between nodes" in report
    assert re.search(r"recipe +8 x 4 +4 +16 ", report) and "at 40% MFU" in report
    assert "a GPU has 139.7" in report


def test_options_that_the_strategy_refuses(plan):
    code, report, _ = plan(*REFERENCE, "--trainer.strategy.init_args.activation_checkpointing", "selective")
    assert code == 2
    assert "contradiction (strategy_options): trainer.strategy.init_args: compile_blocks has its own choice" in report


def test_a_machine_that_the_batch_cannot_be_dealt_to(plan):
    code, report, _ = plan(*REFERENCE, "--nodes", 32)
    assert code == 2
    assert "contradiction (global_batch): data.global_batch_size = 2048 is not a multiple of 256 ranks x 16" in report.replace(
        ",", ""
    )


def test_a_recipe_for_a_laptop(plan, tmp_path):
    code, report, _ = plan("--config", write_recipe(tmp_path / "small.yaml"), "--page", "deep/down/page.html")
    assert code == 0 and "no findings" in report
    assert "4 x 4 samples = 16" in report and "mean of the first 64 samples" in report
    assert "MFLOP" in report and "GiB" not in report and "days" not in report.replace("days are not planned", "")
    assert "deep/down/page.html" in report and Path("deep/down/page.html").is_file()
    assert not Path("runs").exists()
    _, report, _ = plan("--config", write_recipe(tmp_path / "small.yaml"), "--gpu", "a100-40gb")
    assert "a GPU has 39.4" in report and "(precision)" in report


@pytest.mark.slow
def test_formulas_and_a_simulated_rank_agree(plan, tmp_path):
    sharding = {"class_path": "components.sharding.HybridSharding", "init_args": {"replicas": 2, "shards": 2}}
    trainer = {"accelerator": "gpu", "devices": 2, "num_nodes": 2, "accumulate_grad_batches": 3, "strategy": sharding}
    # the formulas leave out what is about 1 % of a large model: the patch embedding, above all
    wide = {"decoder": {"init_args": {"config": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}}}}
    recipe = write_recipe(
        tmp_path / "small.yaml", model=wide, trainer=trainer, data={"global_batch_size": 24}, plan={"text_tokens": 20}
    )
    code, report, _ = plan("--config", recipe, "--simulate")
    assert code == 0
    table = report.partition("formulas against")[2]
    assert table.count(" agrees") == 7 and "DIFFERS" not in table and "peak memory" in table
    code, _, told = plan("--config", write_recipe(tmp_path / "small.yaml"), "--simulate")
    assert code == 2 and "--simulate" in told
    # FSDP1 exchanges otherwise
    trainer["strategy"] = {"class_path": "components.sharding.FullyShardedV1", "init_args": {"replicas": 2, "shards": 2}}
    recipe = write_recipe(tmp_path / "small.yaml", trainer=trainer, data={"global_batch_size": 24}, plan={"text_tokens": 20})
    code, _, told = plan("--config", recipe, "--simulate")
    assert code == 2 and "FullyShardedV1" in told


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_first_stage_with_other_pictures(plan, tmp_path):
    """Of which the recipe is there, and later only the run."""
    first = write_recipe(tmp_path / "first.yaml", max_steps=3)
    tower = {
        "vision_tower": {"init_args": {"config": {"image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}}}
    }
    second = write_recipe(tmp_path / "second.yaml", model={"initial_weights": "runs/first", **tower})
    code, report, _ = plan("--config", second)
    assert code == 2
    found = " ".join(report.split())
    assert "(resolution): pictures are 24 px, 9 visual tokens" in found and "trained at 16 px, 4 visual" in found
    assert fit(first) == 0
    first.unlink()
    code, report, _ = plan("--config", second)
    assert code == 2 and found.partition("(resolution)")[2] == " ".join(report.split()).partition("(resolution)")[2]
    code, _, _ = plan("--config", write_recipe(tmp_path / "second.yaml", model={"initial_weights": "runs/first"}))
    assert code == 0


def test_fit_takes_the_lengths_and_ignores_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "small.yaml", plan={"text_tokens": 30, "supervised_tokens": 20})
    with pytest.raises(SystemExit) as end:
        main.main(["fit", "--config", str(recipe), "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["plan"] == {
        "text_tokens": 30,
        "supervised_tokens": 20,
        "images_per_sample": None,
    }
    assert main.main(["plan", "--config", str(recipe)]) == 0
    assert "30 text, of which 20 supervised; as the section plan states it" in capsys.readouterr().out


MISTAKES = {
    "a key of a part": {"model": {"learning_rtes": {"projector": 1.0}}},
    "a key of a section": {"warmup": {"stps": 3}},
    "a section": {"trainr": {"devices": 2}},
    "a class": {"model": {"projector": {"class_path": "components.projector.MPL"}}},
    "a value": {"data": {"global_batch_size": "many"}},
    "a value that a class refuses": {"data": {"global_batch_size": 0}},
    "every part frozen": {"model": {"learning_rates": {"vision_tower": None, "projector": None, "decoder": None}}},
}


# one for each of the places that find them: the files, the parser, the parts
SOONEST = {"a section", "a value that a class refuses", "every part frozen"}


@pytest.mark.parametrize("mistake", [pytest.param(key, marks=[] if key in SOONEST else [pytest.mark.slow]) for key in MISTAKES])
def test_a_mistake_is_told_as_fit_tells_it(mistake, plan, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "small.yaml")
    (tmp_path / "mistake.yaml").write_text(json.dumps(MISTAKES[mistake]))
    words = ["--config", str(recipe), "--config", str(tmp_path / "mistake.yaml")]
    code, report, told = plan(*words)
    assert (code, report) == (2, "")
    assert main.main(["fit", *words]) == 2
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "0"), "0 must be above 0"),
        (("--mfu", "1.5"), "at most 1"),
        (("--mfu", "nan"), "at most 1"),
        (("--price-per-gpu-hour", "inf"), "above 0"),
        (("--gpu", "v100"), "a100-80gb"),
        (("--interconnect", "fast"), "is no rate"),
        (("--nods", "3"), "unrecognized arguments: --nods"),
    ],
)
def test_an_option_out_of_range(words, said, plan):
    code, _, told = plan(*REFERENCE, *words)
    assert code == 2 and said in told and told.count("\n") < 6


def test_without_a_recipe(plan):
    code, _, told = plan("--nodes", "3")
    assert code == 2 and "python main.py plan --config recipes/quickstart.yaml" in told


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["plan", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)(?: \S+)?(?:\s{2,}|\n\s+)(\S.*)", text, re.MULTILINE)
    assert {"--nodes", "--gpus-per-node", "--gpu", "--interconnect", "--mfu", "--price-per-gpu-hour", "--kg-co2-per-kwh"} < dict(
        options
    ).keys()
    assert "python main.py plan --config RECIPE" in text and "main.py fit --help" in " ".join(text.split())


def test_nothing_is_fetched_and_no_seed_is_set(plan, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"plan called {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(RecipeCLI, "instantiate_trainer", refuse)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    code, _, _ = plan("--config", RECIPES / "llava15_7b_finetune.yaml")
    assert code == 0 and "PL_GLOBAL_SEED" not in os.environ
