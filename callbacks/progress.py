"""The progress bar of a run: optimizer steps, loss, tokens/s and time left."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_SECONDS_BETWEEN_UPDATES = 0.5  # reading the loss waits for the device, so not at every step


class Progress(ProgressBar):
    """A run in, one line on the console out that counts optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: tqdm | None = None

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar starts at the step that the run continues from."""
        self.bar = tqdm(
            desc="training",
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            disable=not self.enabled,
            mininterval=_SECONDS_BETWEEN_UPDATES,
            dynamic_ncols=True,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance after each optimizer step; show loss and tokens/s when the line is drawn anew."""
        assert self.bar is not None
        if self.enabled and trainer.global_step > self.bar.n and self.bar.update(trainer.global_step - self.bar.n):
            metrics = trainer.callback_metrics
            shown = {}
            if "train/loss" in metrics:
                shown["loss"] = f"{metrics['train/loss'].item():.3f}"
            if "train/tokens_per_second" in metrics:
                shown["tokens/s"] = f"{metrics['train/tokens_per_second'].item():,.0f}"
            self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished line on the console."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line where it stopped."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
