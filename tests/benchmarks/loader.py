"""What loading costs: our sources, webdataset and plain JSON files with a folder, the same pictures, one worker, 336 px.

The unit is samples per second of a core: processor time of the main process and its worker together. Rounds go through all ways
in shuffled order; medians with their range. "of the limit" is the share of what libjpeg-turbo reaches that decodes and does no
more. "overhead" is the processor time of the same loader without decoding and resizing, as a share of its whole time.

python -m tests.benchmarks loader [SAMPLES [ROUNDS]]
"""

import gc
import io
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch
import transformers
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from components.data import LlavaConversations, Source, TarShards
from components.images import square
from components.shards.audit import audit
from components.shards.names import expand
from tests.benchmarks import table
from tests.components.data.small_data import LAYOUT, opened
from tests.natural_pictures import jpegs

SHARDS, SHARD_SAMPLES, BATCH, SIZE = 20, 500, 16, 336
FILL = LAYOUT.image_mean
BLANK = np.zeros((3, SIZE, SIZE), dtype=np.uint8)

Picture = Callable[[bytes], np.ndarray]
Way = Callable[[], Any]


def exact(data: bytes) -> np.ndarray:
    return square(data, SIZE, "pad", FILL)


def fast(data: bytes) -> np.ndarray:
    return square(data, SIZE, "pad", FILL, fast=True)


def nothing(data: bytes) -> np.ndarray:
    return BLANK


class LlavaPixels:
    """As LLaVA's LazySupervisedDataset: PIL, padding to a square, CLIP's processor; float pixels."""

    def __init__(self) -> None:
        self.processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)

    def __call__(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        padded = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in self.processor.image_mean))
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.processor(padded)["pixel_values"][0]


class ListAndFolder(Dataset):
    """The plain way: a list of dicts from json.load, a file opened for each."""

    def __init__(self, folder: Path, picture: Picture) -> None:
        self.records = json.loads((folder / "pairs.json").read_text())
        self.folder, self.picture = folder, picture

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        record = self.records[index]
        data = (self.folder / "images" / record["image"]).read_bytes()
        return torch.as_tensor(self.picture(data)), record["conversations"][1]["value"]


