"""How a model is laid over the ranks of a run: FSDP2 through Lightning's ModelParallelStrategy, and FSDP1."""

from components.sharding.fsdp1 import FullyShardedV1
from components.sharding.layout import Layout
from components.sharding.materialize import agreed, demand_finite, give_memory
from components.sharding.strategy import HybridSharding, layout_of, shard
from components.sharding.whole import gradient_norm, whole_shape

__all__ = [
    "FullyShardedV1",
    "HybridSharding",
    "Layout",
    "agreed",
    "demand_finite",
    "give_memory",
    "gradient_norm",
    "layout_of",
    "shard",
    "whole_shape",
]
