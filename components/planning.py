"""What a recipe will cost and where it contradicts itself, in seconds, without weights, GPU or network."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from components.command_line import RecipeCLI
from components.errors import RecipeError
from components.plan import estimate, workload_of
from components.plan.example import example_of
from components.plan.facts import Facts, FirstStage
from components.plan.findings import findings_of
from components.plan.gather import Target, facts_of
from components.plan.render import page, write
from components.plan.report import Prices, compared, report
from components.plan.samples import FirstSamples
from components.plan.simulate import Comparison, MeanSample, compare, simulate
from components.plan_command import PAGE
from components.rebuild import read_checkpoint_recipe, rebuild
from components.run_folder import RUNS, complete_checkpoints, run_name
from components.sharding import HybridSharding
from components.vlm import VisionLanguageModel


class PlanCLI(RecipeCLI):
    """A recipe in, its parts out, parsed and refused exactly as `fit` would; no trainer, no run folder."""

    recipe: Any
    """The sections, instantiated; the trainer's stays a namespace."""

    def _set_seed(self) -> None:
        """A plan draws nothing."""

    def before_instantiate_classes(self) -> None:
        """A plan has no run."""

    def instantiate_classes(self) -> None:
        """All but the trainer."""
        self.recipe = self.parser.instantiate(self.config)["fit"]

    def parse(self, files: list[Path]) -> Any:
        """The sections of another recipe and its overlays."""
        words = [word for file in files for word in ("--config", str(file))]
        return self.parser.instantiate(self.parser.parse_args(["fit", *words]))["fit"]

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def plan(options: Namespace, files: list[str], recipe_arguments: list[str]) -> int:
    """Print the report of a plan and write its page.

    Args:
        options: Those of the command.
        files: Recipe and overlays.
        recipe_arguments: What is said of the recipe: these files, and keys of it.

    Returns:
        The exit code: 2 if the recipe contradicts itself.
    """
    cli = PlanCLI(["fit", *recipe_arguments])
    recipe, run = cli.recipe, cli.recipe.run or run_name(files)
    first = first_samples(recipe)
    target = Target(options.nodes, options.gpus_per_node, options.gpu, options.interconnect, options.mfu)
    stage = first_stage(recipe.model.initial_weights, Path(files[0]).parent, cli.parse)
    facts = facts_of(run, recipe, first, target, stage)
    findings = findings_of(facts)
    text = report(facts, findings, options.mfu, Prices(options.price_per_gpu_hour, options.kg_co2_per_kwh))
    print(text)
    file = options.page or RUNS / run / PAGE
    write(file, page(run, text, example_of(first, facts.micro_batch)))
    print(f"One training sample as the model reads it: {file}")
    contradictions = any(finding.severity == "contradiction" for finding in findings)
    if options.simulate:
        lines = _simulated(recipe.model, facts)
        print("\n" + compared(lines))
        contradictions = contradictions or not all(line.agrees for line in lines)
    return 2 if contradictions else 0


def first_samples(recipe: Any) -> FirstSamples:
    """A parsed recipe in, its model built without memory, what of its data is at hand prepared and out.

    Raises:
        RecipeError: It does not say how long it trains, or the template does not suit its tokenizer.
    """
    if (recipe.max_steps or 0) < 1:
        raise RecipeError("max_steps is not set. Every recipe states how many optimizer steps it trains.")
    with torch.device("meta"):
        recipe.model.build()
        recipe.model.adapt()
    first = FirstSamples(recipe.data, recipe.model.sample_format(), recipe.max_steps)
    if first.complete:
        first.prepare()
    return first


def first_stage(source: str | None, folder: Path, parse: Callable[[list[Path]], Any]) -> FirstStage | None:
    """The run that a model starts from, if its checkpoint or its recipe, in the folder of this one, is here."""
    if source is None or Path(source).parent != RUNS:
        return None
    if checkpoints := complete_checkpoints(Path(source)):
        model, _ = rebuild(read_checkpoint_recipe(checkpoints[-1]))
    else:
        name, *overlays = Path(source).name.split("+")
        files = [folder / f"{name}.yaml", *(folder / "ablations" / f"{overlay}.yaml" for overlay in overlays)]
        if not all(file.is_file() for file in files):
            return None
        model = parse(files).model
    shape = model.sample_format()
    return FirstStage(source, shape.image_size, shape.tokens_per_image)


# --- simulation


def _simulated(model: VisionLanguageModel, facts: Facts) -> list[Comparison]:
    """The step of the plan by formula and by simulation, on samples of whole numbers."""
    now = facts.estimate
    if now is None or facts.running.strategy != HybridSharding.__name__:
        raise RecipeError(
            "--simulate plays a rank of a run whose memory is planned, and which components.sharding.HybridSharding shards over "
            f"GPUs; this recipe has {facts.running.strategy} on {'GPUs' if facts.running.on_gpus else 'CPUs'}. Name a trainer file "
            "such as recipes/trainer/fsdp_8xa100.yaml."
        )
    work = facts.workload
    sample = MeanSample(round(work.text_tokens), round(work.target_tokens), max(1, round(work.images_per_sample)))
    whole = workload_of(
        model,
        text_tokens=sample.text_tokens,
        target_tokens=sample.target_tokens,
        images_per_sample=sample.images,
        global_batch_size=work.global_batch_size,
        max_steps=work.max_steps,
    )
    assert facts.machine is not None
    formula = estimate(whole, facts.machine, now.schedule)
    samples = now.schedule.micro_batch * now.schedule.accumulation
    recomputed = whole.recomputed_flops if now.schedule.layout.activation_checkpointing == "full" else 0.0
    return compare(
        simulate(model, now.schedule, sample, progress=True),
        formula.communication.collectives,
        samples * (whole.flops_per_sample + recomputed),
        (formula.memory.total - formula.memory.allowance) * 2**30,
    )
