"""Findings: where a recipe costs more, or risks more, than it need; with the contradictions, all that a plan finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from components.plan.contradictions import CONTRADICTIONS, static_memory, visual_tokens
from components.plan.facts import DAYS_BETWEEN_FAILURES, Facts

WORTH_IT = 1.2
"""Gain from which on a schedule is surely faster: a smaller one is within the errors of a plan."""
MANY_EPOCHS = 10
FEW = 0.05
"""Share of the samples that may lose their last turns without a word."""
FAR = 2
"""How many times too rare checkpoints are at least: what they cost is flat around the best interval."""
OTHERWISE = 1.25
"""Ratio from which on the stated length of a sample is not that of the first samples."""
INSTEAD = "Take components.sharding.HybridSharding, as recipes/trainer/fsdp_8xa100.yaml does."
BF16 = "Take --trainer recipes/trainer/gpu.yaml on one GPU (fsdp_8xa100.yaml on eight), or make it bf16-mixed."

Severity = Literal["contradiction", "finding"]


@dataclass(frozen=True)
class Finding:
    """Something that its author would want to know before the recipe runs.

    Args:
        name: Of the check that found it.
        severity: A contradiction ends the plan with exit code 2.
        text: What, where, with which values, and the remedy.
    """

    name: str
    severity: Severity
    text: str


# --- what a step costs


def memory(facts: Facts) -> str | None:
    """The step does not fit."""
    if facts.estimate is None or facts.estimate.memory.fits or static_memory(facts):
        return None
    need = facts.estimate.memory
    return (
        f"micro-batches of {facts.estimate.schedule.micro_batch} need about {need.total:.0f} GiB of each GPU, which has "
        f"{need.usable:.0f}. {facts.instead('Raise trainer.accumulate_grad_batches, or recompute activations.')}"
    )


def communication(facts: Facts) -> str | None:
    """The GPUs wait for the network."""
    now = facts.estimate
    if now is None or now.communication.seconds <= now.compute_seconds:
        return None
    schedule, layout = now.schedule, now.schedule.layout
    return (
        f"communication-bound: a step exchanges for {now.communication.seconds:.1f} s and computes for {now.compute_seconds:.1f} s "
        f"({schedule.accumulation} micro-batches of {schedule.micro_batch}, {layout.replicas} x {layout.shards} ranks), so that "
        f"MFU is {now.overlapped_mfu:.0%} at most. {facts.instead('No other schedule that fits hides it.')}"
    )


def accumulation(facts: Facts) -> str | None:
    """A larger micro-batch would do the same, faster."""
    now = facts.estimate
    if now is None or not facts.choices or facts.choices[0].gain < WORTH_IT:
        return None
    better = facts.choices[0].estimate.schedule
    if better.accumulation >= now.schedule.accumulation:
        return None
    return (
        f"trainer.accumulate_grad_batches = {now.schedule.accumulation} with micro-batches of {now.schedule.micro_batch}: "
        f"{better.accumulation} with {better.micro_batch} fits and is {facts.choices[0].gain:.1f} x faster, for the same step"
        + (", by the same overlay." if communication(facts) else f". {facts.instead()}")
    )


def schedule(facts: Facts) -> str | None:
    """Another schedule would do the same, faster."""
    if facts.estimate is None or not facts.estimate.memory.fits or accumulation(facts) or communication(facts):
        return None
    if not facts.choices or facts.choices[0].gain < WORTH_IT:
        return None
    return f"another schedule of the same step is {facts.choices[0].gain:.1f} x faster. {facts.instead()}"


# --- what a sample is


def lengths(facts: Facts) -> str | None:
    """Nobody knows how long a sample is."""
    if facts.lengths is not None:
        return None
    return (
        "the length of a sample is not known here, and with it tokens, FLOPs, memory and days are not: the data or the tokenizer "
        "are elsewhere. State it in the recipe, such as plan: {text_tokens: 64}."
    )


def stated_lengths(facts: Facts) -> str | None:
    """The recipe says otherwise of its samples than they themselves."""
    known, measured = facts.lengths, facts.measured_text
    if known is None or not measured or max(known.text_tokens / measured, measured / known.text_tokens) < OTHERWISE:
        return None
    return (
        f"plan.text_tokens is {known.text_tokens:g}, but the first {facts.measured} samples have {measured:.0f} on average. "
        "Correct it, or remove the section plan: then they are measured."
    )


def max_length(facts: Facts) -> str | None:
    """Documents are cut."""
    known, limit = facts.lengths, facts.max_length
    if known is None or visual_tokens(facts):
        return None
    remedy = "whole turns are dropped from their ends. Raise data.max_length, or take fewer visual tokens."
    if facts.workload.tokens > limit:
        visual = facts.workload.tokens - known.text_tokens
        return (
            f"the mean sample has {facts.workload.tokens:.0f} tokens, {visual:.0f} of them visual, but data.max_length is {limit}: "
            f"{remedy}"
        )
    if facts.measured and facts.truncated > FEW * facts.measured:
        return f"{facts.truncated} of the first {facts.measured} samples are longer than data.max_length = {limit}: {remedy}"
    return None


def bad_samples(facts: Facts) -> str | None:
    """Samples that cannot be used."""
    if not facts.bad:
        return None
    of = len(facts.bad) + facts.measured
    return f"{len(facts.bad)} of the first {of} samples cannot be used. The first: {facts.bad[0]}"


def epochs(facts: Facts) -> str | None:
    """A source comes by again and again."""
    often = [share for share in facts.shares if share.epochs is not None and share.epochs > MANY_EPOCHS]
    if not often or not facts.running.on_gpus:
        return None
    share = max(often, key=lambda share: share.epochs or 0.0)
    return (
        f"data.sources.{share.name} comes by {share.epochs:.0f} times ({share.samples:,} samples, {share.share:.1%} of the "
        "mixture): it will be learned by heart. Lower its weight, or max_steps."
    )


def workers(facts: Facts) -> str | None:
    """The GPUs wait for pictures to be decoded."""
    if facts.workers or not facts.running.on_gpus:
        return None
    return "data.num_workers is 0: every step waits for its pictures to be decoded. Give each rank some, such as 8."


# --- what is learned


def random_and_frozen(facts: Facts) -> str | None:
    """A part stays as chance made it."""
    parts = [name for name in facts.unlearned if facts.rates[name] is None]
    if not parts:
        return None
    return (
        f"model.learning_rates.{parts[0]} is null, but the part has random weights, which then stay random. Give it a learning "
        "rate, pretrained weights, or model.initial_weights."
    )


def precision(facts: Facts) -> str | None:
    """Numbers too coarse to train on, or finer than the GPU is fast at."""
    stated, layout = facts.running.precision, facts.running.layout
    if stated.startswith("16"):
        return f"trainer.precision is {stated}: float16 overflows at 65,504. Train in bfloat16. {BF16}"
    if stated == "bf16-true":
        return (
            "trainer.precision is bf16-true: bfloat16 weights have 8 bits, so that most steps of a small learning rate round to "
            f"nothing. Keep fp32 weights. {BF16}"
        )
    if not facts.running.on_gpus:
        return None
    if layout is None and stated in ("32", "32-true"):
        return f"trainer.precision is {stated}: a GPU multiplies float32 many times slower than bfloat16. {BF16}"
    if layout is not None and layout.param_dtype == "float32":
        return "trainer.strategy computes in float32, which a GPU does many times slower. Make its param_dtype bfloat16."
    return None


def ends_early(facts: Facts) -> str | None:
    """The run stops before its schedule."""
    if not facts.running.limited:
        return None
    key, value = next(iter(facts.running.limited.items()))
    return (
        f"trainer.{key} = {value} ends the run before max_steps = {facts.workload.max_steps:,}, to which the cosine of the "
        "learning rate runs. Remove it, and give max_steps."
    )


def seed(facts: Facts) -> str | None:
    """Chance decides, and decides anew at every start."""
    if facts.seeded:
        return None
    return "seed_everything is not a number: every start draws another, so that a run does not continue. State it, such as 42."


def never_asked(facts: Facts) -> str | None:
    """A validation that never comes."""
    asking, run = facts.asking, facts.workload.max_steps
    due = asking.every_n_steps is not None and asking.every_n_steps <= run
    if not asking.benchmarks or due or asking.at_start or asking.at_end:
        return None
    return (
        f"validation asks {', '.join(asking.benchmarks)} never: every_n_steps = {asking.every_n_steps} of {run:,} steps, at_start "
        "and at_end false. Give at_end: true, or a smaller every_n_steps."
    )


# --- what is kept


def unsaved(facts: Facts) -> str | None:
    """Nothing is saved before the end."""
    saving, run = facts.saving, facts.workload.max_steps
    if saving.every_n_minutes is not None or (saving.every_n_steps is not None and saving.every_n_steps < run):
        return None
    return (
        f"checkpoint.every_n_steps = {saving.every_n_steps} and every_n_minutes = null: nothing is saved before the end, and a run "
        "that is interrupted begins anew. Give every_n_minutes: 30."
    )


def rare_checkpoints(facts: Facts) -> str | None:
    """A failure loses more than it need."""
    interval = facts.save_interval
    worst, best = facts.best_intervals
    if interval is None or facts.machine is None or interval <= FAR * best:
        return None
    return (
        f"checkpoints come every {interval / 60:.0f} minutes. With a failure every {DAYS_BETWEEN_FAILURES[0]:.0f} to "
        f"{DAYS_BETWEEN_FAILURES[1]:.0f} days of 128 GPUs, {facts.running.ranks} lose the least time with one every "
        f"{worst / 60:.0f} to {best / 60:.0f} minutes. Give checkpoint.every_n_minutes: {worst / 60:.0f}."
    )


def full_state(facts: Facts) -> str | None:
    """A checkpoint passes through one rank."""
    if not facts.running.full_state:
        return None
    return (
        f"trainer.strategy {facts.running.strategy} gathers every checkpoint whole, {facts.checkpoint_bytes / 1e9:.0f} GB, in the "
        f"memory of one rank. {INSTEAD}"
    )


def unknown_strategy(facts: Facts) -> str | None:
    """A strategy that the model is not laid out for."""
    if facts.running.planned or facts.running.full_state:
        return None
    return f"trainer.strategy {facts.running.strategy} is none of ours: its memory and communication are not planned. {INSTEAD}"


FINDINGS = (
    memory,
    communication,
    accumulation,
    schedule,
    lengths,
    stated_lengths,
    max_length,
    bad_samples,
    epochs,
    workers,
    random_and_frozen,
    precision,
    ends_early,
    seed,
    never_asked,
    unsaved,
    rare_checkpoints,
    full_state,
    unknown_strategy,
)
"""All of them."""


def findings_of(facts: Facts) -> list[Finding]:
    """Everything that is found, contradictions first."""
    kinds: tuple[tuple[Severity, tuple[Callable[[Facts], str | None], ...]], ...] = (
        ("contradiction", CONTRADICTIONS),
        ("finding", FINDINGS),
    )
    return [
        Finding(check.__name__, severity, text)
        for severity, checks in kinds
        for check in checks
        if (text := check(facts)) is not None
    ]
