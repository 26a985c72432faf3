"""Layout: how a model lies over the ranks of a run, in which number formats it computes, and what is exchanged when."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from components.errors import RecipeError
from components.sharding.timeouts import longest_timeout

Dtype = Literal["float32", "bfloat16"]
Checkpointing = Literal["none", "selective", "full"]

_KEY = "trainer.strategy.init_args"


@dataclass(frozen=True)
class Layout:
    """What `shard` does to a model; the strategy of a run and the plan of one hold the same.

    Args:
        replicas: Groups that hold the whole model each, >= 1.
        shards: Ranks that one copy of the model is spread over, >= 1.
        param_dtype: Number format of the computation.
        reduce_dtype: Number format in which gradients are reduced.
        reshard_after_forward: Whether a block's gathered parameters are freed after forward, and gathered again for backward.
        defer_reduce_scatter: Whether gradients stay whole on every rank until the last micro-batch of an optimizer step.
        activation_checkpointing: What of a block is computed again in the backward pass: nothing, some, or all.
        compile_blocks: Whether each block that a backward pass goes through is compiled.
        replicate_frozen: Whether parameters that do not train are held whole, in `param_dtype`, by every rank.
        whole: Whether nothing is gathered, since every rank holds the model whole in float32, and autocast casts what it needs to
            `param_dtype`. No option of a strategy: other strategies do so (auto, ddp).
    """

    replicas: int
    shards: int
    param_dtype: Dtype = "bfloat16"
    reduce_dtype: Dtype = "float32"
    reshard_after_forward: bool = True
    defer_reduce_scatter: bool = False
    activation_checkpointing: Checkpointing = "none"
    compile_blocks: bool = False
    replicate_frozen: bool = False
    whole: bool = False

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.replicas * self.shards

    def describe(self) -> str:
        """The mesh, what is computed again, and the options that are not as usual, in one line."""
        unusual = {
            "gathered parameters kept until backward": not self.reshard_after_forward,
            "gradients reduced with the last micro-batch": self.defer_reduce_scatter,
            "blocks compiled": self.compile_blocks,
            f"frozen parameters whole in {self.param_dtype}": self.replicate_frozen,
        }
        facts = [f"{self.replicas} replicas x {self.shards} shards", f"activation checkpointing {self.activation_checkpointing}"]
        return ", ".join(facts + [words for words, holds in unusual.items() if holds])


def refusal(layout: Layout, accumulation: int) -> str | None:
    """Why an option of a layout would be without effect, whatever the machine; None: each has its effect.

    Args:
        layout: How a model is to lie.
        accumulation: Micro-batches of an optimizer step, >= 1.
    """
    if layout.defer_reduce_scatter and layout.shards == 1:
        return (
            f"{_KEY}.defer_reduce_scatter has no effect, since shards is 1: nothing is scattered. Make it false; gradients cross "
            "the replicas once per optimizer step in any case."
        )
    if layout.defer_reduce_scatter and accumulation == 1:
        return (
            f"{_KEY}.defer_reduce_scatter has no effect, since trainer.accumulate_grad_batches is 1. Make it false, or let a step "
            "have several micro-batches."
        )
    if layout.compile_blocks and layout.activation_checkpointing == "selective":
        return (
            f"{_KEY}: compile_blocks has its own choice of what is computed again, which leaves none to activation_checkpointing: "
            "selective. Make the latter none or full, or compile_blocks false."
        )
    return None


def demand_fit(layout: Layout, trainer: Any) -> None:
    """The layout of a strategy can be laid over the ranks of its trainer, and none of its options is without effect there.

    Not in the strategy's constructor: of an error there the parser makes one of its own.

    Raises:
        RecipeError: A size out of range, another number of ranks, shards that would not be float32, or an option without effect.
    """
    if layout.replicas < 1 or layout.shards < 1:
        raise RecipeError(f"{_KEY}: replicas {layout.replicas} and shards {layout.shards} must be at least 1.")
    if longest_timeout(trainer.strategy) <= timedelta():
        raise RecipeError(f"{_KEY}.timeout_minutes must be above 0: a collective takes some time.")
    if layout.ranks != trainer.world_size:
        raise RecipeError(
            f"trainer.strategy lays {layout.replicas} replicas x {layout.shards} shards = {layout.ranks} ranks, but "
            f"the trainer has {trainer.num_nodes} nodes x {trainer.num_devices} devices. Make the two products equal."
        )
    if trainer.precision != "32-true":
        raise RecipeError(
            f"trainer.precision is {trainer.precision}, but trainer.strategy keeps its shards in float32 and computes in its "
            "param_dtype. Make trainer.precision 32-true."
        )
    if (reason := refusal(layout, trainer.accumulate_grad_batches)) is not None:
        raise RecipeError(reason)
