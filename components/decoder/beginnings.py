"""Prompts that begin alike, in generation: what they have in common is computed once and handed to transformers as its cache.

Source: the shared prefixes of PagedAttention, arXiv 2309.06180, section 4.4. Differs: nothing outlives a batch, and the beginnings
are computed as packed documents, without padding.
"""

import itertools
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from components.decoder.attention import PACKED, attention

STEP = 128
"""Columns that a cache grows by."""

# transformers 5.24 calls it cache
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


class ReservedLayer(DynamicLayer):
    """Keys and values of a block in, those of all tokens so far out, in memory that grows by `STEP` columns.

    Transformers' own layer copies all of them for every new token.

    Args:
        capacity: Most columns that there will be.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(
        self,
        key_states: Float[Tensor, "prompts key_heads new head_dim"],
        value_states: Float[Tensor, "prompts key_heads new value_dim"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "prompts key_heads tokens head_dim"], Float[Tensor, "prompts key_heads tokens value_dim"]]:
        """Write the new columns behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [new[:, :, :0] for new in (key_states, value_states)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if (missing := end - self.memory[0].shape[2]) > 0:
            missing = min(missing + STEP, self.capacity - self.memory[0].shape[2])
            self.memory = [functional.pad(memory, (0, 0, 0, missing)) for memory in self.memory]
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, begin:end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        # attention is quicker where all lies together
        return (self.keys, self.values) if begin else (key_states, value_states)

    def other_rows(self, *args: object, **kwargs: object) -> None:
        """Transformers' ways to other rows, as for beams, would leave the memory as it is."""
        raise NotImplementedError("The rows of reserved keys and values stay as they are: one answer a prompt, without beams.")

    batch_repeat_interleave = batch_select_indices = reorder_cache = other_rows


def reserved_cache(lm: PreTrainedModel, capacity: int) -> DynamicCache:
    """An empty cache for prompts and answers of together `capacity` columns; layers that see a window are transformers' own."""
    cache = DynamicCache(config=lm.config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def rotates_by_length(lm: PreTrainedModel) -> bool:
    """Whether the rotary embedding of a position depends on the longest of the call, so that no part of a prompt stands alone."""
    rotary: dict[str, Any] = getattr(lm.config, "rope_parameters", None) or {}
    of_layers = [section for section in rotary.values() if isinstance(section, dict)]  # some models keep one set for each kind
    kinds = [section.get("rope_type") or "" for section in (rotary, *of_layers)]
    return any(kind == "longrope" or "dynamic" in kind for kind in kinds)


def fill_beginnings(
    lm: PreTrainedModel,
    inputs_embeds: Float[Tensor, "prompts length embed_dim"],
    attention_mask: Int64[Tensor, "prompts length"],
    beginnings: list[tuple[int, int]],
    cache: DynamicCache,
) -> None:
    """Left-padded prompts in; keys and values of their first columns are put into an empty cache, perhaps of none.

    Every row ends with as many columns that are not in the cache, so that the rest has the padding of the whole: it is what the
    longest ending takes, and of rows with a shorter one the end of the beginning is computed again.

    Args:
        lm: A model whose attention is `packed`.
        inputs_embeds: Embeddings of the prompts, padded on the left.
        attention_mask: 1 at prompt tokens, 0 at padding.
        beginnings: For each prompt the row of the first that begins like it, and how many tokens they share.
        cache: Takes them.
    """
    longest = inputs_embeds.shape[1]
    padding = (longest - attention_mask.sum(1)).tolist()
    columns = min(pad + common for pad, (_, common) in zip(padding, beginnings, strict=True))
    used: dict[int, int] = {}
    for pad, (first, _) in zip(padding, beginnings, strict=True):
        used[first] = max(used.get(first, 0), columns - pad)
    # a batch without any beginning runs one token: where weights are sharded, the ranks gather them together
    lengths = {first: length for first, length in used.items() if length > 0} or {0: 1}
    starts = dict(zip(lengths, itertools.accumulate([0, *lengths.values()]), strict=False))
    packed = DynamicCache()
    tokens = [inputs_embeds[first, padding[first] : padding[first] + length] for first, length in lengths.items()]
    ends = torch.tensor([*starts.values(), sum(lengths.values())], dtype=torch.int32).to(inputs_embeds.device)
    with attention(lm, PACKED):
        lm.base_model(
            inputs_embeds=torch.cat(tokens)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths.values()])[None].to(inputs_embeds.device),
            use_cache=True,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths.values()),
            max_length_k=max(lengths.values()),
            **{CACHE: packed},
        )
    if columns <= 0:
        return
    offsets = torch.tensor([starts.get(first, 0) - pad for pad, (first, _) in zip(padding, beginnings, strict=True)])
    places = (offsets[:, None] + torch.arange(columns)).clamp(min=0).to(inputs_embeds.device)  # of padding: any
    for number, layer in enumerate(packed.layers):
        assert layer.keys is not None and layer.values is not None
        keys, values = (states[0][:, places].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.update(keys, values, number)
        layer.keys = layer.values = None
