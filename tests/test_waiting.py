"""Nothing but the end of an optimizer step waits for the device: what reads a tensor, or copies a number to it, is named here."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import Callback
from small_recipe import fit, write_recipe
from tiny import TOWER_FROZEN, Prepared, TinyModel, tiny_batch, tiny_model, tiny_trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import progress
from callbacks.throughput import Throughput
from callbacks.warmup import Warmup
from components.command_line import RecipeCLI

ROOT = Path(__file__).parent.parent
READS = "item tolist numpy cpu nonzero __array__ __bool__ __int__ __float__ __index__ __contains__".split()
OPERATORS = "_local_scalar_dense nonzero nonzero_numpy equal masked_select _unique2 unique_dim unique_consecutive".split()


class Python(TorchFunctionMode):
    """What Python reads of tensors; on a CPU, much of it runs no operator."""

    def __init__(self, waits):
        self.waits = waits
        self.reads = {getattr(Tensor, name): name for name in READS}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.reads:
            self.waits.take(self.reads[func])
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            self.waits.take("number to the device")
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, Tensor) and key.dtype == torch.bool for key in keys):
                self.waits.take("boolean index")
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """What PyTorch reads inside of it, in the backward pass too."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in OPERATORS:
            self.waits.take(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Waits(Callback):
    """Micro-batches in; how often this project or Lightning waited in all of them but the first step's."""

    def __init__(self):
        self.found, self.micro_batches, self.steps, self.counts = Counter(), 0, 0, False

    def __enter__(self):
        self.modes = [Python(self), Operators(self)]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def take(self, what):
        """Something waits, unless it is attention of a CPU: on a GPU a kernel reads the lengths of the documents."""
        if not self.counts:
            return
        calls = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_stack() if self.is_code(frame)]
        if "attention.py:_per_document" not in calls:
            self.found[what, calls[-1]] += 1

    @staticmethod
    def is_code(frame):
        file = Path(frame.filename)
        ours = file.is_relative_to(ROOT / "components") or file.is_relative_to(ROOT / "callbacks")
        return ours or "lightning" in file.parts

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts = trainer.global_step > 0
        self.micro_batches += self.counts

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += self.counts and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self.counts = self.counts and trainer.global_step < trainer.max_steps  # what comes last ends the run


def test_a_step_waits_once(tmp_path, monkeypatch):
    """A run from the command line with all of its callbacks; what they read every few steps is not due."""
    waits = Waits()
    made = RecipeCLI.instantiate_trainer

    def with_waits(self, **options):
        trainer = made(self, **options)
        trainer.callbacks.insert(0, waits)
        return trainer

    monkeypatch.setattr(RecipeCLI, "instantiate_trainer", with_waits)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 1e9)
    monkeypatch.chdir(tmp_path)
    rare = {"every_n_steps": 100}
    trainer = {"accumulate_grad_batches": 2, "log_every_n_steps": 100, "gradient_clip_val": 1.0}
    recipe = write_recipe(tmp_path / "r.yaml", max_steps=4, trainer=trainer, checkpoint=rare, throughput={**rare, "peak_tflops": 1})
    with waits:
        assert fit(recipe) == 0
    assert (waits.micro_batches, waits.steps) == (6, 3)
    assert waits.found == {("tolist", "vlm.py:configure_gradient_clipping"): 3}


@pytest.mark.parametrize(
    "read",
    [
        lambda t: float(t[0]),
        lambda t: t.tolist(),
        lambda t: t[0].item(),
        lambda t: bool(t.any()),
        lambda t: 2.0 in t,
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.unique(t),
        lambda t: torch.equal(t, t),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: torch.tensor(1.0, device=t.device),
    ],
)
def test_what_waits_is_seen(monkeypatch, read):
    waits = Waits()
    monkeypatch.setattr(Waits, "is_code", staticmethod(lambda frame: True))
    tensor = torch.arange(3.0)
    with waits:
        waits.counts = True
        torch.full((), 1.0, device=tensor.device) + tensor.sum() * tensor[torch.tensor([0, 2])].mean()
        assert not waits.found
        read(tensor)
        assert waits.found


class Watched(TinyModel):
    """From the first optimizer step's end on, whatever waits is an error, but for the one reading at the end of each step."""

    def configure_gradient_clipping(self, *arguments, **options):
        torch.cuda.set_sync_debug_mode("default")
        super().configure_gradient_clipping(*arguments, **options)
        torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == self.trainer.max_steps:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; what a step reads is counted on a CPU above")
def test_a_gpu_waits_once_a_step(monkeypatch):
    monkeypatch.setattr("tiny.TinyModel", Watched)
    batches = [tiny_batch(seed).pin_memory() for seed in range(8)]
    callbacks = [Warmup(steps=1), Throughput(every_n_steps=100, peak_tflops=1.0)]
    try:
        tiny_trainer(2, steps=4, callbacks=callbacks, accelerator="gpu", precision="bf16-mixed").fit(
            tiny_model(TOWER_FROZEN), datamodule=Prepared(batches)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
