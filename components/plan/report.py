"""Report: the facts of a plan and what was found, as tables for the console."""

import re
import textwrap
from dataclasses import dataclass
from itertools import groupby

from components.benchmarks.report import aligned
from components.plan.estimates import Estimate
from components.plan.facts import Facts
from components.plan.findings import Finding
from components.plan.simulate import Comparison

POWER_USAGE = 1.1
"""Power of a computing center for each watt of its GPUs: an estimate."""
_WIDTH = 120


@dataclass(frozen=True)
class Prices:
    """What a run is charged with.

    Args:
        gpu_hour: Price of one GPU for one hour, in any currency.
        kg_co2_per_kwh: CO2 of the electricity, in kg/kWh.
    """

    gpu_hour: float
    kg_co2_per_kwh: float


def report(facts: Facts, findings: list[Finding], mfu: float, prices: Prices) -> str:
    """All tables of a plan, one under the other.

    Args:
        facts: The resolved recipe.
        findings: What was found in it.
        mfu: The MFU that its computing was assumed to reach.
        prices: What it is charged with.
    """
    blocks = [_summary(facts), _parts(facts), _units(facts), _sources(facts)]
    if facts.lengths is not None:
        blocks.append(_flops(facts))
    if facts.estimate is not None:
        blocks += [_memory(facts.estimate), _exchange(facts.estimate)]
        blocks += [_schedules(facts, mfu), _price(facts, facts.estimate, prices)]
    elif facts.running.on_gpus:
        blocks.append(["memory, communication and days are not planned: see the findings"])
    else:
        blocks.append(["no GPU: memory and days are not planned; --gpu a100-80gb plans for one"])
    blocks.append(_findings(findings))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def compared(lines: list[Comparison]) -> str:
    """What formulas and a simulation say of the same step."""
    cells = [["formulas against a simulated rank", "formula", "simulated", "difference", ""]]
    for line in lines:
        verdict = "" if line.tolerance is None else "agrees" if line.agrees else "DIFFERS"
        numbers = [f"{number:,.2f}" if isinstance(number, float) else f"{number:,}" for number in (line.formula, line.simulated)]
        cells.append([line.quantity, *numbers, f"{line.difference:+.1%}", verdict])
    return "\n".join(aligned(cells)) + "\n"


def _summary(facts: Facts) -> list[str]:
    work, running = facts.workload, facts.running
    ranks = "1 rank" if running.ranks == 1 else f"{running.ranks} ranks"
    share = f"{facts.warmup_steps / work.max_steps:.1%}"
    rows = [
        ("steps", f"{work.max_steps:,} x {work.global_batch_size:,} samples = {work.samples:,}"),
        (
            "batch",
            f"{ranks} x {facts.micro_batch} in a micro-batch x {running.accumulation} accumulated",
        ),
        ("warmup", f"{facts.warmup_steps:,} steps, {share} of the run, then a cosine to {facts.floor:g} of the peak"),
        (
            "pictures",
            f"{work.image_size} x {work.image_size} px, {work.num_patches} patches, {work.tokens_per_image} visual tokens",
        ),
    ]
    if facts.lengths is not None:
        visual = work.tokens - facts.lengths.text_tokens
        rows.append(
            (
                "sample",
                f"{work.tokens:.0f} tokens: {visual:.0f} visual and {facts.lengths.text_tokens:.0f} text, of which "
                f"{facts.lengths.supervised_tokens:.0f} supervised; {facts.lengths.origin}",
            )
        )
    if facts.machine is not None:
        machine = facts.machine
        network = f", {machine.interconnect * 8 / 1e9:,.0f} Gb/s between nodes" if machine.nodes > 1 else ""
        rows.append(("machine", f"{machine.nodes} x {machine.gpus_per_node} {machine.gpu.name}{network}"))
    rows.append(("checkpoints", _saving(facts)))
    return [facts.run, *(f"  {name:<13}{text}" for name, text in rows)]


def _saving(facts: Facts) -> str:
    saving = facts.saving
    every = [f"every {saving.every_n_steps:,} steps"] if saving.every_n_steps else []
    every += [f"every {duration(60 * saving.every_n_minutes)}"] if saving.every_n_minutes else []
    text = f"{_bytes(facts.checkpoint_bytes)} each, {' and '.join(every) or 'only at the end'}, {saving.keep} kept"
    if facts.machine is None:
        return text
    worst, best = map(duration, facts.best_intervals)
    return f"{text}; failures cost least with one every {worst} to {best}"


def _parts(facts: Facts) -> list[str]:
    cells = [["part", "parameters", "trained", "peak learning rate"]]
    for name, part in facts.workload.parts.items():
        rate = facts.rates[name]
        cells.append([name, f"{part.parameters:,}", f"{part.trained_parameters:,}", "frozen" if rate is None else f"{rate:g}"])
    return aligned(cells)


def _units(facts: Facts) -> list[str]:
    """Parameters that are gathered together; equal ones, such as the blocks of a decoder, are one row."""
    if facts.running.layout is None:
        return []
    cells = [["sharding unit", "number", "parameters each", "trained"]]

    def kind(unit: object) -> tuple[str, int, int]:
        sizes = [(parameter.size, parameter.trained) for parameter in unit.parameters]  # type: ignore[attr-defined]
        name = re.sub(r"\.\d+$", ".*", unit.name)  # type: ignore[attr-defined]
        return name, sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)

    for (name, size, trained), alike in groupby(facts.workload.units, key=kind):
        shown = "all" if trained == size else f"{trained:,}" if trained else "frozen"
        cells.append([{"model": "the rest"}.get(name, name), str(len(list(alike))), f"{size:,}", shown])
    return aligned(cells)


