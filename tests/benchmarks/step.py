"""Our training step beside transformers' and the original LLaVA's on a CPU: the same weights and samples, equal gradients first.

Every step is made of our model's own modules, so that only the way to the loss differs. Clock: processor time of one thread, for
gradients None, forward and backward; no optimizer. Each round has samples of its own, and the order of steps rotates from round to
round. A first round only compares, and what differs is not timed; in later rounds every timed step is compared as well.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from components.batch import IGNORE_INDEX, pack
from components.decoder import HuggingFaceDecoder
from components.decoder.attention import attention
from components.projector import MLP
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates, VisionLanguageModel
from tests.benchmarks import table
from tests.benchmarks.peers import llava_style_loss, marked, padded, patch_features, transformers_llava, transformers_loss
from tests.benchmarks.profiles import where_time_goes
from tests.benchmarks.workloads import Kind, documents

LIMIT = 1e-5
"""Relative difference of the loss, and in norm of the gradient of every trained parameter, above which there is no table."""
THEIRS = "transformers"
REPEATS, LARGE = 5, 1024
"""For the profile: steps and products on the clock, and the sides of these products."""
DEFAULT = ("captions-224", "instructions-224", "captions-336", "instructions-336", "captions-224-align", "captions-224-32000")


@dataclass(frozen=True)
class Workload:
    """What is trained on what.

    Args:
        kind: Lengths of the samples.
        image_size: Side of the pictures, in pixels; a multiple of 14.
        align: Whether the projector alone is trained.
        vocab_size: Rows of the head. 256 gives it about the share of a step that 32,000 have at 13B.
    """

    kind: Kind
    image_size: int
    align: bool = False
    vocab_size: int = 256

    @staticmethod
    def named(name: str) -> "Workload":
        """`KIND-SIZE`, perhaps with `-align`, perhaps with `-VOCABULARY`."""
        found = re.fullmatch(r"(captions|instructions)-(\d+)(-align)?(?:-(\d+))?", name)
        if found is None or int(found[2]) % 14:
            raise SystemExit(f"{name} is no workload. Name one as {DEFAULT[0]} or captions-224-align, of pictures of 14 n pixels.")
        kind: Kind = "captions" if found[1] == "captions" else "instructions"
        return Workload(kind, int(found[2]), bool(found[3]), int(found[4] or 256))

    @property
    def title(self) -> str:
        """In words."""
        marks = [f"{self.kind}, {self.image_size} px"] + ["projector only"] * self.align
        return ", ".join(marks + [f"{self.vocab_size:,} words: head stress"] * (self.vocab_size != 256))

    def model(self) -> VisionLanguageModel:
        """A small model with the shape of LLaVA-1.5, random weights, as at the start of training."""
        tower = {"image_size": self.image_size, "patch_size": 14, "width": 96, "layers": 3, "head_width": 48}
        llama = {
            "model_type": "llama", "vocab_size": self.vocab_size, "hidden_size": 192, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 4096,
        }  # fmt: skip
        model = VisionLanguageModel(
            OpenClipTower(config=tower, feature_layer=-2),
            MLP(depth=2),
            HuggingFaceDecoder(llama, WordTokenizer()),
            LearningRates(projector=1e-3, decoder=None if self.align else 1e-3),
        )
        model.build()
        model.set_modes()
        return model


class Case:
    """Samples, collated for every step, and the steps. Each gives the mean loss of the supervised tokens."""

    def __init__(
        self, workload: Workload, model: VisionLanguageModel, llava: transformers.PreTrainedModel, samples: int, seed: int
    ):
        self.model, self.llava = model, llava
        self.documents = documents(workload.kind, samples, model.sample_format(), workload.vocab_size, seed)
        self.batch = pack(self.documents)
        self.padded = padded(self.documents, model, "cpu")
        self.marked = marked(self.documents, model, "cpu")

    @property
    def steps(self) -> dict[str, Callable[[], Tensor]]:
        """Transformers' step first, then ours, then ours without one of its savings each."""
        return {
            THEIRS: lambda: transformers_loss(self.model, self.llava, self.padded),
            "LLaVA style": lambda: llava_style_loss(self.model, self.llava, self.marked),
            "ours": lambda: self.model.loss_sum(self.batch) / len(self.batch.targets),
            "logits of all tokens": self.logits_of_all_tokens,
            "padded rows": self.padded_rows,
            "one mask for the row": self.one_mask,
            "whole tower": self.whole_tower,
        }

    def logits_of_all_tokens(self) -> Tensor:
        """Ours, but the head runs on every position."""
        logits = self.model.decoder.head(self._hidden(self.model.fuse(self.batch)))
        return functional.cross_entropy(logits.float(), self._labels, ignore_index=IGNORE_INDEX)

    def padded_rows(self) -> Tensor:
        """Ours, but a padded row for each document in place of packing."""
        rows = self.model.fuse(self.batch).split(self._lengths)
        with attention(self.model.decoder.lm, "sdpa"):
            hidden = self.model.decoder.lm.base_model(
                inputs_embeds=pad_sequence(rows, batch_first=True), attention_mask=self.padded["attention_mask"]
            ).last_hidden_state
        packed = hidden.flatten(0, 1)[self._kept]
        return self._loss(packed)

    def one_mask(self) -> Tensor:
        """Ours, but attention over the whole row with a mask that keeps documents apart."""
        with attention(self.model.decoder.lm, "sdpa"):
            hidden = self.model.decoder.lm.base_model(
                inputs_embeds=self.model.fuse(self.batch)[None],
                position_ids=self.batch.position_ids[None],
                attention_mask=self._mask,
            ).last_hidden_state
        return self._loss(hidden[0])

    def whole_tower(self) -> Tensor:
        """Ours, but with transformers' tower, which computes the blocks that no feature passes through."""
        batch, embeds = self.batch, self.model.decoder.embed(self.batch.input_ids.clamp(min=0))
        visual = self.model.projector(patch_features(self.llava, self.padded["pixel_values"])).flatten(0, 1)
        return self._loss(self._hidden(embeds.index_copy(0, batch.image_positions, visual)))

    def _hidden(self, embeds: Tensor) -> Tensor:
        return self.model.decoder(embeds, self.batch.position_ids, self.batch.cumulative_lengths, self.batch.max_length)

    def _loss(self, hidden: Tensor) -> Tensor:
        logits = self.model.decoder.head(hidden[self.batch.target_positions])
        return functional.cross_entropy(logits.float(), self.batch.targets)

    @cached_property
    def _lengths(self) -> list[int]:
        return self.batch.cumulative_lengths.diff().tolist()

    @cached_property
    def _kept(self) -> Tensor:
        return self.padded["attention_mask"].flatten().nonzero().flatten()

    @cached_property
    def _labels(self) -> Tensor:
        labels = torch.full_like(self.batch.input_ids, IGNORE_INDEX)
        labels[self.batch.target_positions] = self.batch.targets
        return labels

    @cached_property
    def _mask(self) -> Tensor:
        owners = torch.arange(len(self._lengths)).repeat_interleave(torch.tensor(self._lengths))
        return ((owners[:, None] == owners) & torch.ones(len(owners), len(owners), dtype=torch.bool).tril())[None, None]


Taken = tuple[float, dict[str, Tensor]]
"""Processor seconds of a step; its loss and the gradient of every trained parameter."""


def take(case: Case, step: Callable[[], Tensor]) -> Taken:
    """One step, on the clock."""
    case.model.zero_grad(set_to_none=True)
    began = time.process_time()
    loss = step()
    loss.backward()
    spent = time.process_time() - began
    return spent, {"loss": loss.detach(), **{n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}}


def worst_difference(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far a step's loss and gradients are from transformers', in norm, relative.

    Raises:
        SystemExit: Further than the limit.
    """
    worst = 0.0
    for parameter in found.keys() | expected.keys():
        if parameter not in found or parameter not in expected:
            raise SystemExit(
                f"{name}: {parameter} has a gradient in one of the two steps only. This is not the same step: no times."
            )
        distance = ((found[parameter] - expected[parameter]).norm() / expected[parameter].norm()).item()
        if not distance <= LIMIT:
            raise SystemExit(f"{name}: {parameter} is {distance:.1e} off transformers'. This is not the same step: no times.")
        worst = max(worst, distance)
    return worst


def row(workload: Workload, samples: int, rounds: int, progress: tqdm) -> list[object]:
    """Sizes and seconds of a workload, and how many times as quick as transformers' each step is."""
    torch.manual_seed(0)
    model = workload.model()
    llava = transformers_llava(model)
    spent: dict[str, list[float]] = {}
    tokens, filled, labels, worst = [], [], [], 0.0
    for number in range(rounds + 1):
        case = Case(workload, model, llava, samples, seed=number)
        names = list(case.steps)
        turn = number % len(names)
        taken = {name: take(case, case.steps[name]) for name in names[turn:] + names[:turn]}
        worst = max(worst, *(worst_difference(name, own, taken[THEIRS][1]) for name, (_, own) in taken.items()))
        progress.update()
        if number == 0:  # warms up, and what differs ends here
            continue
        for name in names:
            spent.setdefault(name, []).append(taken[name][0])
        tokens.append(case.batch.num_tokens)
        filled.append(case.padded["input_ids"].numel())
        labels.append(len(case.batch.targets))
    ratios = {name: [a / b for a, b in zip(spent[THEIRS], own, strict=True)] for name, own in spent.items() if name != THEIRS}
    return [
        workload.title, *(f"{statistics.mean(counts):,.0f}" for counts in (tokens, filled, labels)),
        *(statistics.median(spent[name]) for name in (THEIRS, "ours")),
        *(f"{statistics.median(own):.2f} [{min(own):.2f}-{max(own):.2f}]" for own in ratios.values()), f"{worst:.0e}",
    ]  # fmt: skip


def profiled(workload: Workload, samples: int) -> str:
    """Where the time of our step goes, and how much of it its matrix products need at the speed of a large one."""
    torch.manual_seed(0)
    model = workload.model()
    case = Case(workload, model, transformers_llava(model), samples, seed=0)
    step = case.steps["ours"]
    with FlopCounterMode(display=False) as counter:
        take(case, step)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if "attention" not in str(operator))
    spent, most = (min(values) for values in zip(*((take(case, step)[0], _product_seconds()) for _ in range(REPEATS)), strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
        take(case, step)
    rate = 2 * LARGE**3 / most
    title = (
        f"Our step, {workload.title}, {case.batch.num_tokens:,} tokens: {spent:.3f} s on the clock of one thread, least of "
        f"{REPEATS}. Its matrix products are {products / 1e9:.2f} GFLOP: {products / rate:.3f} s at the {rate / 1e9:.0f} GFLOP/s "
        f"of one of {LARGE} cubed, in the same run. Profiled"
    )
    return where_time_goes(title, found, torch.device("cpu"))


def _product_seconds() -> float:
    """Processor time of one large matrix product."""
    one, other = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    began = time.process_time()
    one @ other
    return time.process_time() - began


def main(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks step", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=DEFAULT, help="KIND-SIZE[-align][-VOCABULARY], as captions-224")
    parser.add_argument("--samples", type=int, help="samples of a batch; by default 6, from 336 px on 4")
    parser.add_argument("--rounds", type=int, default=7, help="batches of a workload, each timed once with every step")
    parser.add_argument("--profile", action="store_true", help="where the time of one of our steps goes, in place of comparing")
    chosen = parser.parse_args(arguments)
    workloads = [Workload.named(name) for name in chosen.workloads]
    sizes = [chosen.samples or (6 if workload.image_size < 336 else 4) for workload in workloads]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if chosen.profile:
            return "\n".join(profiled(workload, samples) for workload, samples in zip(workloads, sizes, strict=True))
        progress = tqdm(total=(chosen.rounds + 1) * len(workloads), desc="rounds", leave=False)
        rows = [row(workload, samples, chosen.rounds, progress) for workload, samples in zip(workloads, sizes, strict=True)]
    finally:
        torch.set_num_threads(threads)
    pictures = " or ".join(str(size) for size in sorted(set(sizes), reverse=True))
    title = (
        f"A training step (forward and backward, fp32, one thread) of a small LLaVA (decoder 4 x 192, tower 3 x 96 of which 2 "
        f"blocks are used), {pictures} pictures with texts a batch; torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Ratios: how many times as quick as transformers' step in the same round, median of "
        f"{chosen.rounds} [least-most]; right of `ours`: our step without one of its savings. `differ by`: the largest difference "
        "from transformers' of any loss and of any trained parameter's gradient, in norm, relative."
    )
    columns = ["", "tokens", "padded", "labels", f"{THEIRS}, s", "ours, s"]
    columns += ["LLaVA style", "ours", "logits of all tokens", "padded rows", "one mask for the row", "whole tower", "differ by"]
    return table(title, columns, rows)
