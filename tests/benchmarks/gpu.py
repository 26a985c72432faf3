"""One GPU: the training step of large models against transformers' step on the same weights and samples, and plan's forecast.

Our step is what a run does: the Trainer with `HybridSharding` on one rank, compiled blocks, AdamW, the loss divided by the targets
of the whole step. Theirs is `LlavaForConditionalGeneration` as transformers' Trainer calls it, on the same sharded blocks, not
compiled, with the same optimizer; gradients of both are reduced once a step. Weights are random, lengths as in `workloads.py`.
Micro-batches are such that our step fits (7B), or both do (13B), by what `plan` expects. Where theirs needs more memory than there
is, it is timed with transformers' gradient checkpointing and in as many smaller micro-batches as it needs without, and the quicker
one is compared. Memory is that of a step beside transformers' tower and the batches of all, which stay on the GPU.

FLOPs are those of `components.flops` for the samples, whoever computes them; MFU is taken of the bf16 matrix product that the same
process has timed. `--small --device cpu` goes through the same code on a laptop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning import Trainer
from torch import nn
from tqdm import tqdm

from components.batch import Document, pack
from components.decoder import HuggingFaceDecoder
from components.flops import matmul_parameters, mfu, peak_flops, step_flops
from components.learning_rates import LearningRates
from components.projector import MLP
from components.sharding import HybridSharding
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import VisionLanguageModel
from tests.benchmarks import table
from tests.benchmarks.alternation import OURS, Alternate, Ready, Timing, synchronize
from tests.benchmarks.gpu_forecast import Forecast
from tests.benchmarks.gpu_steps import Peers
from tests.benchmarks.profiles import where_time_goes
from tests.benchmarks.workloads import documents

RECIPES = Path(__file__).parents[2] / "recipes"
THEIRS, CUT, UNCOMPILED = "transformers", "transformers, cut", "ours, not compiled"
COLUMNS = [
    "model, trained, pixels", "lengths", "step", "tokens", "s a step", "tokens/s", "MFU of ceiling", "of peak", "GiB", "ratio",
]  # fmt: skip
CHECKS = [
    "model, trained, pixels", "lengths", "samples x micro-batches", "ceiling, TFLOP/s", "tensors by `plan`, GiB", "measured",
    "their loss", "ours", "gradients differ by", "graphs before timing", "later",
]  # fmt: skip
KINDS = ("captions", "instructions")
MATRIX = {"cuda": 8192, "cpu": 512}
"""Side of the matrices whose product is the ceiling."""
FULL, ALIGN = LearningRates(projector=2e-5, decoder=2e-5), LearningRates(projector=1e-3)


@dataclass(frozen=True)
class Case:
    """A model, what of it trains, and how many samples a step has.

    Args:
        decoder: Part file of its architecture.
        tower: Part file of its tower.
        rates: What trains.
        samples: Samples of a micro-batch of captions and of instructions.
        accumulation: Micro-batches of an optimizer step.
    """

    decoder: str
    tower: str
    rates: LearningRates
    samples: dict[str, int]
    accumulation: int


def _case(decoder: str, tower: str, rates: LearningRates, captions: int, instructions: int, accumulation: int) -> Case:
    return Case(decoder, tower, rates, dict(zip(KINDS, (captions, instructions), strict=True)), accumulation)


CASES = {
    "7b_full_224": _case("llama2_7b", "clip_vit_l", FULL, 22, 8, 4),
    "7b_full_336": _case("llama2_7b", "clip_vit_l_336", FULL, 11, 6, 4),
    "13b_align_224": _case("llama2_13b", "clip_vit_l", ALIGN, 40, 14, 1),
    "13b_align_336": _case("llama2_13b", "clip_vit_l_336", ALIGN, 20, 12, 1),
}
SMALL_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SMALL_TOWER = {"image_size": 56, "patch_size": 14, "width": 32, "layers": 3, "head_width": 16}


def main(arguments: list[str]) -> str | None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="The same code on a model that a laptop trains.")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--warmup", type=int, default=3, help="Steps before the first block, >= 1.")
    parser.add_argument("--blocks", type=int, default=3, help="Blocks of each step, >= 1.")
    parser.add_argument("--steps", type=int, default=2, help="Steps of a block, >= 1.")
    parser.add_argument("--profile", action="store_true", help="Print where the time of one of our steps goes.")
    parser.add_argument("--not-compiled", action="store_true", help="Also time our step without compiled blocks, if that fits.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return None
    # a process for each case: what one leaves in memory is no matter for the next
    rows, checks, card = [], [], ""
    # micro-batches differ in their tokens
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in tqdm(options.cases, unit="case", file=sys.stderr):
        command = [sys.executable, "-m", "tests.benchmarks", "gpu", *arguments, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: no table.")
        found = json.loads(done.stdout.splitlines()[-1])
        rows += found["rows"]
        checks += found["checks"]
        # what is measured is seen even if a later case fails
        print(table(name, COLUMNS, found["rows"]), table("", CHECKS, found["checks"]), *found["profiles"], sep="\n", flush=True)
        card = found["card"]
    title = (
        f"Training steps on one {card}; torch {torch.__version__}, transformers {transformers.__version__} (sdpa, padded rows, "
        f"not compiled); random weights. Seconds: mean of {options.blocks} x {options.steps} steps, in turn. Of peak: of "
        "the bf16 rate that the GPU's maker states. GiB: of tensors, at most. Ratio: how many times as quick as the quicker step "
        "of transformers in the block beside, median [least-most]."
    )
    return table(title, COLUMNS, rows) + "\n" + table("What was checked in the same run:", CHECKS, checks)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of both tables, and profiles, of one case."""
    case, device = CASES[name], torch.device(options.device)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    ceiling = matmul_ceiling(device)
    model = build(case, options.small)
    strategy = HybridSharding(1, 1, compile_blocks=not options.small, replicate_frozen=True)
    per_phase = options.warmup + options.blocks * options.steps + options.profile
    samples = {kind: 2 if options.small else count for kind, count in case.samples.items()}
    micro_batches = {
        kind: [
            documents(kind, samples[kind], model.sample_format(), model.decoder.vocab_size, seed=number)
            for number in range(per_phase * case.accumulation)
        ]
        for kind in KINDS
    }
    forecast = Forecast(build(case, options.small, VisionLanguageModel), strategy.layout, case.accumulation, device)
    parts = {kind: forecast.parts_of_theirs(micro_batches[kind]) for kind in KINDS}
    uncompiled = replace(strategy.layout, compile_blocks=False)
    fits = all(forecast.of_ours(micro_batches[kind], uncompiled).fits for kind in KINDS)
    peers = Peers(model, micro_batches, case.accumulation, parts)
    functions = {THEIRS: peers.theirs} | ({CUT: peers.theirs_cut} if max(parts.values()) > 1 else {})
    functions |= {UNCOMPILED: peers.uncompiled} if options.not_compiled and fits else {}
    alternate = Alternate(
        KINDS, functions, options.warmup, options.blocks, options.steps, case.accumulation, peers.gate, options.profile
    )
    trainer = Trainer(
        accelerator=device.type.replace("cuda", "gpu"), devices=1, precision="32-true", strategy=strategy, logger=False,
        accumulate_grad_batches=case.accumulation, max_steps=len(KINDS) * per_phase, max_epochs=1, limit_val_batches=0,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[alternate],
    )  # fmt: skip
    packed = [pack(micro_batch) for kind in KINDS for micro_batch in micro_batches[kind]]
    trainer.fit(model, datamodule=Ready(packed, pinned=device.type == "cuda"))
    rows, checks, profiles = [], [], []
    for kind in KINDS:
        timed = micro_batches[kind][options.warmup * case.accumulation :][: options.blocks * options.steps * case.accumulation]
        work = Work.of(model, timed)
        theirs = [step for step in (THEIRS, CUT) if step in functions and not (step == CUT and parts[kind] == 1)]
        quicker = min(theirs, key=lambda step: sum(alternate.timings[kind, step].seconds))
        for step in (OURS, *theirs, *(functions.keys() & {UNCOMPILED})):
            words = {THEIRS: THEIRS + ", recomputing" * (parts[kind] > 1), CUT: f"{THEIRS}, {parts[kind]} x smaller"}.get(
                step, step
            )
            figures = work.figures(alternate.timings[kind, step], options.steps, ceiling, device)
            rows.append([name, kind, words, *figures, "1" if step == quicker else ratios(alternate, kind, quicker, step)])
        expected, agreed = forecast.of_ours(timed, strategy.layout), peers.agreed[kind]
        checks.append([
            name, kind, f"{samples[kind]} x {case.accumulation}", f"{ceiling / 1e12:.3g}",
            f"{expected.total - expected.allowance:.1f}", f"{alternate.timings[kind, OURS].gib:.1f}",
            f"{agreed.theirs:.4f}", f"{agreed.ours:.4f}", f"{agreed.gradients:.1e}",
            alternate.graphs[0], alternate.graphs[-1] - alternate.graphs[0],
        ])  # fmt: skip
        if options.profile:
            profiles.append(where_time_goes(f"One step of {name}, {kind}, ours", alternate.profiles[kind], device))
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"rows": rows, "checks": checks, "profiles": profiles, "card": card}


