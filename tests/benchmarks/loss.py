"""The head and its loss, forward and backward, at supervised positions: all logits at once, in pieces, and the ways of others.

All compute the same sum and the same gradients of hidden states and head, which is checked before anything is timed. Positions that
are not supervised are left out before, whatever computes the loss: `hidden[batch.target_positions]` in `components.vlm`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from components import loss
from components.loss import cross_entropy_sum, pieces_of
from tests.benchmarks import table

GIB = 2**30
PLAIN = "all at once"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative differences of the loss, and of gradients by their norms, above which nothing is timed."""
SIZES = {"cpu": ((512, 2048), (512,), (32_000,)), "cuda": ((1024, 4096, 16_384), (4096, 5120), (32_000, 152_064))}
"""Positions, widths and vocabularies of a device."""
MOST_LOGITS = {"cpu": 2**24, "cuda": loss.MOST_LOGITS}
"""Logits of a piece; fewer on a CPU than in training, where so many would take minutes."""

Method = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peak(TorchDispatchMode):
    """The most bytes that were there at once, of all that operators made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.storages = 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.storages[leaf.untyped_storage()] = leaf.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self.storages.values()))
        return result


class InForward(torch.autograd.Function):
    """The candidate that computes gradients in the forward pass, as Liger does: no logits twice, but one kind of head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, pieces: int) -> Tensor:  # type: ignore[override]
        of_hidden, of_weight, total = torch.empty_like(hidden), torch.zeros_like(weight), hidden.new_zeros((), dtype=torch.float32)
        rows = zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), of_hidden.tensor_split(pieces), strict=True)
        for some, target, gradient in rows:
            probabilities = functional.log_softmax((some @ weight.T).float(), dim=-1)
            total -= probabilities.gather(1, target[:, None]).sum()
            probabilities.exp_().scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
            of_logits = probabilities.to(weight.dtype)
            torch.mm(of_logits, weight, out=gradient)
            of_weight.addmm_(of_logits.T, some)
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # type: ignore[override]
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * scale, of_weight * scale, None, None


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, in fp32, and their cross-entropy."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As the model does it."""
    return cross_entropy_sum(lambda some: functional.linear(some, weight), hidden, targets, len(weight))


def in_forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In as many pieces, with gradients computed in the forward pass."""
    return InForward.apply(hidden, weight, targets, pieces_of(len(targets), len(weight)))  # type: ignore[no-any-return]


def methods(device: torch.device) -> dict[str, Method]:
    """What there is in this environment, by name."""
    found: dict[str, Method] = {PLAIN: plain, "ours": ours, "gradients in forward": in_forward}
    if options := getattr(nn, "LinearCrossEntropyOptions", None):
        found["torch, automatic"] = lambda hidden, weight, targets: functional.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=options()
        )
        found["torch, as many pieces"] = lambda hidden, weight, targets: functional.linear_cross_entropy(
            hidden, weight, targets, reduction="sum",
            options=options(batch_chunk_size=-(-len(targets) // pieces_of(len(targets), len(weight)))),
        )  # fmt: skip
    if device.type == "cuda":
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
        except ImportError:
            return found
        # weights, bias, class weights, ignored index, z loss, smoothing, reduction
        found["Liger"] = lambda hidden, weight, targets: Liger.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]  # fmt: skip
    return found


def once(method: Method, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float, list[Tensor]]:
    """Seconds, GiB beyond what was there, and loss and gradients, of a forward and a backward pass."""
    hidden, weight, _ = tensors
    hidden.grad = weight.grad = None
    cuda = hidden.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, clock = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter if cuda else time.process_time
    began = clock()
    value = method(*tensors)
    value.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - began
    gib = (torch.cuda.max_memory_allocated() - before) / GIB if cuda else 0.0
    assert hidden.grad is not None and weight.grad is not None
    return seconds, gib, [value.detach(), hidden.grad, weight.grad]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, by norms."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs)


def measure(positions: int, width: int, vocabulary: int, device: torch.device, rounds: int) -> list[list[object]]:
    """A row for each method."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device, dtype=dtype) * width**-0.5).requires_grad_()
    tensors = (hidden, weight, torch.randint(0, vocabulary, (positions,), device=device))
    ways = methods(device)
    expected = [tensor.clone() for tensor in once(plain, tensors)[2]]
    differences, peaks = {}, {}
    for name, method in ways.items():
        with Peak() if device.type == "cpu" else patch.dict({}) as peak:
            _, peaks[name], found = once(method, tensors)
        if isinstance(peak, Peak):
            peaks[name] = peak.bytes / GIB
        differences[name] = difference(found, expected)
        if differences[name] > LIMITS[dtype]:
            sys.exit(f"{name} differs from {PLAIN} by {differences[name]:.2g}; nothing is timed.")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        for name in names:
            seconds[name].append(once(ways[name], tensors)[0])
    rows: list[list[object]] = []
    for name in ways:
        ratios = sorted(one / other for one, other in zip(seconds[name], seconds[PLAIN], strict=True))
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]"
        pieces = pieces_of(positions, vocabulary) if name not in (PLAIN, "torch, automatic", "Liger") else ""
        rows.append([
            f"{positions:,}", f"{width:,}", f"{vocabulary:,}", name, pieces, statistics.median(seconds[name]), spread, peaks[name],
            f"{differences[name]:.0e}",
        ])  # fmt: skip
    return rows


COLUMNS = ["positions", "width", "vocabulary", "loss", "pieces", "s", "times all at once", "peak GiB", "difference"]


def main(arguments: list[str]) -> str | None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks loss", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--positions", type=int, nargs="+", help="supervised positions")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--vocabularies", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is timed")
    parser.add_argument("--most-logits", type=int, help="logits of a piece; default: as in training, on a CPU 2^24")
    chosen = parser.parse_args(arguments)
    device, threads = torch.device(chosen.device), torch.get_num_threads()
    stated = (chosen.positions, chosen.widths, chosen.vocabularies)
    positions, widths, vocabularies = (one or two for one, two in zip(stated, SIZES[chosen.device], strict=True))
    sizes = [(number, width, words) for words in vocabularies for width in widths for number in positions]
    rows: list[list[object]] = []
    torch.set_num_threads(1)
    try:
        with patch.object(loss, "MOST_LOGITS", chosen.most_logits or MOST_LOGITS[chosen.device]):
            for size in tqdm(sizes, unit="size", file=sys.stderr):
                rows += measure(*size, device, chosen.rounds)
    finally:
        torch.set_num_threads(threads)
    where = f"bf16 on {torch.cuda.get_device_name()}" if device.type == "cuda" else "fp32, processor time of one thread"
    caption = (
        f"Head and loss, forward and backward, {where}, torch {torch.__version__}; medians of {chosen.rounds}, in turn, pairwise "
        "ratios with their range. Memory beyond inputs and with gradients; on a CPU of what operators return, not of what they use "
        "inside, as torch's own loss does. Differences from all at once, relative."
    )
    return table(caption, COLUMNS, rows)
