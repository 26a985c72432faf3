"""Optimizer steps by hand on the weights of a run: as transformers' Trainer takes them, and ours without compiled blocks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from components.batch import IGNORE_INDEX, Batch, Document, pack
from components.decoder.attention import attention
from components.vlm import VisionLanguageModel
from tests.benchmarks.peers import padded, transformers_llava, transformers_loss

LOSS_LIMIT, GRADIENT_LIMIT = 2e-2, 0.1
"""Relative differences from transformers' step in bf16 above which nothing is timed."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch of transformers' step: collated, and its share of the supervised tokens of one of ours."""

    inputs: dict[str, Tensor]
    share: float


@dataclass(frozen=True)
class Agreed:
    """Losses of the micro-batch that was compared, and the largest difference of a gradient in norm, relative."""

    theirs: float
    ours: float
    gradients: float


class Peers:
    """Optimizer steps by hand on the weights of a run, once it has them.

    Args:
        model: The model of the run.
        micro_batches: Of each workload, documents of all its micro-batches.
        accumulation: Micro-batches of an optimizer step.
        parts: Of each workload, into how many parts transformers' step must cut a micro-batch to need no gradient checkpointing.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        micro_batches: dict[str, list[list[Document]]],
        accumulation: int,
        parts: dict[str, int],
    ) -> None:
        self.model, self.micro_batches, self.accumulation, self.parts = model, micro_batches, accumulation, parts
        self.llava: Any = None
        self.agreed: dict[str, Agreed] = {}

    def gate(self, kind: str) -> None:
        """Prepare a workload's batches, and demand that the longest has the same loss and gradients in all steps.

        Raises:
            SystemExit: It has not.
        """
        model = self.model
        if self.llava is None:
            self.llava = transformers_llava(model)
            # FSDP2 gathers what a unit holds when it is called: the projector, and the root also for what is registered
            self.llava.model.multi_modal_projector = model.projector
            model.their_loss = partial(transformers_loss, model, self.llava)  # type: ignore[assignment]
            register_fsdp_forward_method(model, "their_loss")
        self.packed = [pack(micro_batch).to(model.device) for micro_batch in self.micro_batches[kind]]
        self.whole = [self._collated(micro_batch, 1) for micro_batch in self.micro_batches[kind]]
        self.cut = [self._collated(micro_batch, self.parts[kind]) for micro_batch in self.micro_batches[kind]]
        longest = max(range(len(self.whole)), key=lambda number: self.whole[number][0].inputs["input_ids"].numel())
        loss, gradients = self._loss_and_gradients(lambda: self._ours(longest), nullcontext())
        all_worst = 0.0
        for name, micros, recomputes in self._theirs(kind):
            expected, theirs = self._loss_and_gradients(partial(self._of_parts, micros[longest]), self._as_theirs(recomputes))
            worst = max(float((gradients[n] - g).norm() / g.norm()) for n, g in theirs.items())
            if not (abs(loss - expected) <= LOSS_LIMIT * expected and worst <= GRADIENT_LIMIT):
                raise SystemExit(f"{kind}, {name}: loss {expected}, ours {loss}, gradients differ by {worst}: not timed.")
            all_worst = max(all_worst, worst)
        self.agreed[kind] = Agreed(expected, loss, all_worst)

    def theirs(self, kind: str, step: int) -> None:
        """A step as transformers' Trainer takes it, with gradient checkpointing where it would not fit otherwise."""
        self._step_of_theirs(*self._theirs(kind)[0], step)

    def theirs_cut(self, kind: str, step: int) -> None:
        """The same step in more and smaller micro-batches, without gradient checkpointing."""
        self._step_of_theirs(*self._theirs(kind)[-1], step)

    def uncompiled(self, kind: str, step: int) -> None:
        """Our step with blocks as they are."""
        with plain_blocks(self.model):
            self._step([partial(self._ours, number) for number in self._numbers(step)])

    def _theirs(self, kind: str) -> list[tuple[str, list[list[Micro]], bool]]:
        """The ways in which transformers' step fits: its name, micro-batches, and whether it computes blocks again."""
        if self.parts[kind] == 1:
            return [("transformers", self.whole, False)]
        return [("transformers, recomputing", self.whole, True), ("transformers, cut", self.cut, False)]

    def _step_of_theirs(self, name: str, micros: list[list[Micro]], recomputes: bool, step: int) -> None:
        with self._as_theirs(recomputes):
            self._step([partial(self._of_micro, micro) for number in self._numbers(step) for micro in micros[number]])

    def _numbers(self, step: int) -> range:
        """The micro-batches of a step."""
        return range(step * self.accumulation, (step + 1) * self.accumulation)

    def _step(self, backwards: list[Callable[[], Tensor]]) -> None:
        optimizer = self.model.trainer.optimizers[0]
        optimizer.zero_grad(set_to_none=True)  # the Trainer does so only in the next step
        self._added(backwards)
        optimizer.step()

    def _added(self, backwards: list[Callable[[], Tensor]]) -> Tensor:
        """The sum of these losses, whose gradients are added up and reduced with the last."""
        with self.model.trainer.strategy.block_backward_sync():
            losses = [backward() for backward in backwards[:-1]]
        return torch.stack([*losses, backwards[-1]()]).sum()

    def _ours(self, number: int) -> Tensor:
        """Loss of one of our micro-batches, whose gradients are added to those that are there."""
        batch: Batch = self.packed[number]
        loss = self.model.loss_sum(batch) / (len(batch.targets) * self.accumulation)
        loss.backward()
        return loss.detach() * self.accumulation

    def _of_micro(self, micro: Micro) -> Tensor:
        """The same of one of transformers'."""
        loss = self.model.their_loss(micro.inputs) * (micro.share / self.accumulation)  # type: ignore[operator]
        loss.backward()
        return loss.detach() * self.accumulation

    def _of_parts(self, micros: list[Micro]) -> Tensor:
        """The same of one of ours that is cut into these."""
        return self._added([partial(self._of_micro, micro) for micro in micros])

    def _collated(self, documents: list[Document], parts: int) -> list[Micro]:
        some = [documents[number::parts] for number in range(parts)]
        counts = [sum(int((document.labels != IGNORE_INDEX).sum()) for document in few) for few in some]
        return [
            Micro(padded(few, self.model, self.model.device), count / sum(counts)) for few, count in zip(some, counts, strict=True)
        ]

    def _loss_and_gradients(self, step: Callable[[], Tensor], context: AbstractContextManager) -> tuple[float, dict[str, Tensor]]:
        self.model.zero_grad(set_to_none=True)
        with context:
            loss = step()
        gradients = self._gradients()
        self.model.zero_grad(set_to_none=True)
        return loss.item(), gradients

    @contextmanager
    def _as_theirs(self, recomputes: bool) -> Iterator[None]:
        decoder = self.model.decoder
        before = decoder.training
        if recomputes:
            decoder.train()  # as the Trainer does with frozen parts too: in evaluation transformers computes nothing again
            self.llava.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            # around the backward pass as well, which may run blocks again
            with plain_blocks(self.model), attention(decoder.lm, "sdpa"):
                yield
        finally:
            decoder.train(before)
            if recomputes:
                self.llava.gradient_checkpointing_disable()

    def _gradients(self) -> dict[str, Tensor]:
        """Those of the projector, and of matrices at both ends of the decoder."""
        depth = len(self.model.decoder.blocks()) - 1
        wanted = ("projector.", "layers.0.self_attn.q_proj", f"layers.{depth}.mlp.down_proj", "lm_head", "embed_tokens")
        named = [(n, p) for n, p in self.model.named_parameters() if p.grad is not None and any(word in n for word in wanted)]
        return {name: getattr(p.grad, "full_tensor", p.grad.clone)().float().clone() for name, p in named}


@contextmanager
def plain_blocks(model: VisionLanguageModel) -> Iterator[None]:
    """The decoder's blocks as transformers wrote them, without what compiles or recomputes them."""
    changed = [(block, block.__dict__.pop("forward")) for block in model.decoder.blocks() if "forward" in block.__dict__]
    try:
        yield
    finally:
        for block, forward in changed:
            block.forward = forward
