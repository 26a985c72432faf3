"""What `plan` expects the steps of the GPU benchmark to need."""

from dataclasses import replace

import torch

from components.batch import Document, pack
from components.plan.machine import GPUS, Machine
from components.plan.memory import Memory, memory_of
from components.plan.schedule import Schedule
from components.plan.workload import workload_of
from components.sharding.layout import Layout
from components.vlm import VisionLanguageModel

SHARE_OF_TENSORS = 0.97
"""Of a GPU's memory, what tensors may take; the rest is for context and libraries."""


class Forecast:
    """What `plan` expects a step to need, of the micro-batch with the most tokens.

    Args:
        model: The model, not built.
        layout: How it lies on the device.
        accumulation: Micro-batches of an optimizer step.
        device: Where.
    """

    def __init__(self, model: VisionLanguageModel, layout: Layout, accumulation: int, device: torch.device) -> None:
        with torch.device("meta"):
            model.build()
        self.model, self.layout, self.accumulation = model, layout, accumulation
        gpu = GPUS["h100-80gb" if device.type == "cuda" and "H100" in torch.cuda.get_device_name() else "h200-141gb"]
        self.machine, self.gib = Machine(1, 1, gpu, 25e9), gpu.memory_gib

    def of_ours(self, micro_batches: list[list[Document]], layout: Layout) -> Memory:
        """Of our step."""
        largest = max((pack(micro_batch) for micro_batch in micro_batches), key=lambda batch: batch.num_tokens)
        return self._memory(layout, len(largest.sample_ids), largest.num_tokens, len(largest.targets))

    def parts_of_theirs(self, micro_batches: list[list[Document]]) -> int:
        """Into how many parts each micro-batch must be cut for transformers' step to fit without computing anything again."""
        samples = len(micro_batches[0])
        fitting = (
            parts
            for parts in range(1, samples + 1)
            if self._of_theirs([one[number::parts] for one in micro_batches for number in range(parts)])
            <= SHARE_OF_TENSORS * self.gib
        )
        return next(fitting, samples)

    def _of_theirs(self, micro_batches: list[list[Document]]) -> float:
        """GiB of tensors of transformers' step: padding and logits at every position, blocks uncompiled."""
        largest = max(micro_batches, key=lambda one: len(one) * max(len(document.input_ids) for document in one))
        samples, longest = len(largest), max(len(document.input_ids) for document in largest)
        tokens, visual = samples * longest, samples * self.model.sample_format().tokens_per_image
        memory = self._memory(replace(self.layout, compile_blocks=False), samples, tokens, tokens - visual)
        return memory.total - memory.allowance + memory.logits * visual / (tokens - visual)

    def _memory(self, layout: Layout, samples: int, tokens: int, targets: int) -> Memory:
        visual = self.model.sample_format().tokens_per_image
        workload = workload_of(
            self.model, text_tokens=tokens / samples - visual, target_tokens=targets / samples, images_per_sample=1,
            global_batch_size=samples * self.accumulation, max_steps=1,
        )  # fmt: skip
        return memory_of(workload, self.machine, Schedule(layout, samples, self.accumulation))
