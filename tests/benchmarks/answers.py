"""Answers a second of our validation beside transformers' LLaVA, in batches and one question at a time: equal answers first.

The questions are ShapesWorld's, in the batches that validation makes of them; the weights are random, and the end token is one that
ends answers early enough. Clock: processor time of one thread, on a GPU time; tokenized prompts in, token ids out. Each round times
all ways in turn, and ratios are of the same round.

python -m tests.benchmarks answers [--device cuda --dtype bfloat16 --decoder recipes/decoder/llama2_7b.yaml
    --tower recipes/vision_tower/clip_vit_l_336.yaml] [--before FOLDER]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from callbacks.validation.asking import Prompts, share
from components.batch import Document
from components.benchmarks import ShapesWorld
from components.data import Preparation
from components.shapes_world import Setting
from components.sharding import give_memory
from components.vlm import VisionLanguageModel
from tests.benchmarks import table

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
OURS, BATCHES, ALONE = "ours", "transformers, batches", "transformers, one at a time"
BEFORE, NOW = "before", "now"
"""The code of another folder and this, each in a process that does nothing else."""
SMALL_LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Who is asked what.

    Args:
        title: In the table.
        model: Section `model` of a recipe, with its parts in place.
        scenes: Pictures that are asked about.
        each: Most questions about a picture.
        batch_size: Prompts that are answered together.
        tokens: Longest answer.
        mean: About how long answers are.
        end: Token that ends an answer.
    """

    title: str
    model: dict[str, Any]
    scenes: int
    each: int
    batch_size: int
    tokens: int
    mean: float
    end: int = -1


class Validation:
    """A model with random weights that depend on its shape alone, and the prompts of a validation."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload = workload
        recipe = ArgumentParser(exit_on_error=False)
        recipe.add_class_arguments(VisionLanguageModel, "model")
        parts: Any = recipe.instantiate(recipe.parse_object({"model": workload.model}))
        self.model: VisionLanguageModel = parts.model
        self.model.build(on_meta=self.model.parts)
        give_memory(self.model, torch.device(device))
        self.model.decoder.reset_buffers()
        self.model.to(device).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.normal_().mul_(0.1).add_(1)
        self.prepare()

    def prepare(self) -> None:
        """The batches as validation makes them."""
        benchmark = ShapesWorld(Setting(grid=2, min_objects=1, max_objects=3, image_size=32), self.workload.scenes)
        benchmark.setup()
        asked: Counter[tuple[str, ...]] = Counter()
        questions = []
        for question in benchmark.questions():
            asked[question.images] += 1
            questions += [question] * (asked[question.images] <= self.workload.each)
        batches = share(questions, 0, 1, self.workload.batch_size)
        preparation = Preparation("brief", "upright", "pad", 4096)
        prompts = Prompts(batches, benchmark, preparation, self.model.tokenizer, self.model.sample_format())
        self.batches: list[list[Document]] = [prompts[number] for number in range(len(batches))]  # type: ignore[misc]

    def answers(self, end: int) -> dict[str, list[int]]:
        """Token ids of all answers, by question."""
        found = {}
        for batch in self.batches:
            ids = self.model.generate_ids(batch, self.workload.tokens, end_token_id=end)
            found |= dict(zip([document.sample_id for document in batch], ids, strict=True))
        return found


class Peer:
    """Transformers' LLaVA with the same weights, and the same prompts as its processor hands them over, on the device."""

    def __init__(self, ours: Validation, llava: Any, batches: list[list[Document]], end: int) -> None:
        from tests.benchmarks.peers import padded

        self.llava, self.lm, self.end = llava, ours.model.decoder.lm, end
        self.settings = transformers.GenerationConfig(max_new_tokens=ours.workload.tokens, eos_token_id=end, pad_token_id=end)
        self.batches = [
            ([document.sample_id for document in batch], _left(padded(batch, ours.model, ours.model.device))) for batch in batches
        ]

    @torch.no_grad()
    def answers(self) -> dict[str, list[int]]:
        """Token ids of all answers, by question."""
        from components.decoder.attention import attention

        found = {}
        for names, inputs in self.batches:
            with attention(self.lm, "sdpa"):
                rows = self.llava.generate(**inputs, generation_config=self.settings)[:, inputs["input_ids"].shape[1] :].tolist()
            ids = [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]
            found |= dict(zip(names, ids, strict=True))
        return found