# --- the model


class DrawnOnDevice(VisionLanguageModel):
    """The model with random weights that are drawn where they lie, so that 13B take seconds."""

    def build(self, on_meta: Collection[str] = ()) -> None:
        super().build(on_meta=self.parts)
        self.decoder.load_weights = partial(draw, self)  # type: ignore[method-assign]


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Matrices from a normal distribution, norms 1, biases 0."""
    for name, parameter in model.named_parameters():
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.ndim > 1:
            here.normal_(std=0.02)
        else:
            here.fill_(0.0 if name.endswith("bias") else 1.0)


def build(case: Case, small: bool, model_class: type[VisionLanguageModel] = DrawnOnDevice) -> VisionLanguageModel:
    """The model of a case, without weights."""
    tower = part(f"vision_tower/{case.tower}") | {"pretrained": None}
    decoder = part(f"decoder/{case.decoder}")["config"]
    if small:
        tower |= {"model_name": None, "config": SMALL_TOWER}
        decoder |= SMALL_DECODER | {"vocab_size": 300}
    return model_class(OpenClipTower(**tower), MLP(depth=2), HuggingFaceDecoder(decoder, WordTokenizer()), case.rates)


def part(name: str) -> dict[str, Any]:
    """The arguments of a part file."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["init_args"]


