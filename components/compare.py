"""`python main.py compare`: the difference between two validations of the same questions, with its interval.

Source: paired bootstrap over pictures, as in Koehn, Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004).
"""

from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser

from components.benchmarks import Benchmark
from components.benchmarks.benchmark import listed
from components.benchmarks.records import Record, read_record
from components.benchmarks.report import aligned
from components.benchmarks.tally import CONFIDENCE, Tally, interval
from components.errors import RecipeError

MUST_AGREE = ("version", "split", "prompt_hash", "normalizer")
"""What two records must have in common, or their difference is not the models'."""
MENTIONED = ("template", "image_mode", "image_decoding", "decoding", "precision")
"""What may differ with the models; the table says so."""


def compare(a: Path, b: Path, anyway: bool = False) -> str:
    """The difference between two validations, B - A, over all and for each category.

    Args:
        a: Record of a validation (`runs/A/validation/gqa_step_500.json`), or its answers.
        b: Another, of the same benchmark.
        anyway: Whether to compare though prompts, splits or questions differ: over the questions that both have answered.

    Returns:
        The table.

    Raises:
        RecipeError: A record is missing, or the two are not of the same questions, prompts and scoring.
    """
    first, second = read_record(a), read_record(b)
    differences = _differences(first, second)
    if differences and not anyway:
        raise RecipeError(
            f"{first.path} and {second.path} are not comparable:\n  " + "\n  ".join(differences) + "\n--anyway true compares the "
            "questions that both have answered."
        )
    shared = {question.id for question in first.asked} & {question.id for question in second.asked}
    if not shared:
        raise RecipeError(f"{first.path} and {second.path} have no question in common.")
    tallies = [_tally(record, shared) for record in (first, second)]
    if tallies[0].units != tallies[1].units:
        raise RecipeError(f"{first.path} and {second.path} ask about different pictures under the same ids.")
    title = f"{first.facts['name']}: {first.benchmark.describe()}"
    heads = [f"{letter}  {record.path}, {record.facts['when']}" for letter, record in (("A", first), ("B", second))]
    counted = f"{len(shared)} questions about {len(tallies[0].units)} pictures"
    end = f"{counted}; * the interval leaves out 0, as one in twenty does by chance"
    notes = [f"but {difference}" for difference in differences] + _mentions(first, second)
    return "\n".join([title, *heads, *aligned(_cells(first.benchmark, *tallies)), end, *notes]) + "\n"


def _tally(record: Record, ids: set[str]) -> Tally:
    return record.benchmark.tally([question for question in record.asked if question.id in ids], record.answers)


def _cells(benchmark: Benchmark, first: Tally, second: Tally) -> list[list[str]]:
    """A row for each metric of both. Tallies of the same units are resampled alike, so that differences are paired."""
    values, resampled = ([benchmark.metrics(getattr(one, kind)()) for one in (first, second)] for kind in ("totals", "resampled"))
    cells = [["", "A", "B", "B - A", f"{CONFIDENCE:.0%} interval", ""]]
    form = f".{benchmark.decimals}f"
    for metric in (name for name in values[0] if name in values[1]):
        a, b = (float(one[metric]) for one in values)
        low_high = interval(np.asarray(resampled[1][metric]) - np.asarray(resampled[0][metric]))
        shown = " to ".join(f"{edge:+{form}}" for edge in low_high or ())
        star = "*" if low_high and not low_high[0] <= 0 <= low_high[1] else ""
        cells.append([metric, f"{a:{form}}", f"{b:{form}}", f"{b - a:+{form}}", shown, star])
    return cells


def _differences(first: Record, second: Record) -> list[str]:
    classes = [record.facts["benchmark"]["class_path"] for record in (first, second)]
    if classes[0] != classes[1]:
        raise RecipeError(f"{first.path} is of {classes[0]}, {second.path} of {classes[1]}: there is nothing to compare.")
    differences = [
        f"{key}: {first.facts.get(key)} and {second.facts.get(key)}"
        for key in MUST_AGREE
        if first.facts.get(key) != second.facts.get(key)
    ]
    theirs = {question.id: question for question in second.asked}
    ours = {question.id: question for question in first.asked}
    for where, names in ((first.path, theirs.keys() - ours.keys()), (second.path, ours.keys() - theirs.keys())):
        if names:
            differences.append(f"{len(names)} questions are missing in {where}: {listed(list(names))}")
    changed = [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    if changed:
        differences.append(f"{len(changed)} questions have another prompt, picture or reference: {listed(changed)}")
    return differences


def _mentions(first: Record, second: Record) -> list[str]:
    pairs = {key: (first.facts.get(key), second.facts.get(key)) for key in MENTIONED}
    mentions = [f"{key} differs: {ours} and {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    unsure = [str(record.path) for record in (first, second) if record.facts.get("prompt_verified") is False]
    return mentions + [f"the answers of {path} do not state what was asked" for path in unsure]


def main(arguments: list[str]) -> int:
    """Parse the options of `compare` and print the table."""
    parser = ArgumentParser(
        prog="python main.py compare", description="The difference between two validations, with its interval.", exit_on_error=False
    )
    parser.add_function_arguments(compare, as_positional=True)
    print(compare(**parser.parse_args(arguments).as_dict()), end="")
    return 0
