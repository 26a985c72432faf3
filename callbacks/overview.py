"""The first lines of a run: what trains at which rate, in which dtypes, and where the run lives."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from components.sharding import FullyShardedV1, HybridSharding, whole_shape

say = rank_zero_only(print)


class Overview(Callback):
    """A run in, its first lines on the console out."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print parts, dtypes and folder."""
        model: Any = pl_module
        rates = asdict(model.learning_rates)
        say(f"{'part':14}{'parameters':>16}{'trained':>16}  peak learning rate")
        for name, part in model.parts.items():
            count = sum(whole_shape(p).numel() for p in part.parameters())
            trained = sum(whole_shape(p).numel() for p in part.parameters() if p.requires_grad)
            say(f"{name:14}{count:>16,}{trained:>16,}  {'frozen' if rates[name] is None else rates[name]}")
        storage = str(next(p for p in pl_module.parameters() if p.requires_grad).dtype).removeprefix("torch.")
        strategy = trainer.strategy
        layout = strategy.layout if isinstance(strategy, HybridSharding | FullyShardedV1) else None
        if layout is not None:
            compute, reduce = str(layout.param_dtype), str(layout.reduce_dtype)
        else:
            compute = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(str(trainer.precision), storage)
            reduce = storage
        say(f"compute {compute}, storage {storage}, reduce {reduce}; {trainer.world_size} ranks on {pl_module.device.type}")
        if layout is not None:
            say(f"layout {layout.describe()}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run stands."""
        where = f"continues at step {trainer.global_step:,}" if trainer.global_step else "starts"
        say(f"run {Path(trainer.log_dir or '.')} {where} of {trainer.max_steps:,}")
