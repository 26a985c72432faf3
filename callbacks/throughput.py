"""How fast the run is: tokens/s, samples/s, memory, MFU where the device's peak is known; and how many samples were cut."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from components.batch import Batch
from components.errors import RecipeError
from components.flops import matmul_parameters, mfu, peak_flops, step_flops


class Throughput(Callback):
    """A run in; `train/tokens_per_second`, `train/samples_per_second`, `train/memory_gib` and `train/mfu` out, over all ranks.

    `train/truncated_samples` counts the samples of the run so far that lost their last turns to data.max_length. Checkpoints hold
    the count; a run that continues from one between two figures does not know of those since the last figure.

    Args:
        every_n_steps: Optimizer steps that each figure averages over, >= 1.
        peak_tflops: Peak of one device in TFLOP/s, > 0; null takes the published bf16 peak of A100, H100 and H200.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        if every_n_steps < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise RecipeError(f"throughput: every_n_steps = {every_n_steps} must be >= 1, peak_tflops = {peak_tflops} > 0 or null.")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self.flops: Any = 0.0  # a float, or a number on the device
        self.model: Any = None
        self.started: float | None = None
        self.truncated = 0

    def state_dict(self) -> dict[str, Any]:
        """The samples cut so far."""
        return {"truncated_samples": self.truncated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.truncated = state_dict["truncated_samples"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up what does not change."""
        self.model = pl_module
        self.sizes = matmul_parameters(self.model)
        device = pl_module.device
        known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = self.peak_tflops * 1e12 if self.peak_tflops else known
        self._restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Count; everything counted is known to the host. The clock starts with a batch: validation in between is not counted."""
        if self.started is None:
            self.started = time.perf_counter()
        self.counts[0] += batch.num_tokens
        self.counts[1] += len(batch.sample_ids)
        self.counts[2] += batch.num_truncated
        if self.peak is not None:
            squares = (batch.cumulative_lengths.diff().double() ** 2).sum()
            self.flops = self.flops + step_flops(
                self.model, self.sizes, batch.num_tokens, squares, len(batch.targets), len(batch.pixels)
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log at the steps that are due."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step % self.every_n_steps:
            return
        local = torch.tensor([*self.counts, float(self.flops)], dtype=torch.float64, device=pl_module.device)
        tokens, samples, truncated, flops = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        assert self.started is not None
        seconds = time.perf_counter() - self.started
        pl_module.log("train/tokens_per_second", tokens / seconds)
        pl_module.log("train/samples_per_second", samples / seconds)
        if truncated and not self.truncated and trainer.is_global_zero:
            tqdm.write(
                f"{int(truncated)} of the last {int(samples)} samples are longer than data.max_length and lost their last turns; "
                "train/truncated_samples goes on counting them. Raise data.max_length to keep them whole."
            )
        self.truncated += int(truncated)
        pl_module.log("train/truncated_samples", float(self.truncated))
        if self.peak is not None:
            pl_module.log("train/mfu", mfu(flops, seconds, self.peak * trainer.world_size))
        if pl_module.device.type == "cuda":
            pl_module.log("train/memory_gib", torch.cuda.max_memory_allocated(pl_module.device) / 2**30)
        self._restart()

    def _restart(self) -> None:
        self.counts = [0, 0, 0]
        self.flops = 0.0
        self.started = None
