"""The first lines of a run on one process; those of a sharded run are with the distributed tests."""

import pytest
from tiny import TOWER_FROZEN, Prepared, tiny_batch, tiny_model, tiny_trainer

from callbacks.overview import Overview


@pytest.mark.parametrize(("precision", "compute"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_parts_and_dtypes(precision, compute, capsys):
    tiny_trainer(callbacks=[Overview()], precision=precision).fit(tiny_model(TOWER_FROZEN), datamodule=Prepared([tiny_batch()]))
    lines = capsys.readouterr().out.splitlines()
    assert f"compute {compute}, storage float32, reduce float32; 1 ranks on cpu" in lines
    assert [line.split()[0::3] for line in lines[1:4]] == [["vision_tower", "frozen"], ["projector", "0.002"], ["decoder", "0.003"]]
    assert [line.split()[2] == "0" for line in lines[1:4]] == [True, False, False]
