"""Attention over packed documents on a CPU: queries in pieces, each against the keys up to its end; for compilers one operator.

Source: torch.library.custom_op and torch.autograd.Function, around the kernels of `scaled_dot_product_attention` on a CPU. Differs:
these handle keys in blocks of 512 and compute all of a block that causality hides in part. A compiler sees neither how many
documents there are nor how long; plain PyTorch is spared what an operator costs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WHOLE = 128
"""Tokens of the longest documents that are not cut, for which more calls would cost what they save."""
_PIECE = 64

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
    return _attended(query, key, value, cumulative_lengths.diff().tolist(), scaling, sliding_window)


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
    lengths = cumulative_lengths.diff().tolist()
    return _gradients_of(gradient, query, key, value, output, sums, lengths, scaling, sliding_window)


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


class PlainPackedAttention(torch.autograd.Function):
    """The operator without a compiler: lengths of the documents in place of their ends, and attended values alone out."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Attended values `[1, tokens, heads, head_dim]`."""
        output, sums = _attended(query, key, value, lengths, scaling, sliding_window)
        ctx.how = (lengths, scaling, sliding_window)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Gradients of queries, keys and values."""
        return *_gradients_of(gradient, *ctx.saved_tensors, *ctx.how), None, None, None


def window_mask(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """What is added to the scores of one document so that queries see a window only; None where they see all up to themselves."""
    length = query.shape[2]
    if sliding_window is None or sliding_window >= length:
        return None
    return _mask(query, length, 0, sliding_window)


def _mask(query: Tensor, rows: int, before: int, window: int) -> Tensor:
    """For that many queries in a row, and that many keys before the first of them."""
    distance = torch.arange(rows, device=query.device)[:, None] + before - torch.arange(before + rows, device=query.device)
    unseen = (distance < 0) | (distance >= window)
    return torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill(unseen, -torch.inf)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None, sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    output, sums = _results(query)
    attended, sums_of_heads = output.transpose(1, 2), sums.transpose(1, 2)
    for rows, seen, mask in _pieces(query, lengths, sliding_window):
        q, k, v = query[:, :, rows], key[:, :, seen], value[:, :, seen]
        attended[:, :, rows], sums_of_heads[:, :, rows] = _forward(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling)
    return output, sums


def _gradients_of(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    lengths: list[int],
    scaling: float | None,
    sliding_window: int | None,
) -> list[Tensor]:
    of_queries, of_keys, of_values = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    by_heads = [tensor.transpose(1, 2) for tensor in (gradient, output, sums)]
    for rows, seen, mask in _pieces(query, lengths, sliding_window):
        g, attended, sums_of_piece = (tensor[:, :, rows] for tensor in by_heads)
        q, k, v = query[:, :, rows], key[:, :, seen], value[:, :, seen]
        results = _backward(g, q, k, v, attended, sums_of_piece, 0.0, mask is None, attn_mask=mask, scale=scaling)
        of_queries[:, :, rows] = results[0]
        of_keys[:, :, seen] += results[1]
        of_values[:, :, seen] += results[2]
    return [of_queries, of_keys, of_values]


def _pieces(query: Tensor, lengths: list[int], sliding_window: int | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys up to their end, and what is added to the scores, or None; where a document is cut is its own affair."""
    longest = max(lengths)
    window = longest if sliding_window is None else sliding_window
    if longest > min(WHOLE, window):
        # of the longest; every piece takes its part
        mask = _mask(query, WHOLE if window < WHOLE else _PIECE, longest, window)
    start = 0
    for length in lengths:
        piece = _PIECE if length > WHOLE else length
        for first in range(0, length, piece):
            end = min(first + piece, length)
            is_plain = first == 0 and end <= window
            mine = None if is_plain else mask[: end - first, longest - first : longest + end - first]
            yield slice(start + first, start + end), slice(start, start + end), mine
        start += length


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, tokens, heads, dtype=exact)
