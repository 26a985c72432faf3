"""Optimizer steps by hand on the weights of a run: as transformers' Trainer takes them, and ours without compiled blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from components.batch import Batch, Document, pack
from components.decoder.attention import attention
from components.vlm import VisionLanguageModel
from tests.benchmarks.peers import padded, transformers_llava, transformers_loss

LOSS_LIMIT, GRADIENT_LIMIT = 2e-2, 0.1
"""Relative differences from transformers' step in bf16 above which nothing is timed."""


class Peers:
    """Optimizer steps by hand on the weights of a run, once it has them.

    Args:
        model: The model of the run.
        micro_batches: Of each workload, documents of all its micro-batches.
        accumulation: Micro-batches of an optimizer step.
        theirs_recomputes: Of each workload, whether transformers' step needs gradient checkpointing.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        micro_batches: dict[str, list[list[Document]]],
        accumulation: int,
        theirs_recomputes: dict[str, bool],
    ) -> None:
        self.model, self.micro_batches, self.accumulation = model, micro_batches, accumulation
        self.theirs_recomputes = theirs_recomputes
        self.llava: Any = None
        self.remarks: list[str] = []

    def gate(self, kind: str) -> None:
        """Prepare a workload's batches, and demand that the longest has the same loss and gradients in both steps.

        Raises:
            SystemExit: It has not.
        """
        model = self.model
        if self.llava is None:
            self.llava = transformers_llava(model)
            self.llava.model.multi_modal_projector = (
                model.projector
            )  # a unit of FSDP2, which gathers what it holds when it is called
            # FSDP2 gathers what the root holds around its own forward and around what is registered
            model.their_loss = partial(transformers_loss, model, self.llava)  # type: ignore[assignment]
            register_fsdp_forward_method(model, "their_loss")
        device = model.device
        self.padded = [padded(micro_batch, model, device) for micro_batch in self.micro_batches[kind]]
        self.packed = [pack(micro_batch).to(device) for micro_batch in self.micro_batches[kind]]
        longest = max(range(len(self.padded)), key=lambda number: self.padded[number]["input_ids"].numel())
        found = {}
        for name, loss_of, context in (
            ("ours", self._our_loss, nullcontext()),
            ("theirs", self._their_loss, self._as_theirs(kind)),
        ):
            model.zero_grad(set_to_none=True)  # the Trainer does so only in the next step
            with context:
                loss = loss_of(longest)
                loss.backward()
            found[name] = (loss.item(), self._gradients())
        model.zero_grad(set_to_none=True)
        (loss, gradients), (expected, their_gradients) = found["ours"], found["theirs"]
        worst = max(float((gradients[n] - g).norm() / g.norm()) for n, g in their_gradients.items())
        if not (abs(loss - expected) <= LOSS_LIMIT * expected and worst <= GRADIENT_LIMIT):
            raise SystemExit(f"{kind}: loss {loss} and {expected}, gradients differ by {worst}: not the same step, not timed.")
        self.remarks.append(f"{kind}: loss {loss:.4f} and {expected:.4f}, gradients differ by at most {worst:.1e}")

    def theirs(self, kind: str, step: int) -> None:
        """A step as transformers' Trainer takes it."""
        with self._as_theirs(kind):
            self._step(self._their_loss, step)

    def uncompiled(self, kind: str, step: int) -> None:
        """Our step with blocks as they are."""
        with plain_blocks(self.model):
            self._step(self._our_loss, step)

    def _step(self, loss_of: Callable[[int], Tensor], step: int) -> None:
        optimizer = self.model.trainer.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        for number in range(step * self.accumulation, (step + 1) * self.accumulation):
            (loss_of(number) / self.accumulation).backward()
        optimizer.step()

    def _our_loss(self, number: int) -> Tensor:
        batch: Batch = self.packed[number]
        return self.model.loss_sum(batch) / len(batch.targets)

    def _their_loss(self, number: int) -> Tensor:
        return self.model.their_loss(self.padded[number])  # type: ignore[operator]

    @contextmanager
    def _as_theirs(self, kind: str) -> Iterator[None]:
        decoder = self.model.decoder
        before = decoder.training
        if self.theirs_recomputes[kind]:
            decoder.train()  # as the Trainer does with frozen parts too: in evaluation transformers computes nothing again
            self.llava.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            # around the backward pass as well, which may run blocks again
            with plain_blocks(self.model), attention(decoder.lm, "sdpa"):
                yield
        finally:
            decoder.train(before)
            if self.theirs_recomputes[kind]:
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
