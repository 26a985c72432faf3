"""Gather: a parsed recipe in, the facts of its plan out; on the recipe's machine or on another."""

from dataclasses import dataclass, replace
from typing import Any

from components.errors import RecipeError
from components.gpus import GPU
from components.plan.choices import choices_of
from components.plan.estimates import estimate
from components.plan.facts import Asking, Facts, FirstStage, Running, Saving
from components.plan.machine import Machine
from components.plan.samples import FirstSamples, Lengths
from components.plan.schedule import Schedule
from components.plan.workload import workload_of
from components.sharding.layout import Layout
from components.vlm import VisionLanguageModel

NO_LIMIT: dict[str, tuple[Any, ...]] = {
    "fast_dev_run": (False, 0),
    "limit_train_batches": (None, 1.0),
    "overfit_batches": (0.0, None),
}
"""Keys of the trainer that end a run early, and the values that do not."""


@dataclass(frozen=True)
class Target:
    """The machine that a plan is asked for.

    Args:
        nodes: Computers; None: the recipe's.
        gpus_per_node: GPUs of each; None: the recipe's.
        gpu: Their model; None: the usual one where the recipe trains on GPUs.
        interconnect: Network of each node, such as 1.6Tb/s.
        mfu: MFU of computing alone, blocks compiled, in (0, 1].
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    interconnect: str = "1.6Tb/s"
    mfu: float = 0.5


def facts_of(run: str, recipe: Any, first: FirstSamples, target: Target, first_stage: FirstStage | None = None) -> Facts:
    """What a recipe comes to.

    Args:
        run: Name of its run.
        recipe: Its sections, instantiated, the model built and adapted on the meta device; the trainer's is a namespace.
        first: What of its data is at hand.
        target: The machine.
        first_stage: The run that it starts from.

    Raises:
        RecipeError: The machine is not known.
    """
    model, data = recipe.model, recipe.data
    machine, running = _running(recipe.trainer, target)
    lengths = first.lengths(recipe.plan)
    known = lengths or Lengths(1.0, 1.0, 1.0, "")
    workload = workload_of(
        model,
        text_tokens=known.text_tokens,
        target_tokens=known.supervised_tokens,
        images_per_sample=known.images_per_sample,
        global_batch_size=data.global_batch_size,
        max_steps=recipe.max_steps,
    )
    facts = Facts(
        run=run,
        workload=workload,
        rates={name: getattr(model.learning_rates, name) for name in model.parts},
        unlearned=_unlearned(model),
        seeded=isinstance(recipe.seed_everything, int) and not isinstance(recipe.seed_everything, bool),
        warmup_steps=recipe.warmup.num_steps(recipe.max_steps),
        floor=recipe.warmup.floor,
        running=running,
        saving=Saving(*(getattr(recipe.checkpoint, key) for key in ("every_n_steps", "every_n_minutes", "keep", "monitor"))),
        asking=Asking(
            tuple(recipe.validation.benchmarks),
            *(getattr(recipe.validation, key) for key in ("every_n_steps", "at_start", "at_end")),
        ),
        template=data.preparation.template,
        max_length=data.preparation.max_length,
        workers=data.num_workers,
        shares=tuple(first.shares),
        lengths=lengths,
        measured=len(first.prepared),
        measured_text=measured.text_tokens if (measured := first.measured()) else 0.0,
        truncated=sum(prepared.document.truncated for prepared in first.prepared),
        bad=tuple(first.bad),
        first_stage=first_stage,
        machine=machine,
    )
    if machine is None or lengths is None or not running.planned or not facts.divides:
        return facts
    layout = running.layout or _whole(running)
    if layout.ranks != machine.gpus:
        return facts
    now = estimate(workload, machine, Schedule(layout, facts.micro_batch, running.accumulation), target.mfu)
    return replace(facts, estimate=now, choices=choices_of(workload, machine, now, target.mfu, running.strategy))


def _running(trainer: Any, target: Target) -> tuple[Machine | None, Running]:
    """The machine of the recipe, or the one asked for, and how the recipe runs on it."""
    on_gpus = trainer.accelerator in ("gpu", "cuda") or target.gpu is not None
    stated = (trainer.num_nodes, _devices(trainer.devices, on_gpus and target.gpus_per_node is None))
    nodes, devices = target.nodes or stated[0], target.gpus_per_node or stated[1]
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    layout = _moved(getattr(strategy, "layout", None), stated, (nodes, devices))
    whole = name.startswith("fsdp") or getattr(strategy, "_state_dict_type", None) == "full"
    running = Running(
        on_gpus=on_gpus,
        nodes=nodes,
        devices=devices,
        accumulation=trainer.accumulate_grad_batches,
        precision=str(trainer.precision or "32-true"),
        strategy=name,
        planned=layout is not None or name == "auto" or name.lower().startswith(("ddp", "singledevice")),
        full_state=whole or getattr(strategy, "_save_distributed_checkpoint", True) is False,
        layout=layout,
        limited={key: str(trainer[key]) for key, values in NO_LIMIT.items() if trainer[key] not in values},
    )
    machine = Machine.of(nodes, devices, target.gpu or GPU, target.interconnect) if on_gpus else None
    return machine, running


def _devices(stated: Any, needed: bool) -> int:
    if isinstance(stated, list):
        return len(stated)
    if str(stated).isdigit():
        return int(stated)
    if needed:
        raise RecipeError(f"trainer.devices is {stated}: how many GPUs a node has is not known here. Give --gpus-per-node.")
    return 1


def _moved(layout: Layout | None, stated: tuple[int, int], planned: tuple[int, int]) -> Layout | None:
    """The layout on the machine that is planned for, where that is not the recipe's: sharded as widely as it was."""
    ranks = planned[0] * planned[1]
    if layout is None or stated == planned or layout.ranks == ranks:
        return layout
    return (
        replace(layout, replicas=1, shards=ranks)
        if layout.replicas == 1
        else replace(layout, replicas=planned[0], shards=planned[1])
    )


def _whole(running: Running) -> Layout:
    """The layout of a strategy that leaves the model whole on every rank."""
    return Layout(running.ranks, 1, "bfloat16" if running.precision.startswith("bf16") else "float32", whole=True)


def _unlearned(model: VisionLanguageModel) -> tuple[str, ...]:
    """Parts that start from random weights."""
    if model.initial_weights is not None:
        return ()
    own = {"vision_tower": getattr(model.vision_tower, "pretrained", None), "decoder": getattr(model.decoder, "weights", None)}
    return tuple(name for name in model.parts if own.get(name) is None)