def _sources(facts: Facts) -> list[str]:
    cells = [["source", "share", "samples", "epochs"]]
    for share in facts.shares:
        known = ["not here", ""] if share.samples is None else [f"{share.samples:,}", f"{share.epochs:.2f}"]
        cells.append([share.name, f"{share.share:.1%}", *known])
    return aligned(cells)


def _flops(facts: Facts) -> list[str]:
    work = facts.workload
    unit, scale = ("TFLOP", 1e12) if work.flops_per_sample > 1e10 else ("MFLOP", 1e6)
    cells = [["", f"{unit} a sample", f"{unit} a step", "share"]]
    for name, flops in [*work.flops.items(), ("all", work.flops_per_sample)]:
        step = flops * work.global_batch_size
        cells.append([name, _number(flops / scale), _number(step / scale), f"{flops / work.flops_per_sample:.1%}"])
    return aligned(cells)


def _memory(now: Estimate) -> list[str]:
    memory = now.memory
    cells = [["GiB on each GPU", ""], *([name, f"{size:.1f}"] for name, size in memory.components.items())]
    verdict = "fits" if memory.fits else "does not fit"
    return [*aligned([*cells, ["all", f"{memory.total:.1f}"]]), f"{verdict}: a GPU has {memory.usable:.1f}"]


def _exchange(now: Estimate) -> list[str]:
    if not any(collective.calls for collective in now.communication.collectives.values()):
        return []
    cells = [["exchanged in a step, by each rank", "calls", "GB", "seconds"]]
    for kind, collective in now.communication.collectives.items():
        if collective.calls:
            seconds = f"{now.communication.seconds_by_kind[kind]:.2f}"
            cells.append([kind, f"{collective.calls:,}", f"{collective.bytes / 1e9:,.1f}", seconds])
    total = f"{now.communication.seconds:.2f}"
    return aligned([*cells, ["all", "", "", total], ["computing, to hide it behind", "", "", f"{now.compute_seconds:.2f}"]])


def _schedules(facts: Facts, mfu: float) -> list[str]:
    """The recipe's schedule and better ones: a step's time is between perfect overlap and none."""
    assert facts.estimate is not None
    rows = [("recipe", facts.estimate), *zip("ABC", (choice.estimate for choice in facts.choices), strict=False)]
    cells = [
        [
            "schedule",
            "ranks",
            "micro-batch",
            "accumulated",
            "recompute",
            "GiB",
            "step s",
            "no overlap",
            "MFU",
            "tokens/s",
            "all steps",
        ]
    ]
    for name, one in rows:
        layout = one.schedule.layout
        cells.append(
            [
                name,
                f"{layout.replicas} x {layout.shards}",
                f"{one.schedule.micro_batch}",
                f"{one.schedule.accumulation}",
                layout.activation_checkpointing,
                f"{one.memory.total:.0f}",
                f"{one.overlapped_seconds:.2f}",
                f"{one.serial_seconds:.2f}",
                f"{one.overlapped_mfu:.0%}",
                f"{one.tokens_per_second:,.0f}",
                duration(one.days * 86400),
            ]
        )
    note = f"computing at {mfu:.0%} MFU; tokens/s and all steps with perfect overlap"
    overlays = [f"{name}  {choice.why}: {choice.overlay}" for name, choice in zip("ABC", facts.choices, strict=False)]
    return [*aligned(cells), note, *overlays]


def _price(facts: Facts, now: Estimate, prices: Prices) -> list[str]:
    assert facts.machine is not None
    price = now.gpu_hours * prices.gpu_hour
    watts = facts.machine.gpu.watts
    kwh = now.gpu_hours * watts / 1000 * POWER_USAGE
    co2 = kwh * prices.kg_co2_per_kwh
    weight = f"{co2 / 1000:,.1f} t" if co2 >= 1000 else f"{co2:.1f} kg"
    return [
        f"{duration(now.days * 86400)}, {now.gpu_hours:,.0f} GPU-hours, {price:,.0f} at {prices.gpu_hour:g} a GPU-hour",
        f"{kwh:,.0f} kWh at {watts:g} W a GPU and {POWER_USAGE} for the building, {weight} CO2 at {prices.kg_co2_per_kwh:g} kg/kWh",
    ]


def _findings(findings: list[Finding]) -> list[str]:
    if not findings:
        return ["no findings"]
    lines = []
    for finding in findings:
        first, *others = f"{finding.severity} ({finding.name}): {finding.text}".splitlines()
        lines += [*textwrap.wrap(first, _WIDTH, subsequent_indent="  "), *(f"  {line}" for line in others)]
    return lines


def duration(seconds: float) -> str:
    """A time in the unit in which it has few digits."""
    scale, unit = next(
        (scale, unit) for scale, unit in ((86400, "days"), (3600, "h"), (60, "min"), (0, "s")) if seconds >= 2 * scale
    )
    return f"{seconds / (scale or 1):.2g} {unit}" if seconds < 10 * (scale or 1) else f"{seconds / (scale or 1):.0f} {unit}"


def _bytes(number: int) -> str:
    scale, unit = next((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1.0, "B")) if number >= scale)
    return f"{number / scale:,.0f} {unit}"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