class Served:
    """The same validation by the code of a folder, in a process of its own."""

    def __init__(self, folder: Path, workload: Workload, device: str, dtype: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask({"workload": asdict(workload), "device": device, "dtype": dtype})

    def ask(self, request: Any) -> Any:
        """A line of JSON there, a line of JSON back."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """Answer and time as often as a line comes in."""
    torch.set_num_threads(1)
    request = json.loads(sys.stdin.readline())
    ours = Validation(Workload(**request["workload"]), request["device"])
    found: dict[str, list[int]] = {}

    def answer() -> None:
        found.update(ours.answers(ours.workload.end))

    ours.model.to(getattr(torch, request["dtype"]))
    print("null", flush=True)
    for _ in sys.stdin:
        preparing = _seconds(ours.prepare, request["device"])
        found.clear()
        spent = _seconds(answer, request["device"])
        print(json.dumps({"answers": found, "seconds": spent, "preparing": preparing}), flush=True)


def measure(workload: Workload, arguments: argparse.Namespace) -> list[object]:
    """A row of the table.

    Raises:
        SystemExit: Answers differ: nothing is timed then.
    """
    from tests.benchmarks.peers import transformers_llava

    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    ours = Validation(workload, device)
    never = ours.model.decoder.vocab_size
    end = _early_end(list(ours.answers(never).values()), workload.mean)
    expected = ours.answers(end)
    _demand_equal(expected, _peers(ours, transformers_llava(ours.model), end), workload)
    if dtype != torch.float32:  # in which answers may differ, and end elsewhere: all have the same length
        ours.model.to(dtype)
        end = never
        expected = ours.answers(end)
    workload = Workload(**{**asdict(workload), "end": end})
    ways = {OURS: lambda: ours.answers(workload.end), **_peers(ours, transformers_llava(ours.model), workload.end)}
    folders = {BEFORE: arguments.before, NOW: ROOT} if arguments.before else {}
    served = {name: Served(folder, workload, device, arguments.dtype) for name, folder in folders.items()}
    if dtype == torch.float32:
        _demand_equal(expected, {name: lambda one=one: one.ask("go")["answers"] for name, one in served.items()}, workload)
    names = [*ways, *served]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    preparing: dict[str, list[float]] = {name: [] for name in served}
    for number in range(arguments.rounds + 1):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            if name in served:
                told = served[name].ask("go")
                spent = told["seconds"]
                preparing[name] += [told["preparing"]] * bool(number)
            else:
                spent = _seconds(ways[name], device)
            seconds[name] += [spent] * bool(number)  # the first round warms all up
            print(f"{workload.title}, round {number}, {name}: {len(expected) / spent:.1f} answers/s", file=sys.stderr)
    lengths = list(map(len, expected.values()))
    row: list[object] = [workload.title, len(expected), workload.batch_size, f"{statistics.mean(lengths):.1f} ({max(lengths)})"]
    rates = {name: f"{len(expected) / statistics.median(spent):,.1f}" for name, spent in seconds.items()}
    row += [*(rates[name] for name in ways), *(_ratios(seconds[name], seconds[OURS]) for name in (BATCHES, ALONE))]
    for one in served.values():
        one.process.communicate()
    if served:
        row += [rates[BEFORE], rates[NOW], *(_ratios(spent[BEFORE], spent[NOW]) for spent in (seconds, preparing))]
    return row


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The quickstart's validation and two of a small LLaMA with 256 visual tokens; or one of a decoder and tower of files."""
    rates = {"vision_tower": None, "projector": 1e-3, "decoder": 1e-3}
    if arguments.decoder:
        tower, decoder = (yaml.safe_load(path.read_text()) for path in (arguments.tower, arguments.decoder))
        tower["init_args"]["pretrained"] = None
        decoder["init_args"] |= {"weights": None, "tokenizer": {"words": []}}
        projector = yaml.safe_load((RECIPES / "projector" / "mlp_2.yaml").read_text())
        model = {"vision_tower": tower, "projector": projector, "decoder": decoder, "learning_rates": rates}
        named = f"{arguments.decoder.stem}, {arguments.tower.stem}"
        shares = {"one question a picture": (1, 32), "five a picture": (99, 7)}
        return [Workload(f"{named}, {few}", model, arguments.scenes or n, each, 16, 4, 2) for few, (each, n) in shares.items()]
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())["model"]
    parts = {name: yaml.safe_load((RECIPES / recipe[name]).read_text()) for name in ("vision_tower", "projector", "decoder")}
    small = {
        "vision_tower": {
            "class_path": "components.vision_tower.OpenClipTower",
            "init_args": {"config": {"image_size": 128, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32}},
        },
        "projector": {"class_path": "components.projector.MLP", "init_args": {"depth": 2}},
        "decoder": {
            "class_path": "components.decoder.HuggingFaceDecoder",
            "init_args": {"config": SMALL_LLAMA, "tokenizer": {"words": []}},
        },
        "learning_rates": rates,
    }
    return [
        Workload("quickstart", {**parts, "learning_rates": rates}, arguments.scenes or 50, 99, 64, 3, 2),
        Workload("256 visual tokens, one question a picture", small, arguments.scenes or 32, 1, 16, 24, 12),
        Workload("256 visual tokens, five a picture", small, arguments.scenes or 7, 99, 16, 24, 12),
    ]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks answers", description=__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--dtype", default="float32", help="of the weights while timed; answers are compared in float32")
    options.add_argument("--before", type=Path, help="folder with other code of this repository, timed beside")
    options.add_argument("--decoder", type=Path, help="recipe file of a decoder, which gets random weights")
    options.add_argument("--tower", type=Path, default=RECIPES / "vision_tower" / "clip_vit_l_336.yaml", help="with --decoder")
    options.add_argument("--scenes", type=int, help="pictures of every workload")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", default="", help="workloads with this in their name")
    return options