# --- figures


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product of random numbers: the median of ten, after three."""
    side = MATRIX[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[3:])


@dataclass(frozen=True)
class Work:
    """What the timed steps of a workload compute, whoever computes it.

    Args:
        tokens: Tokens, without padding.
        flops: Matmul FLOPs.
    """

    tokens: int
    flops: float

    @classmethod
    def of(cls, model: VisionLanguageModel, micro_batches: list[list[Document]]) -> "Work":
        """The work of these micro-batches."""
        sizes, tokens, flops = matmul_parameters(model), 0, 0.0
        for micro_batch in micro_batches:
            batch = pack(micro_batch)
            squares = float((batch.cumulative_lengths.diff().double() ** 2).sum())
            flops += float(step_flops(model, sizes, batch.num_tokens, squares, len(batch.targets), len(batch.pixels)))
            tokens += batch.num_tokens
        return cls(tokens, flops)

    def figures(self, timing: Timing, steps: int, ceiling: float, device: torch.device) -> list[str]:
        """Tokens of a step, seconds, tokens/s, MFU of the ceiling and of the published peak, GiB."""
        seconds = sum(timing.seconds) * steps
        count = len(timing.seconds) * steps
        peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        return [
            f"{self.tokens / count:,.0f}",
            f"{seconds / count:.3f}",
            f"{self.tokens / seconds:,.0f}",
            f"{mfu(self.flops, seconds, ceiling):.1%}",
            f"{mfu(self.flops, seconds, peak):.1%}" if peak else "",
            f"{timing.gib:.1f}",
        ]


def ratios(alternate: Alternate, kind: str, theirs: str, step: str) -> str:
    """How many times as long as those of a step blocks of transformers' step took: median and range of the pairs."""
    pairs = zip(alternate.timings[kind, theirs].seconds, alternate.timings[kind, step].seconds, strict=True)
    found = sorted(long / short for long, short in pairs)
    return f"{statistics.median(found):.2f} [{found[0]:.2f}-{found[-1]:.2f}]"
