"""Ranks that see other data than the first end all together, before a sample is lost."""

import json
import os
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as distributed
from PIL import Image

from components.data import LlavaConversations
from components.errors import RecipeError
from tests.components.data.small_data import opened


def told(folder: Path, meeting: str, files: list[str], measured: list[bool]) -> str:
    """What the start of a run says on this rank, which reads its own file, and has measured lengths or not."""
    rank = int(os.environ["LOCAL_RANK"])
    alone = not distributed.is_initialized()  # another test may have left a group to the processes
    if alone:
        place = f"file://{folder}/{meeting}"
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    try:
        source = LlavaConversations(files[rank], str(folder))
        lengths = (lambda indices: np.full(len(indices), 7)) if measured[rank] else None
        with mock.patch("components.data.module.open_lengths", lambda measure: lengths):
            data = opened({"mine": source}, folder, rank=rank, ranks=2)
        batches = list(data.train_dataloader())
        return "trains " + " ".join(name for batch in batches for name in batch.sample_ids)
    except RecipeError as error:
        return str(error)
    finally:
        if alone:
            distributed.destroy_process_group()


def write(path: Path, count: int) -> str:
    records = [
        {
            "id": str(i),
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a " * i}],
        }
        for i in range(1, count + 1)
    ]
    path.write_text(json.dumps(records))
    return str(path)


def test_ranks_deal_the_same_samples_or_none(pair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    full, short, gone = write(tmp_path / "full.json", 48), write(tmp_path / "short.json", 47), str(tmp_path / "gone.json")
    fine = pair.run(told, tmp_path, "fine", [full, full], [True, True])
    names = sorted(int(name) for text in fine for name in text.split()[1:])
    assert names == list(range(1, 49)), fine
    for files, measured, words in (
        ([full, full], [True, False], "lengths of data.sources.mine: measured -> estimated"),
        ([full, short], [False, False], "Rank 1 sees other data than rank 0"),
        ([full, gone], [False, False], "On rank 1: data.sources.mine: There is no annotation file"),
    ):
        messages = pair.run(told, tmp_path, words[:9], files, measured)
        assert messages[0] == messages[1]
        assert words in messages[0]
