"""Attention over packed documents, registered with transformers' `AttentionInterface` under the name `packed`.

The document ends travel as keyword arguments that transformers passes through its models (`cu_seq_lens_q`, `max_length_q`);
transformers builds no mask for a name it does not know in its `AttentionMaskInterface`, so nothing depends on its own detection
of packing. CUDA: `torch.nn.attention.varlen`. Elsewhere: one causal `scaled_dot_product_attention` per document; but where one is
long, or blocks are compiled, a CPU runs its kernels on pieces of the queries (`packed_operator`). On a GPU without the kernel
(float32, heads of an odd width) the host waits in every block for the lengths of the documents.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from components.decoder.packed_operator import WHOLE, PlainPackedAttention, packed_operator, window_mask
from components.errors import RecipeError

PACKED = "packed"

# what transformers hands to every attention function and has no bearing on the result here
_IGNORED = {"cu_seq_lens_k", "max_length_k", "position_ids", "use_cache", "output_hidden_states"}

# torch 2.11 and later versions take different keyword arguments
_VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 key_heads tokens head_dim"],
    value: Float[Tensor, "1 key_heads tokens value_dim"],
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Int[Tensor, " documents_and_one"] | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Packed queries, keys and values in, attended values out; causal, and no document sees another.

    Raises:
        RecipeError: The architecture asks for something that this function does not compute.
        RuntimeError: The document ends are missing.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError(
            f"{type(module).__name__} got no document ends (cu_seq_lens_q, max_length_q): documents would see one another. "
            "Call Decoder.forward, and Decoder.generate for prompts."
        )
    if dropout:
        raise RecipeError(
            f"{type(module).__name__} asks for dropout {dropout} of the attention, which packed attention does not compute. "
            "State 0.0 for it (attention_dropout or attn_pdrop) in model.decoder.init_args.config."
        )
    asked = {name: value for name, value in others.items() if value is not None and value is not False and name not in _IGNORED}
    if attention_mask is not None:
        asked["attention_mask"] = attention_mask
    if is_causal is False:
        asked["is_causal"] = is_causal
    if value.shape[-1] != query.shape[-1]:
        asked["values of another width than the queries"] = value
    if asked:
        words = ", ".join(name if isinstance(value, Tensor) else f"{name}={value}" for name, value in asked.items())
        raise RecipeError(f"{type(module).__name__} asks for {words}, which packed attention does not compute.")
    # under autocast the rotary embedding leaves queries and keys in float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if _has_kernel(query):
        return _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if query.device.type == "cpu" and (torch.compiler.is_compiling() or max_length_q > WHOLE):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if torch.compiler.is_compiling():
            return packed_operator(query, key, value, cu_seq_lens_q, scaling, sliding_window)[0], None
        lengths = cu_seq_lens_q.diff().tolist()
        return PlainPackedAttention.apply(query, key, value, lengths, scaling, sliding_window), None
    return _per_document(query, key, value, cu_seq_lens_q, scaling, sliding_window), None


AttentionInterface.register(PACKED, packed_attention)


def packed_hidden_states(
    lm: PreTrainedModel,
    inputs_embeds: Float[Tensor, "tokens embed_dim"],
    position_ids: Int[Tensor, " tokens"],
    cumulative_lengths: Int[Tensor, " documents_and_one"],
    max_length: int,
) -> Float[Tensor, "tokens embed_dim"]:
    """Packed embeddings in, hidden states after the last norm out, by a model whose attention is `packed`.

    Raises:
        RuntimeError: The model has another attention, which would let documents see one another.
    """
    if lm.config._attn_implementation != PACKED:
        # transformers writes into a config that is handed to a second model
        raise RuntimeError(
            f"The decoder's attention is {lm.config._attn_implementation!r} in place of {PACKED!r}: something that shares its "
            "config changed it. Give other models a copy: copy.deepcopy(lm.config)."
        )
    output = lm.base_model(
        inputs_embeds=inputs_embeds.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        cu_seq_lens_q=cumulative_lengths,
        cu_seq_lens_k=cumulative_lengths,
        max_length_q=max_length,
        max_length_k=max_length,
    )
    return output.last_hidden_state.squeeze(0)


@contextmanager
def attention(lm: PreTrainedModel, name: str) -> Iterator[None]:
    """`lm` with another attention for a while; the old one is back afterwards, whatever happens."""
    before = lm.config._attn_implementation
    lm.config._attn_implementation = name
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def _has_kernel(query: Tensor) -> bool:
    """Whether flash attention exists for this device, number format and width."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and _is_recent(query.device.index)
    )


@torch.compiler.assume_constant_result
def _is_recent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative_lengths: Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """PyTorch's variable-length flash attention; nothing here waits for the device."""
    arguments: dict[str, Any] = {}
    if "window_size" in _VARLEN_ARGUMENTS:
        # transformers counts the token itself, flash attention only those before it
        arguments["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is None:
        arguments["is_causal"] = True
    else:
        raise RecipeError(f"sliding_window {sliding_window} needs a newer PyTorch than {torch.__version__} on CUDA.")
    if "scale" in _VARLEN_ARGUMENTS:
        arguments["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in _VARLEN_ARGUMENTS:
        arguments["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    ends = cumulative_lengths.to(torch.int32)
    output: Any = varlen_attn(query, key, value, ends, ends, max_length, max_length, **arguments)
    return output.unsqueeze(0)


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, cumulative_lengths: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """One causal attention for each document."""
    lengths = cumulative_lengths.diff().tolist()
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = window_mask(q, sliding_window)
        grouped = q.shape[1] != k.shape[1]
        outputs.append(
            scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
