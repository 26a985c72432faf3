"""How a model is laid over the ranks of a run: FSDP2 through Lightning's ModelParallelStrategy."""

from components.sharding.layout import Layout
from components.sharding.strategy import HybridSharding, layout_of, shard

__all__ = ["HybridSharding", "Layout", "layout_of", "shard"]
