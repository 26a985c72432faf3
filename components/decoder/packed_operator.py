"""Attention over packed documents on a CPU as one operator: a compiler sees neither how many documents there are nor how long.

Source: torch.library.custom_op, around the kernels of `scaled_dot_product_attention` on a CPU. Differs: plain PyTorch calls
`scaled_dot_product_attention` for every document, which is as quick; only what is compiled comes here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("vlm_recipes::packed_attention", mutates_args=(), device_types="cpu")
def packed_operator(
    query: Tensor, key: Tensor, value: Tensor, cumulative_lengths: Tensor, scaling: float | None, sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    """Packed queries, keys and values in; attended values, and the logarithms of the softmax's sums for the backward pass, out.

    Args:
        query: Of all documents, `[1, heads, tokens, head_dim]`.
        key: Of the same shape.
        value: Of the same shape.
        cumulative_lengths: 0 and the end of every document.
        scaling: Factor of the scores; None: 1 / sqrt(head_dim).
        sliding_window: Keys that a query sees, itself included, >= 1; None: all up to itself.

    Returns:
        Attended values `[1, tokens, heads, head_dim]` and sums `[1, tokens, heads]`.
    """
    output, sums = _results(query)
    views = [query, key, value, output.transpose(1, 2), sums.transpose(1, 2)]
    for q, k, v, attended, sums_of_document in _documents(cumulative_lengths, views):
        mask = window_mask(q, sliding_window)
        results = _forward(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling)
        attended.copy_(results[0])
        sums_of_document.copy_(results[1])
    return output, sums


@packed_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cumulative_lengths: Tensor, scaling: Any, sliding_window: Any) -> Any:
    return _results(query)


@torch.library.custom_op("vlm_recipes::packed_attention_backward", mutates_args=(), device_types="cpu")
def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    cumulative_lengths: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> list[Tensor]:
    gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
    views = [gradient.transpose(1, 2), query, key, value, output.transpose(1, 2), sums.transpose(1, 2), *gradients]
    for g, q, k, v, attended, sums_of_document, *mine in _documents(cumulative_lengths, views):
        mask = window_mask(q, sliding_window)
        results = _backward(g, q, k, v, attended, sums_of_document, 0.0, mask is None, attn_mask=mask, scale=scaling)
        for here, result in zip(mine, results, strict=True):
            here.copy_(result)
    return gradients


@_gradients.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    return [torch.empty_like(tensor) for tensor in (query, key, value)]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scaling, ctx.sliding_window = inputs
    ctx.save_for_backward(*tensors, *output)


def _pass_back(ctx: Any, gradient: Tensor, gradient_of_sums: Any) -> Any:
    query, key, value, cumulative_lengths, output, sums = ctx.saved_tensors
    how = (cumulative_lengths, ctx.scaling, ctx.sliding_window)
    return *_gradients(gradient, query, key, value, output, sums, *how), None, None, None


packed_operator.register_autograd(_pass_back, setup_context=_keep)


def window_mask(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """What is added to the scores of one document so that queries see a window only; None where they see all up to themselves."""
    length = query.shape[2]
    if sliding_window is None or sliding_window >= length:
        return None
    positions = torch.arange(length, device=query.device)
    distance = positions[:, None] - positions
    unseen = (distance < 0) | (distance >= sliding_window)
    return torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill(unseen, -torch.inf)


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, tokens, heads, dtype=exact)


def _documents(cumulative_lengths: Tensor, tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What each document has of every tensor, whose third axis are the tokens."""
    lengths = cumulative_lengths.diff().tolist()
    return zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)
