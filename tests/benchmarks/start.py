"""What a user waits for: help, mistakes, and the first step of the quickstart, each in fresh processes.

Rounds go through all commands, those of the code before (`--before`, another checkout) beside those of this one; medians with
their range. What must be told is compared in every run. "x bare import" is paired: the processor time of the command over that of
`import lightning.pytorch.cli` in the same round. The time to the first step ends after the first optimizer step, and is that of
the main process; its data worker and what a run does at its end are not in it.

python -m tests.benchmarks start [--before FOLDER] [--repeats N] [--only NAME ...]
"""

import contextlib
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tests.benchmarks import table

ROOT = Path(__file__).parents[2]
RECIPE = "{root}/recipes/quickstart.yaml"
BARE, FIRST_STEP = "bare import", "first step"
IMPORT = "import lightning.pytorch.cli"
COMMANDS: dict[str, tuple[list[str], int, str]] = {
    BARE: ([], 0, ""),
    "--help": (["--help"], 0, "commands:"),
    "unknown command": (["fitt"], 2, "Did you mean fit?"),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], 2, "nowhere.yaml cannot be read"),
    "not YAML": (["fit", "--config", "broken.yaml"], 2, "broken.yaml line 2 is not valid YAML"),
    "unknown section": (["fit", "--config", RECIPE, "--config", "section.yaml"], 2, "Did you mean model?"),
    "unknown key": (["fit", "--config", RECIPE, "--config", "key.yaml"], 2, "Did you mean model.weight_decay?"),
    "fit --help": (["fit", "--help"], 0, "--data.global_batch_size"),
    "plan --help": (["plan", "--help"], 0, "--interconnect"),
    "ask --help": (["ask", "--help"], 0, "--question"),
    "score --help": (["score", "--help"], 0, "--answers"),
    FIRST_STEP: (["fit", "--config", RECIPE, "--config", "first_step.yaml"], 0, ""),
}
"""What is asked of the command line, the exit code, and what it must say."""
FILES = {
    "broken.yaml": "seed_everything: [1\n",
    "section.yaml": "modle: {}\n",
    "key.yaml": "model: {weight_decai: 0.1}\n",
    "first_step.yaml": "trainer: {callbacks: [{class_path: first_step.FirstStep}]}\n",
    "first_step.py": """
import os, time
from pathlib import Path
from lightning import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step:
            Path("first_step").write_text(f"{time.time()} {time.process_time()}")
            os._exit(0)
""",
}


class Times(NamedTuple):
    """Of one process, in seconds."""

    wall: float
    processor: float


def run(name: str, root: Path) -> Times:
    """A command's name and the checkout whose code runs in, what it took out.

    Raises:
        SystemExit: It does not say what it must.
    """
    words, code, said = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        for file, text in FILES.items():
            Path(folder, file).write_text(text)
        what = ["-c", IMPORT] if name == BARE else [str(root / "main.py")]
        command = [sys.executable, *what, *(word.format(root=root) for word in words)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        with Path(folder, "said").open("w") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": folder}, start_new_session=True
            )
            returned = process.wait()
        end, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with contextlib.suppress(ProcessLookupError):  # what the first step leaves: a worker that has lost its run
            os.killpg(process.pid, signal.SIGKILL)
        told = Path(folder, "said").read_text()
        if returned != code or said not in told:
            raise SystemExit(f"{' '.join(command)} ended with {returned}, not {code}, or did not say '{said}':\n{told[-2000:]}")
        if name == FIRST_STEP:
            moment, processor = map(float, Path(folder, "first_step").read_text().split())
            return Times(moment - start, processor)
    return Times(end - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def figures(name: str, rounds: list[dict[str, Times]]) -> Iterator[str]:
    """Wall time, processor time, and that over the bare import's, each as `median [range]`."""
    mine = [each[name] for each in rounds]
    ratios = [each[name].processor / each[BARE].processor for each in rounds]
    for values, decimals in (([one.wall for one in mine], 2), ([one.processor for one in mine], 2), (ratios, 3)):
        middle, low, high = statistics.median(values), min(values), max(values)
        yield f"{middle:.{decimals}f} [{low:.{decimals}f}-{high:.{decimals}f}]"


def main(arguments: list[str]) -> str:
    """Time the commands, and return their table."""
    parser = ArgumentParser(prog="python -m tests.benchmarks start")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="Another checkout, whose commands run beside.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds, >= 1. Default: 5.")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME", help="Some of them.")
    options = parser.parse_args(arguments)
    names = [name for name in COMMANDS if name in {BARE, *options.only}]
    roots = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    rounds: dict[str, list[dict[str, Times]]] = {which: [] for which in roots}
    with tqdm(total=(options.repeats + 1) * len(names) * len(roots), file=sys.stderr, leave=False) as bar:
        for number in range(options.repeats + 1):
            for which in roots:
                rounds[which].append({})
            for name in names:
                for which in list(roots)[:: 1 if number % 2 else -1]:
                    bar.set_description(f"{name}, {which}")
                    rounds[which][-1][name] = run(name, roots[which])
                    bar.update()
    kept = {which: timed[1:] for which, timed in rounds.items()}  # the first one read the disk
    heads = ["wall s", "processor s", "x bare import"]
    columns = ["command", *(f"{head} {which}" if options.before else head for which in roots for head in heads)]
    rows = [[name, *(cell for which in roots for cell in figures(name, kept[which]))] for name in names]
    return table(
        f"Start of `main.py` in fresh processes, recipe quickstart, medians [range] of {options.repeats} rounds.", columns, rows
    )
