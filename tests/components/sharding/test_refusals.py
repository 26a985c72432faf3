"""Which strategy continues what another one wrote, and what is said where one cannot do what it is asked."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from small_recipe import fit, write_recipe

from components.errors import RecipeError
from components.sharding.refusals import demand_same_sharding

STATED = {"param_dtype": "float32", "reduce_dtype": "float32"}


def strategy(name, replicas=1, shards=8):
    return {"class_path": f"components.sharding.{name}", "init_args": {"replicas": replicas, "shards": shards, **STATED}}


FSDP1, FSDP2 = strategy("FullyShardedV1"), strategy("HybridSharding")
WHOLE = "auto"


def refusal(written, reads, trains=True):
    if isinstance(reads, dict):
        reads = Namespace(class_path=reads["class_path"], init_args=Namespace(**reads["init_args"]))  # as the parser gives it
    try:
        demand_same_sharding(Path("step_4"), written, reads, written != WHOLE, trains)
    except RecipeError as error:
        return str(error)


@pytest.mark.parametrize("one", [FSDP1, FSDP2, WHOLE])
def test_a_strategy_continues_its_own(one):
    assert refusal(one, one) is None


@pytest.mark.parametrize(
    ("written", "reads", "told"),
    [
        (FSDP1, FSDP2, "step_4 is sharded by FullyShardedV1 (FSDP1), but trainer.strategy is HybridSharding (FSDP2)."),
        (FSDP2, FSDP1, "step_4 is sharded by HybridSharding (FSDP2), but trainer.strategy is FullyShardedV1 (FSDP1)."),
        (FSDP1, WHOLE, "step_4 is sharded, but trainer.strategy is not sharded."),
        (WHOLE, FSDP1, "step_4 is not sharded, but trainer.strategy is sharded."),
        (FSDP2, WHOLE, "step_4 is sharded, but trainer.strategy is not sharded."),
        (FSDP1, strategy("FullyShardedV1", 2, 4), "step_4 was written on 1 replicas x 8 shards, but trainer.strategy lays 2 x 4."),
        (
            FSDP1,
            strategy("FullyShardedV1", 1, 16),
            "step_4 was written on 1 replicas x 8 shards, but trainer.strategy lays 1 x 16.",
        ),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_another_one_does_not(written, reads, told, trains):
    message = refusal(written, reads, trains)
    if "was written on" in told and not trains:
        assert message is None
    else:
        assert message.startswith(told)
        assert "components.sharding.HybridSharding (recipes/trainer/fsdp_8xa100.yaml)" in message
        assert "model.initial_weights" in message


def test_fsdp2_continues_on_any_mesh():
    assert refusal(FSDP2, strategy("HybridSharding", 2, 16)) is None


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_the_command_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "small.yaml")
    overlay = tmp_path / "overlay.yaml"

    def told(of):
        overlay.write_text(yaml.safe_dump({"trainer": {"strategy": of}}))
        assert fit(recipe, "--config", str(overlay)) == 2
        return capsys.readouterr().err

    asked = told({**FSDP1, "init_args": {**FSDP1["init_args"], "defer_reduce_scatter": True}})
    assert "FSDP1 has no defer_reduce_scatter. Give components.sharding.HybridSharding (recipes/trainer/fsdp_8xa100.yaml)" in asked
    misspelled = told({**FSDP1, "init_args": {**FSDP1["init_args"], "defer": True}})
    assert "Option 'defer' is not accepted" in misspelled and "FSDP1 has no" not in misspelled
    for name in ("FullyShardedV1", "HybridSharding"):
        assert "1 replicas x 8 shards = 8 ranks, but the trainer has 1 nodes x 1 devices" in told(strategy(name))
        assert "replicas 0 and shards 1 must be at least 1" in told(strategy(name, 0, 1))
    for stock in ("fsdp", {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}):
        assert "trainer.strategy is Lightning's own FSDP" in told(stock)
