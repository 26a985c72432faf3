"""What a strategy does not do, told with the name of the one that does."""

import inspect
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy

from components.errors import RecipeError
from components.sharding.fsdp1 import FullyShardedV1
from components.sharding.strategy import HybridSharding

_FSDP2 = "components.sharding.HybridSharding (recipes/trainer/fsdp_8xa100.yaml)"
_NAMES = {HybridSharding.__name__: "HybridSharding (FSDP2)", FullyShardedV1.__name__: "FullyShardedV1 (FSDP1)"}


def demand_same_sharding(checkpoint: Path, written: Any, strategy: Any, is_sharded: bool, trains: bool) -> None:
    """A checkpoint is read by the strategy that wrote it; where FSDP1 trains on, also on the mesh that it was written on.

    Args:
        checkpoint: For the message.
        written: `trainer.strategy` of the checkpoint's recipe.
        strategy: That of the recipe which reads it.
        is_sharded: Whether the checkpoint is.
        trains: Whether training continues from it.

    Raises:
        RecipeError: It is another one.
    """
    theirs, ours = (_kind(written) or "another strategy") if is_sharded else None, _kind(strategy)
    if theirs != ours:
        if theirs and ours:
            they_are, we_are = f"sharded by {_NAMES.get(theirs, theirs)}", _NAMES[ours]
        else:
            they_are, we_are = ("sharded", "not sharded") if theirs else ("not sharded", "sharded")
        raise RecipeError(
            f"{checkpoint} is {they_are}, but trainer.strategy is {we_are}. Name a trainer file with the strategy that wrote it. A "
            f"new run (--run NAME) may start from either with model.initial_weights; sharded by {_FSDP2}, it then continues on any "
            "number of ranks."
        )
    if trains and ours == FullyShardedV1.__name__ and _mesh(written) != _mesh(strategy):
        meshes = "{} replicas x {} shards, but trainer.strategy lays {} x {}".format(*_mesh(written), *_mesh(strategy))
        raise RecipeError(
            f"{checkpoint} was written on {meshes}. FSDP1 continues on the mesh that it began with. Restore replicas and shards. A "
            f"new run (--run NAME) may start from it with model.initial_weights: {_FSDP2} continues on any number of ranks."
        )


def demand_ours(strategy: Any) -> None:
    """The strategy of a trainer, made or still a word, is not Lightning's own FSDP1.

    Raises:
        RecipeError: It is.
    """
    if (isinstance(strategy, str) and strategy.startswith("fsdp")) or type(strategy) is FSDPStrategy:
        raise RecipeError(
            "trainer.strategy is Lightning's own FSDP, of which this model cannot tell shards from whole parameters. Give "
            f"{_FSDP2}, or components.sharding.FullyShardedV1 for FSDP1."
        )


def fsdp2_alone(message: str) -> str:
    """A sentence to add to what the parser says, if it was an option of FSDP2 that FSDP1 did not take; else nothing."""
    found = re.search(rf"{FullyShardedV1.__name__}'.*?Option '(\w+)' is not accepted", message, re.DOTALL)
    known = found and found[1] in inspect.signature(HybridSharding).parameters
    return f"\nFSDP1 has no {found[1]}. Give {_FSDP2}, which has it." if found and known else ""


def _kind(strategy: Any) -> str | None:
    name = str(_get(strategy, "class_path")).rpartition(".")[2]
    return name if name in _NAMES else None


def _mesh(strategy: Any) -> tuple[int, int]:
    arguments = _get(strategy, "init_args")
    return _get(arguments, "replicas"), _get(arguments, "shards")


def _get(tree: Any, key: str) -> Any:
    """A key of a dictionary or of a parser's namespace; a strategy may also be a word, which has none."""
    return tree.get(key) if hasattr(tree, "get") else None
