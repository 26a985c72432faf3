"""A run of a few steps on one process, with checkpoints on the way."""

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import Logger
from tiny import tiny_trainer
from torch.utils.data import DataLoader

from callbacks.checkpoint import Checkpoint
from components.data.micro_batches import FromStep
from components.run_folder import checkpoint_folder, complete_checkpoints

STEPS = 5


class Small(LightningModule):
    """Learns to answer nought; remembers the loss of every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = torch.nn.Linear(64, 256).requires_grad_(False)
        self.trained = torch.nn.Linear(256, 256)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.trained(self.frozen(batch)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.trained.parameters(), 1e-2, fused=True)

    def train_dataloader(self):
        rest = FromStep(self.trainer.global_step, STEPS, 1)
        return DataLoader(torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(1)), batch_size=None, sampler=rest)


def train(run, callbacks=(), resumed_from=None, **options):
    """A few steps, with checkpoints after each; the losses, and the numbers that were logged by step."""
    checkpoint = Checkpoint(**{"every_n_steps": 1, "keep": 9} | options)
    trainer = tiny_trainer(
        steps=STEPS,
        callbacks=[*callbacks, checkpoint],
        enable_checkpointing=True,
        default_root_dir=run,
        logger=Log(run),
        log_every_n_steps=1,
    )
    model = Small()
    trainer.fit(model, ckpt_path=resumed_from, weights_only=False)
    return model.losses, trainer.logger.metrics


class Log(Logger):
    """Numbers that a run logs, by step."""

    name = version = ""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.metrics = []

    @property
    def save_dir(self):
        return str(self.folder)

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *arguments, **options): ...


def steps(run):
    return [int(folder.name.removeprefix("step_")) for folder in complete_checkpoints(run)]


def state(run, step):
    return torch.load(checkpoint_folder(run, step) / "state", weights_only=False)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs
