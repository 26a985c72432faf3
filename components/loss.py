"""Cross-entropy of hidden states, in as many pieces as keep the logits few.

Source: torch.utils.checkpoint; like Liger's fused cross-entropy (arXiv 2410.10989) in what is never held at once. Differs: it takes
any head, and computes the logits of a piece again, where Liger computes gradients in the forward pass.
"""

from collections.abc import Callable
from math import ceil

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**27
"""Logits that are held at a time: 4194 positions of 32,000, or 882 of 152,064; at 12 bytes each in backward, 1.5 GiB."""


def pieces_of(positions: int | float, vocab_size: int) -> int:
    """How many pieces the logits of some positions are cut into, at least 1."""
    return max(1, ceil(positions * vocab_size / MOST_LOGITS))


def cross_entropy_sum(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "targets embed_dim"],
    targets: Int64[Tensor, " targets"],
    vocab_size: int,
) -> Float[Tensor, ""]:
    """Hidden states and the tokens that they should predict in, the sum of the cross-entropy out, computed in float32.

    Up to `MOST_LOGITS` it is that of all positions at once. Beyond, backward computes the logits again, piece by piece, and adds up
    the gradients of the head, in their own number format: in bfloat16, also under autocast, each sum is rounded to bfloat16 (off
    by 0.3 % of the gradient in 2 pieces, 0.5 % in 8).

    Args:
        head: Hidden states to logits; whatever it trains gets its gradients.
        hidden: At the supervised positions.
        targets: Their tokens.
        vocab_size: Width of the logits.
    """

    def of_piece(hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    pieces = pieces_of(len(targets), vocab_size)
    if pieces == 1:
        return of_piece(hidden, targets)
    pairs = zip(hidden.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
    return torch.stack([checkpoint(of_piece, *pair, use_reentrant=False) for pair in pairs]).sum()
