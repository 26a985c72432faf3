"""Batch: the one contract between data and model. Documents lie end to end in one row; there is no padding."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from components.tokenizer import WordTokenizer

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

IMAGE_TOKEN_ID = -200
"""Stands at every visual-token slot. It needs no embedding row: slots are overwritten before the look-up."""


@dataclass(frozen=True)
class SampleFormat:
    """What the data must know of the model.

    Args:
        tokenizer: Hub name or folder of a Hugging Face tokenizer, or a file-free `WordTokenizer`.
        tokens_per_image: Visual tokens that one picture becomes.
        image_size: Side of the square picture, in pixels.
        image_mean: Mean colour of the tower's preprocessing, per channel in [0, 1]; fills the border of padded pictures.
        image_token_id: Id at every visual-token slot.
    """

    tokenizer: str | WordTokenizer
    tokens_per_image: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_token_id: int = IMAGE_TOKEN_ID


@dataclass
class Document:
    """One sample, tokenized and with decoded pictures: what is packed into a batch.

    Args:
        sample_id: Name of the sample in logs and error messages.
        input_ids: Token ids; every visual-token slot holds the image token id.
        labels: The id itself where supervised, `IGNORE_INDEX` elsewhere. Not shifted.
        pixels: Pictures in the order of their slots.
        truncated: Whether its last turns were dropped because it was too long.
    """

    sample_id: str
    input_ids: Int64[np.ndarray, " tokens"]
    labels: Int64[np.ndarray, " tokens"]
    pixels: UInt8[np.ndarray, "images 3 size size"]
    truncated: bool = False


@dataclass
class Batch:
    """Documents packed end to end in one row, with every index the step needs.

    Args:
        input_ids: Token ids of all documents; the image token id at visual-token slots.
        position_ids: Position inside the document; restarts at 0 in every document.
        cumulative_lengths: 0 and the end of every document; attention never crosses one.
        max_length: Length of the longest document, in tokens.
        target_positions: Positions whose output predicts a supervised token (already shifted).
        targets: The supervised tokens, one for each of `target_positions`.
        image_positions: Positions of the visual-token slots, in the order of the pictures.
        pixels: Pictures in the order of their slots; normalised on the device.
        sample_ids: Names of the documents, for logs and error messages.
        bad_samples: Source and reason of every document that was replaced by a null document.
        num_truncated: Documents whose last turns were dropped because they were too long.
    """

    input_ids: Int64[Tensor, " tokens"]
    position_ids: Int64[Tensor, " tokens"]
    cumulative_lengths: Int[Tensor, " documents_and_one"]
    max_length: int
    target_positions: Int64[Tensor, " targets"]
    targets: Int64[Tensor, " targets"]
    image_positions: Int64[Tensor, " visual_tokens"]
    pixels: UInt8[Tensor, "images 3 size size"]
    sample_ids: list[str]
    bad_samples: list[tuple[str, str]]
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the row, visual ones included."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`; the host does not wait until page-locked memory has been copied by CUDA."""
        # CUDA's memory is given to nobody else before that; on other devices, as MPS, what is read could be garbage
        non_blocking = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def __getstate__(self) -> dict[str, Any]:
        """All tensors but the pixels by value: each one in shared memory costs a connection between worker and main process."""
        state = dict(self.__dict__)
        return {k: v.numpy() if isinstance(v, Tensor) and k != "pixels" and v.device.type == "cpu" else v for k, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()})

    def _map(self, function) -> "Batch":  # noqa: ANN001
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(
    documents: list[Document], image_token_id: int = IMAGE_TOKEN_ID, bad_samples: list[tuple[str, str]] | None = None
) -> Batch:
    """Documents in, one packed `Batch` out: as many tokens as the documents have together.

    Args:
        documents: At least one document.
        image_token_id: Id that marks the visual-token slots.
        bad_samples: Source and reason of each sample that was replaced by a null document.
    """
    lengths = np.array([len(document.input_ids) for document in documents])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    input_ids = np.concatenate([document.input_ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    labels[starts] = IGNORE_INDEX  # nothing before it could predict the first token of a document
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, lengths)),
        cumulative_lengths=torch.from_numpy(np.concatenate([[0], ends])).to(torch.int32),
        max_length=int(lengths.max()),
        target_positions=torch.from_numpy(supervised - 1),
        targets=torch.from_numpy(labels[supervised]),
        image_positions=torch.from_numpy(np.flatnonzero(input_ids == image_token_id)),
        pixels=torch.from_numpy(np.concatenate([document.pixels for document in documents])),
        sample_ids=[document.sample_id for document in documents],
        bad_samples=bad_samples or [],
        num_truncated=sum(document.truncated for document in documents),
    )
