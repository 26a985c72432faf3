"""`python main.py index`: look at every shard once, decide what is trained on, measure its length, and show it."""

import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

import torch

from components.atomic import save
from components.data.decontamination import NEAR, find_overlaps, overlaps_of
from components.data.filters import open_selection, select
from components.data.histograms import Counts
from components.data.index_report import LISTED, SourceReport, in_html, in_text, printable, report_of_shards
from components.data.sources import Source, TarShards
from components.data.token_lengths import UNUSABLE, Measure, measure
from components.errors import RecipeError
from components.plan.example import example_of
from components.plan.render import page, write
from components.plan.samples import FirstSamples
from components.plan_command import PlanCLI
from components.recipe_files import named_recipes
from components.run_folder import RUNS, run_name
from components.shards.audit import MAX_KEYS, audit, problems_of, repeated_keys
from components.shards.names import expand_all, is_remote
from components.shards.rows import ShardIndex
from components.shards.storage import Storage
from components.tokenizer import load_tokenizer

PAGE, SAMPLES, QUARANTINE = "index.html", "samples.html", "quarantine.jsonl"
NOTHING = (
    "Neither shards nor a recipe given. Examples: python main.py index --shards 'data/cc3m/{00000..00331}.tar', or "
    "python main.py index --config recipes/meta_llava_13b_pretrain.yaml"
)


def main(arguments: list[str]) -> int:
    """Parse the options of `index`, do what is missing, print the report and write its pages."""
    options, rest = _parser().parse_known_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes share the work, not threads
    for option, needed in (("distance", "against"), ("page", "show")):
        if getattr(options, option) is not None and not getattr(options, needed):
            raise RecipeError(f"--{option} says nothing without --{needed}. Give both, or neither.")
    options.distance = NEAR if options.distance is None else options.distance
    if options.shards:
        return _index_shards(options, rest)
    files = named_recipes(rest)
    if not files:
        raise RecipeError(NOTHING)
    if options.index is not None:
        raise RecipeError(
            "--index goes with --shards. A recipe states the folder of each source: data.sources.NAME.init_args.index."
        )
    return _index_recipe(options, rest, files)


def _index_shards(options: Namespace, rest: list[str]) -> int:
    if rest or options.show:
        wrong = rest[0] if rest else "--show"
        raise RecipeError(f"{wrong} goes with --config RECIPE, not with --shards.")
    shards = expand_all(options.shards)
    folder = options.index or _beside(shards)
    name = " ".join(options.shards)
    report = _audited(folder, shards, name, options)
    if options.against:
        report.notes += _shared_pictures(ShardIndex.open(folder, shards, options.shards), folder, options)
    _tell(name, [report], options.report or folder / PAGE)
    return 0


def _index_recipe(options: Namespace, rest: list[str], files: list[str]) -> int:
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


def _beside(shards: list[str]) -> Path:
    """The folder `index` beside shards of this machine."""
    if any(is_remote(shard) for shard in shards):
        raise RecipeError("The shards are not on this machine: name a folder for their index with --index FOLDER.")
    return Path(os.path.commonpath([Path(shard).absolute().parent for shard in shards])) / "index"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python main.py index",
        usage="python main.py index --shards PATTERN ... [--index FOLDER] [options]\n"
        "       python main.py index --config RECIPE [--config OVERLAY] [--any.key.of.the.recipe VALUE] [options]",
        description="Looks at every tar shard once: where its samples are, what is damaged, and whether as many are there as "
        "img2dataset wrote. With a recipe also decides which samples its filters leave, and how many tokens each of them becomes. "
        "What is done is kept, so that the same command continues where it was interrupted.",
        epilog="--config and keys of the recipe are those of fit: see python main.py fit --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--shards", nargs="+", metavar="PATTERN", help="Tar shards: paths or urls with {00000..00331}, {a,b} or *, quoted.")
    add("--index", type=Path, metavar="FOLDER", help="Where their index goes. Default: the folder index beside them.")
    add("--processes", type=_whole(1), default=_cores(), help="Processes that share the work, >= 1. Default: one for each core.")
    add("--show", type=_whole(1), metavar="N", help="Write a page with the first N samples of the run as they are trained, >= 1.")
    add("--page", type=Path, metavar="FILE.html", help=f"Where that page goes. Default: runs/NAME/{SAMPLES}.")
    add(
        "--against",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="List the training pictures that are also in these folders of evaluations, at any depth or in .zip files: "
        "overlaps.jsonl, overlaps.html, and exclude.jsonl for `filters: {exclude: ...}` of a recipe, beside the index; those of "
        "other sources in runs/NAME/SOURCE, with kept.jsonl or exclude.jsonl to train without them.",
    )
    add(
        "--distance",
        type=_whole(0, 16),
        metavar="BITS",
        help=f"Bits of 64 in which the perceptual hashes of pictures that look the same may differ, 0 to 16. Default: {NEAR}.",
    )
    add("--report", type=Path, metavar="FILE.html", help=f"Where the report goes. Default: runs/NAME/{PAGE}, or FOLDER/{PAGE}.")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise ArgumentTypeError(f"{text} must be at least {least}{f' and at most {most}' if most < sys.maxsize else ''}")
        return int(text)

    return number
