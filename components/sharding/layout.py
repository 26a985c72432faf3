"""Layout: how a model lies over the ranks of a run, in which number formats it computes, and what is exchanged when."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Checkpointing = Literal["none", "selective", "full"]


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
        compile_blocks: Whether each block is compiled.
        replicate_frozen: Whether parameters that do not train are held whole, in `param_dtype`, by every rank.
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

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.replicas * self.shards
