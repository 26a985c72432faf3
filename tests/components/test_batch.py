"""The packed batch: every token is a document's token, and every index points where it should."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_document, tiny_documents
from torch.overrides import TorchFunctionMode

from components.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Document, pack


def document(input_ids, labels, images=0):
    pixels = np.full((images, 3, 4, 4), images, dtype=np.uint8)
    return Document("by hand", np.array(input_ids), np.array(labels), pixels)


BY_HAND = [
    document([5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6, 7], [IGNORE_INDEX] * 3 + [6, 7], images=1),
    document([8], [8]),
    document([9, 10, IMAGE_TOKEN_ID, 11], [9, IGNORE_INDEX, IGNORE_INDEX, 11], images=1),
]


def test_by_hand():
    batch = pack(BY_HAND)
    assert batch.input_ids.tolist() == [5, -200, -200, 6, 7, 8, 9, 10, -200, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3]
    assert batch.cumulative_lengths.tolist() == [0, 5, 6, 10]
    assert batch.max_length == 5
    # 8 and 9 are the first tokens of their documents: only another document could predict them
    assert batch.target_positions.tolist() == [2, 3, 8]
    assert batch.targets.tolist() == [6, 7, 11]
    assert batch.image_positions.tolist() == [1, 2, 8]
    assert batch.pixels.shape == (2, 3, 4, 4)
    assert batch.sample_ids == ["by hand"] * 3
    assert batch.bad_samples == []
    assert batch.num_truncated == 0


def test_truncated_documents_are_counted():
    cut = [replace(document, truncated=number > 0) for number, document in enumerate(BY_HAND)]
    assert pack(cut).num_truncated == 2
    assert pack(cut).to("cpu").num_truncated == 2


def test_no_token_is_padding():
    documents = tiny_documents()
    batch = pack(documents)
    assert batch.num_tokens == sum(len(one.input_ids) for one in documents)
    np.testing.assert_array_equal(batch.input_ids, np.concatenate([one.input_ids for one in documents]))
    assert len(batch.targets) == sum((one.labels != IGNORE_INDEX).sum() for one in documents)


def test_pictures_keep_the_order_of_their_slots():
    first, second = tiny_document(3, (0, 2)), tiny_document(4, (1,))
    batch = pack([first, second])
    np.testing.assert_array_equal(batch.pixels, np.concatenate([first.pixels, second.pixels]))


def test_documents_are_not_changed():
    documents = copy.deepcopy(BY_HAND)
    pack(documents)
    for after, before in zip(documents, BY_HAND, strict=True):
        np.testing.assert_array_equal(after.labels, before.labels)
        np.testing.assert_array_equal(after.input_ids, before.input_ids)


def test_single_document_is_not_changed():
    one = document([5, 6], [5, 6])
    pack([one])
    assert one.labels.tolist() == [5, 6]


def test_nothing_supervised():
    batch = pack([tiny_document(3, targets=0)])
    assert batch.targets.shape == batch.target_positions.shape == (0,)
    assert batch.pixels.shape == (0, 3, 16, 16)


def test_other_image_token_and_bad_samples():
    batch = pack([document([5, 31, 6], [IGNORE_INDEX] * 3, images=1)], image_token_id=31, bad_samples=[("own", "a.png is broken")])
    assert batch.image_positions.tolist() == [1]
    assert batch.bad_samples == [("own", "a.png is broken")]


def test_no_documents():
    with pytest.raises(ValueError):
        pack([])


def test_to_moves_every_tensor_and_nothing_else():
    batch = tiny_batch()
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta"
            assert getattr(moved, name).shape == value.shape
            assert value.device.type == "cpu"
        else:
            assert getattr(moved, name) is value


class Moves(TorchFunctionMode):
    """The tensors that are moved, and whether the host waits for them."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            self.seen.append((args[0], not kwargs["non_blocking"]))
            return args[0]  # to devices that are not here, too
        return func(*args, **(kwargs or {}))


# what is sent by or to others than CUDA could be read before it has come
@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("cuda:1", False), ("mps", True), ("cpu", True)])
def test_a_device_gets_pixels_as_bytes_and_only_cuda_lets_nobody_wait(device, waits):
    batch = tiny_batch()
    for name in (device, torch.device(device)):
        with Moves() as moves:
            batch.to(name)
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.nbytes == batch.pixels.numel()
        assert any(tensor is batch.pixels for tensor, _ in moves.seen)
        assert [waited for _, waited in moves.seen] == [waits] * 7
