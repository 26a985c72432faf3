"""`python main.py plan`: the options of a plan, read before anything heavy is imported."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.errors import RecipeError
from components.gpus import GPU, GPUS
from components.recipe_files import named_recipes

PAGE = "plan.html"
NO_RECIPE = "No recipe given. Example: python main.py plan --config recipes/quickstart.yaml"


def main(arguments: list[str]) -> int:
    """Parse the options of `plan`, print its report and write its page."""
    options, recipe_arguments = _parser().parse_known_args(arguments)
    files = named_recipes(recipe_arguments)
    if not files:
        raise RecipeError(NO_RECIPE)
    from components.planning import plan  # heavy: only when there is something to plan

    return plan(options, files, recipe_arguments)


def _positive(kind: Callable[[str], Any], most: float = sys.float_info.max) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        number = kind(text)
        if not 0 < number <= most:
            raise ArgumentTypeError(f"{text} must be above 0{f' and at most {most:g}' if most < sys.float_info.max else ''}")
        return number

    read.__name__ = kind.__name__
    return read


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python main.py plan",
        usage="python main.py plan --config RECIPE [--config OVERLAY] [--any.key.of.the.recipe VALUE] [options]",
        description="What a recipe will cost and where it contradicts itself: in seconds, without weights, GPU or network. "
        "Contradictions end with exit code 2.",
        epilog="--config and keys of the recipe are those of fit: see python main.py fit --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    number, whole = _positive(float), _positive(int)
    add = parser.add_argument
    add("--nodes", type=whole, help="Computers, >= 1. Default: the recipe's trainer.num_nodes.")
    add("--gpus-per-node", type=whole, help="GPUs of each, >= 1. Default: the recipe's trainer.devices.")
    add("--gpu", choices=GPUS, help=f"Their model. Default: {GPU} if the recipe trains on GPUs, else none.")
    add(
        "--interconnect",
        default="1.6Tb/s",
        metavar="RATE",
        help="Network of each node, such as 200Gb/s or 1.6Tb/s (bits), or 25GB/s (bytes). Default: 1.6Tb/s.",
    )
    add(
        "--mfu",
        type=_positive(float, most=1.0),
        default=0.5,
        help="Share of the GPUs' peak that computing alone reaches with compiled blocks, in (0, 1], before it waits for "
        "communication. Default: 0.5.",
    )
    add("--price-per-gpu-hour", type=number, default=2.0, help="Price of one GPU for one hour, in any currency. Default: 2.")
    add("--kg-co2-per-kwh", type=number, default=0.385, help="CO2 of the electricity, in kg/kWh. Default: 0.385.")
    add("--simulate", action="store_true", help="Play one rank with the real sharding on tensors without memory, and compare.")
    add("--page", type=Path, metavar="FILE.html", help=f"Where the page with a training sample goes. Default: runs/NAME/{PAGE}.")
    return parser
