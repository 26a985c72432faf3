"""Under SLURM a run that is told to end saves and leaves with 143, and the job's script queues it again; Lightning does not."""

import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from small_recipe import fit, write_recipe

from components.run_folder import complete_checkpoints

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "pretrain",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


class TimeIsUp(Callback):
    """The signal of `--signal=USR1@600`, in the second step; notes where Lightning believes to be."""

    environments: ClassVar[list[Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.environments.append(trainer._accelerator_connector.cluster_environment)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_script_queues_again_not_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {tmp_path}/queued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    recipe = write_recipe(tmp_path / "small.yaml", trainer={"callbacks": [{"class_path": "test_slurm.TimeIsUp"}]})
    with pytest.raises(SystemExit) as end:
        fit(recipe)
    assert end.value.code == 143
    assert [folder.name for folder in complete_checkpoints(Path("runs/small"))] == ["step_00000002"]
    assert not (tmp_path / "queued").exists()
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # what Lightning saves inside its handler
    environment = TimeIsUp.environments[-1]
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
