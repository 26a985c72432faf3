"""Proof, on the live model, that no position sees a later one and no document another.

A decoder can lose its causal mask while it trains: transformers writes into a config that is handed to a second model, and the
first then attends in both directions without a word. Two forward passes over a few tokens show it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from components.batch import Batch, Document, pack

_LENGTHS = (5, 7, 6)
_CHANGED = sum(_LENGTHS[:2]) - 1  # last token of the document in the middle
# A dense kernel treats a row alike whatever the others hold, so that the difference is exactly 0. Experts sort the rows by what
# they hold, which may round them differently: far less than this share of the largest logit, as a missing mask is far more.
_TOLERANCE = 1e-3


def prove_causal(model: Any) -> float:
    """A built `VisionLanguageModel` in, the largest difference between logits that had to stay the same out: normally 0.0.

    Of three packed documents of text, the last token of the second is changed; of all logits only its own may change. Modes,
    random numbers, gradients and buffers of the model stay as they are. If the model is sharded, all ranks call it together.

    Raises:
        RuntimeError: Other logits changed, its own did not, or they are no numbers.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would draw random numbers
    try:
        before, after = (_logits(model, batch.to(device)) for batch in _batches(model.decoder.vocab_size))
    finally:
        for module, training in modes.items():
            module.training = training
        for module in modes:
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass the root's parameters stay gathered
    if not bool(before.isfinite().all() and after.isfinite().all()):
        raise RuntimeError(
            "The logits of the decoder are not finite. Are its weights, and those it was made from, as they should be?"
        )
    change = (after - before).abs().amax(1)
    own, change[_CHANGED] = change[_CHANGED].item(), 0
    if change.max() > _TOLERANCE * before.abs().max():
        raise RuntimeError(
            f"The decoder is not causal: another token at position {_CHANGED} of a packed row, where a document of {_LENGTHS[1]} "
            f"tokens ends, changes the logits of position {int(change.argmax())} by {change.max():.2g}. Look for a config that is "
            "shared with another model: transformers writes into the one it is given, which takes the mask away from the model "
            "that has it. Give other models a copy: copy.deepcopy(lm.config)."
        )
    if own == 0:
        raise RuntimeError("The logits of the decoder do not depend on its tokens. Are its weights more than zeros?")
    return change.max().item()


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    # the root's own forward pass, whose hooks gather the shards
    return model(batch).float()


def _batches(vocab_size: int) -> tuple[Batch, Batch]:
    """Three documents with a logit for every position, and the same with another token at `_CHANGED`."""
    total = sum(_LENGTHS)
    # spread over the vocabulary: its first and last rows may be special or unused
    ids = np.arange(1, total + 2, dtype=np.int64) * vocab_size // (total + 2)
    other = ids[:total].copy()
    other[_CHANGED] = ids[total]
    first, second = (_packed(row) for row in (ids[:total], other))
    return first, second


def _packed(ids: np.ndarray) -> Batch:
    rows = np.split(ids, np.cumsum(_LENGTHS)[:-1])
    no_pictures = np.zeros((0, 3, 1, 1), dtype=np.uint8)
    batch = pack([Document("causality", row, row.copy(), no_pictures) for row in rows])
    # the last position of a document predicts nothing in training; here it has logits as well
    return replace(batch, target_positions=torch.arange(len(ids)), targets=torch.from_numpy(ids))
