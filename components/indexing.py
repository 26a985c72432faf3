"""Look at every shard once, decide what is trained on, measure its length, and show it."""

import json
import sys
from argparse import Namespace
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

import torch

from components.atomic import save
from components.data.decontamination import find_overlaps, overlaps_of
from components.data.filters import open_selection, select
from components.data.histograms import Counts
from components.data.index_report import LISTED, SourceReport, in_html, in_text, printable, report_of_shards
from components.data.sources import Source, TarShards
from components.data.token_lengths import UNUSABLE, Measure, measure
from components.errors import RecipeError
from components.index_command import PAGE, SAMPLES
from components.plan.example import example_of
from components.plan.render import page, write
from components.plan.samples import FirstSamples
from components.planning import PlanCLI
from components.run_folder import RUNS, run_name
from components.shards.audit import MAX_KEYS, audit, problems_of, repeated_keys
from components.shards.names import expand_all
from components.shards.rows import ShardIndex
from components.shards.storage import Storage
from components.tokenizer import load_tokenizer

QUARANTINE = "quarantine.jsonl"


def index_shards(options: Namespace, shards: list[str], folder: Path) -> int:
    """Index shards without a recipe.

    Args:
        options: Those of the command.
        shards: Every one of them.
        folder: Where their index goes.
    """
    name = " ".join(options.shards)
    report = _audited(folder, shards, name, options)
    if options.against:
        report.notes += _shared_pictures(ShardIndex.open(folder, shards, options.shards), folder, options)
    _tell(name, [report], options.report or folder / PAGE)
    return 0


def index_recipe(options: Namespace, files: list[str], rest: list[str]) -> int:
    """Index every source of a recipe.

    Args:
        options: Those of the command.
        files: Recipe and overlays.
        rest: What is said of the recipe: these files, and keys of it.
    """
    cli = PlanCLI(["fit", *rest])
    recipe = cli.recipe
    run = recipe.run or run_name(files)
    if options.show and (recipe.max_steps or 0) < 1:
        raise RecipeError("max_steps is not set. Every recipe states how many optimizer steps it trains.")
    with torch.device("meta"):
        recipe.model.build()
        recipe.model.adapt()
    data, layout = recipe.data, recipe.model.sample_format()
    tokenizer = load_tokenizer(layout.tokenizer)
    data.preparation.try_out(tokenizer, layout)
    _check_folders(data.sources)
    reports = []
    for name, source in data.sources.items():
        try:
            work = Measure(source, data.preparation.overridden(source.overrides), tokenizer, layout)
            reports.append(_indexed(name, work, RUNS / run, options))
        except RecipeError as error:
            raise RecipeError(f"data.sources.{name}: {error}") from error
    _tell(run, reports, options.report or RUNS / run / PAGE)
    if options.show:
        first = FirstSamples(data, layout, recipe.max_steps)
        first.prepare(options.show)
        file = options.page or RUNS / run / SAMPLES
        write(file, page(run, "", example_of(first, options.show, options.show)))
        print("\n".join([*map(printable, first.bad), f"The first {options.show} samples of the run as they are trained: {file}"]))
    return 0


def _indexed(name: str, work: Measure, run: Path, options: Namespace) -> SourceReport:
    """Do what is missing of a source of a recipe, and report it."""
    source = work.source
    if isinstance(source, TarShards):
        report = _audited(Path(source.index), expand_all(source.shards), name, options)
        source.open_index()
        if options.against:  # first: the filters may exclude what is found
            report.notes += _shared_pictures(source.rows_of, Path(source.index), options)
        if source.selects:
            select(source.rows_of, source.filters, source.validation_fraction, source.storage, options.processes)
            selection = open_selection(source.rows_of, source.filters, source.validation_fraction)
            assert selection is not None
            report.use = {"used: train": int(selection.train.sum()), "used: validation": len(selection.held_out)}
            report.use |= {f"dropped: {reason}": count for reason, count in selection.dropped.items()}
        source.setup()
    else:
        notes = []
        if options.against:  # first: the source may exclude what is found
            notes = overlaps_of(source, options.against, options.distance, run / name, options.processes)
        source.setup()
        report = SourceReport(name, source.num_samples + len(source.validation_indices))
        report.notes += notes
    if source.fixed_text:
        _add_lengths(report, measure(work, options.processes, name))
    else:
        report.notes.append("lengths are not measured: what is asked of a picture differs from epoch to epoch")
    return report


def _shared_pictures(index: ShardIndex, folder: Path, options: Namespace) -> list[str]:
    """Which pictures of shards evaluations ask about, in a few lines."""
    return find_overlaps(index, Storage(), options.against, options.distance, folder, options.processes).lines()


def _add_lengths(report: SourceReport, lengths: Counts) -> None:
    unusable = int(lengths.counts[lengths.values == UNUSABLE].sum())
    if unusable:
        report.use["no usable text, or too long"] = unusable
    if lengths.total > unusable:
        usable = lengths.values != UNUSABLE
        report.histograms.append(("length of a sample", "tokens", Counts(lengths.values[usable], lengths.counts[usable])))


def _audited(folder: Path, shards: list[str], name: str, options: Namespace) -> SourceReport:
    """Look at the shards that have not been looked at, write down what is wrong, and report it."""
    audits = audit(shards, folder, options.processes)
    index = ShardIndex.open(folder, shards)
    report = report_of_shards(name, index, audits, Storage(), options.processes)

    def quarantine(file: BinaryIO) -> None:
        for one in audits:
            for problem in problems_of(folder, one):
                file.write(json.dumps({"shard": one.name, **problem._asdict()}).encode() + b"\n")
                if len(report.first) < LISTED:
                    report.first.append((one.name, problem))

    save(folder / QUARANTINE, quarantine)
    repeated = repeated_keys(index)
    if repeated is None:
        report.notes.append(f"there are more than {MAX_KEYS:,} samples: whether keys stand in two shards was not looked for")
    elif repeated:
        report.notes.append(f"{repeated:,} samples have the key of one in another shard: are shards there twice?")
    return report


def _check_folders(sources: dict[str, Source]) -> None:
    """See that sources of different shards have different folders for their indexes."""
    seen: dict[Path, tuple[str, list[str]]] = {}
    for name, source in sources.items():
        if isinstance(source, TarShards):
            shards = expand_all(source.shards)
            other, theirs = seen.setdefault(Path(source.index).resolve(), (name, shards))
            if shards != theirs:
                raise RecipeError(
                    f"data.sources.{name} and data.sources.{other} have one `index`, {source.index}, but other shards. Give each "
                    "a folder of its own."
                )


def _tell(title: str, reports: list[SourceReport], file: Path) -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have every character of a name
    print(in_text(reports))
    write(file, in_html(title, reports), "--report")
    print(f"The same with pictures: {file}")
