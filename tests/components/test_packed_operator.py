"""Attention by pieces of the queries on a CPU, against PyTorch's plain computation of each document's whole square."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from components.decoder import attention

LONG = [129, 1, 63, 300, 64, 128, 65, 192]  # around the lengths of a piece and of what is not cut


def attended(lengths, tensors, **options):
    """Attended values of documents and the gradients of a weighted sum of them, as the decoder's blocks ask for them."""
    query, key, value, weights = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output, _ = attention.packed_attention(torch.nn.Identity(), *leaves, cu_seq_lens_q=ends, max_length_q=max(lengths), **options)
    output.backward(weights)
    return [output.transpose(1, 2), *(leaf.grad for leaf in leaves)]


def heads_of(lengths, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, sum(lengths), heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)]
    query, key, value, weights = (tensor.to(dtype) for tensor in tensors)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "options", [{}, {"scaling": 0.7}, {"sliding_window": 3}, {"sliding_window": 100}, {"sliding_window": 200}], ids=str
)
def test_attention_by_pieces_equals_the_whole_square_of_each_document(dtype, tolerance, options):
    tensors = heads_of(LONG, dtype)
    window = options.get("sliding_window", max(LONG))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    outputs = []
    for q, k, v in zip(*(leaf.split(LONG, dim=2) for leaf in leaves), strict=True):
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - window)
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(sdpa(q, k, v, attn_mask=seen, scale=options.get("scaling"), enable_gqa=True))
    expected = torch.cat(outputs, dim=2)
    expected.transpose(1, 2).backward(tensors[3])
    for ours, theirs in zip(attended(LONG, tensors, **options), [expected, *(leaf.grad for leaf in leaves)], strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}], ids=str)
def test_the_same_bits_in_every_run_and_whatever_the_neighbors_say(options):
    tensors, (mine, start) = heads_of(LONG, torch.float32), (300, 193)
    others = [tensor.clone() for tensor in tensors]
    for index, tensor in enumerate(others):
        for part in (slice(0, start), slice(start + mine, None)):
            tensor[(slice(None),) * (1 if index == 3 else 2) + (part,)] *= 3
    first, again, changed = (attended(LONG, each, **options) for each in (tensors, tensors, others))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rows = slice(start, start + mine)
    assert all(torch.equal(a[:, :, rows], b[:, :, rows]) for a, b in zip(first, changed, strict=True))