def main(arguments: list[str]) -> str:
    parsed = parser().parse_args(arguments)
    with ExitStack() as afterwards:
        afterwards.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        rows = [measure(workload, parsed) for workload in workloads(parsed) if parsed.only in workload.title]
    clock = "processor time of one thread" if parsed.device == "cpu" else torch.cuda.get_device_name()
    title = (
        f"Answers a second, {clock}, {parsed.dtype}, torch {torch.__version__}, transformers {transformers.__version__}; ratios "
        f"are medians of {parsed.rounds} rounds, with their range. The answers of all are equal in float32."
    )
    columns = ["questions of", "number", "batch", "tokens of an answer (longest)", OURS, BATCHES, ALONE]
    columns += ["ours over batches", "ours over one at a time"]
    columns += [BEFORE, NOW, "now over before", "preparing, now over before"] if parsed.before else []
    return table(title, columns, rows)


def _peers(ours: Validation, llava: Any, end: int) -> dict[str, Callable[[], Any]]:
    # transformers' generate takes any projector
    llava.model.multi_modal_projector = ours.model.projector
    llava.eval()
    alone = [[document] for batch in ours.batches for document in batch]
    return {name: Peer(ours, llava, batches, end).answers for name, batches in ((BATCHES, ours.batches), (ALONE, alone))}


def _left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows padded on the right in, on the left out."""
    missing = (inputs["attention_mask"] == 0).sum(1).tolist()
    rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    turned = {name: torch.stack([row.roll(n) for row, n in zip(rows[name], missing, strict=True)]) for name in rows}
    return {**turned, "pixel_values": inputs["pixel_values"]}


def _early_end(answers: list[list[int]], mean: float) -> int:
    """The token that makes answers about as long as `mean`, were it the end."""

    def length(token: int) -> float:
        return statistics.mean(ids.index(token) + 1 if token in ids else len(ids) for ids in answers)

    return min({token for ids in answers for token in ids}, key=lambda token: (abs(length(token) - mean), token))


def _demand_equal(expected: dict[str, list[int]], ways: dict[str, Callable[[], Any]], workload: Workload) -> None:
    for name, answer in ways.items():
        found = answer()
        if differing := [question for question in expected if found[question] != expected[question]]:
            first = differing[0]
            raise SystemExit(
                f"{workload.title}: {len(differing)} of {len(expected)} answers differ between {OURS} and {name}, such as that to "
                f"{first}: {expected[first]} and {found[first]}. Nothing is timed."
            )


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _ratios(slower: list[float], faster: list[float]) -> str:
    ratios = [theirs / ours for theirs, ours in zip(slower, faster, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


if __name__ == "__main__":
    serve()
