"""`python main.py index`: its options, read before anything heavy is imported."""

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from components.errors import RecipeError
from components.recipe_files import named_recipes
from components.shards.names import expand_all, is_remote

PAGE, SAMPLES = "index.html", "samples.html"
NEAR = 8
"""Bits of the perceptual hash in which near pictures may differ, where nothing else is said."""
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
        if rest or options.show:
            wrong = rest[0] if rest else "--show"
            raise RecipeError(f"{wrong} goes with --config RECIPE, not with --shards.")
        shards = expand_all(options.shards)
        folder = options.index or _beside(shards)
        from components.indexing import index_shards  # heavy: only when there is something to index

        return index_shards(options, shards, folder)
    files = named_recipes(rest)
    if not files:
        raise RecipeError(NOTHING)
    if options.index is not None:
        raise RecipeError(
            "--index goes with --shards. A recipe states the folder of each source: data.sources.NAME.init_args.index."
        )
    from components.indexing import index_recipe  # heavy, as above

    return index_recipe(options, files, rest)


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