class Benchmark:
    """All ways over the same samples of one folder."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.pictures = write_samples(folder)
        audit(expand(str(folder / "*.tar")), folder / "index", 1)

    def ways(self) -> dict[str, Way]:
        llava = LlavaPixels()
        return {
            "limit: libjpeg-turbo decodes, no loader": lambda: self.alone(simplejpeg.decode_jpeg),
            "our fast path, no loader": lambda: self.alone(fast),
            "our exact path, no loader": lambda: self.alone(exact),
            "tar shards, fast": lambda: self.ours(self.shards(), fast_images=True),
            "tar shards, exact": lambda: self.ours(self.shards(), fast_images=False),
            "tar shards, no pictures": lambda: self.ours(self.shards(), blank=True),
            "JSON and folder, fast": lambda: self.ours(self.records(), fast_images=True),
            "JSON and folder, exact": lambda: self.ours(self.records(), fast_images=False),
            "JSON and folder, no pictures": lambda: self.ours(self.records(), blank=True),
            "webdataset with our fast path": lambda: self.webdataset(fast),
            "webdataset with PIL and CLIP's processor": lambda: self.webdataset(llava),
            "webdataset, no pictures": lambda: self.webdataset(nothing),
            "plain dataset with our fast path": lambda: self.plain(fast),
            "plain dataset with PIL and CLIP's processor (LLaVA)": lambda: self.plain(llava),
            "plain dataset, no pictures": lambda: self.plain(nothing),
        }

    def alone(self, picture: Picture) -> None:
        for number in range(self.samples):
            picture(self.pictures[number % len(self.pictures)])

    def shards(self) -> Source:
        return TarShards(str(self.folder / "{00000..00019}.tar"), str(self.folder / "index"))

    def records(self) -> Source:
        return LlavaConversations(str(self.folder / "pairs.json"), str(self.folder / "images"))

    def ours(self, source: Source, blank: bool = False, **options: Any) -> Iterator[Any]:
        data = opened(
            {"pairs": source}, self.folder, num_workers=1, global_batch_size=BATCH, template="plain",
            layout=replace(LAYOUT, image_size=SIZE, tokens_per_image=576), **options,
        )  # fmt: skip
        data.trainer.max_steps = self.samples // BATCH
        with mock.patch("components.data.preparation.square", lambda *_: BLANK) if blank else mock.MagicMock():
            return iter(data.train_dataloader())  # the worker is forked here

    def webdataset(self, picture: Picture) -> Iterator[Any]:
        dataset = (
            webdataset.WebDataset(str(self.folder / "{00000..00019}.tar"), shardshuffle=SHARDS, seed=0)
            .shuffle(1000).map_dict(jpg=lambda data: torch.as_tensor(picture(data)), txt=bytes.decode).to_tuple("jpg", "txt")
            .batched(BATCH).with_epoch(self.samples // BATCH)
        )  # fmt: skip
        return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=1))

    def plain(self, picture: Picture) -> Iterator[Any]:
        dataset = ListAndFolder(self.folder, picture)
        order = np.random.default_rng(0).permutation(len(dataset))[: self.samples].tolist()
        return iter(DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=1))


def write_samples(folder: Path) -> list[bytes]:
    """20 tars of 500 samples, and the same as a JSON file and a folder; returns the pictures."""
    pictures, records = jpegs(SHARD_SAMPLES, (300, 500)), []
    (folder / "images").mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for number, picture in enumerate(pictures):
                key, caption = f"{shard:05d}{number:04d}", "a caption of some ten words as the web has them"
                tar.write({"__key__": key, "jpg": picture, "txt": caption})
                (folder / "images" / f"{key}.jpg").write_bytes(picture)
                turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
                records.append({"id": key, "image": f"{key}.jpg", "conversations": turns})
    (folder / "pairs.json").write_text(json.dumps(records))
    return pictures


def rate(way: Way, samples: int) -> float:
    """Samples per second of a core, from the first batch on: starting a worker is no part of it."""
    gc.collect()
    start = time.process_time()
    batches = way()
    if batches is None:
        return samples / (time.process_time() - start)
    next(batches)
    (worker,) = multiprocessing.active_children()
    before, count = time.process_time() + processor_seconds(worker.pid), 0
    while count < samples // BATCH - 2:
        next(batches)
        count += 1
    spent = time.process_time() + processor_seconds(worker.pid) - before
    for _ in batches:
        pass
    del batches
    gc.collect()
    worker.join()
    return count * BATCH / spent


def processor_seconds(pid: int) -> float:
    """Of all threads of a process."""
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def main(arguments: list[str]) -> None:
    samples, rounds = (int(argument) for argument in (*arguments, "1600", "3")[:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), samples)
        ways = benchmark.ways()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        rate(ways["tar shards, fast"], samples)  # imports and page cache
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                rates[name].append(rate(ways[name], samples))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    limit = middle["limit: libjpeg-turbo decodes, no loader"]
    rows = []
    for name, found in rates.items():
        kind = next(
            (kind for kind in ("tar shards", "JSON and folder", "webdataset", "plain dataset") if name.startswith(kind)), ""
        )
        overhead = "" if not kind or "no pictures" in name else f"{middle[name] / middle[f'{kind}, no pictures']:.1%}"
        rows.append((name, f"{middle[name]:.0f} ({min(found):.0f}-{max(found):.0f})", middle[name] / limit, overhead))
    title = f"{SHARDS} x {SHARD_SAMPLES} JPEGs of 300-500 px, to {SIZE} px; {samples} samples a round, {rounds} rounds"
    print(table(title, ("way", "samples per core-second", "of the limit", "overhead"), rows))
