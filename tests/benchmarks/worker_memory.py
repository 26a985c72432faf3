"""Private memory of loader workers over an epoch of 665,000 conversations, read by the real source, loader and preparation.

The file has the lengths of LLaVA's 665K mix (modelled, see `packing`) at 4 characters a token; all its pictures are one small file.

python -m tests.benchmarks worker_memory [CONVERSATIONS]
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from components.data import LlavaConversations
from components.shapes_world import WORDS
from tests.benchmarks import table
from tests.benchmarks.packing import modelled_lengths
from tests.components.data.small_data import LAYOUT, opened

WORKERS = 2
SAMPLES = 16
PARTS = (0, 25, 50, 75, 100)
FOLDERS = 1000
BOUND = 60


def main(arguments: list[str]) -> None:
    count = int(arguments[0]) if arguments else 665_000
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_conversations(Path(folder), count)
        megabytes = annotations.stat().st_size / 1e6
        start = time.perf_counter()
        data = opened(
            {"mix": LlavaConversations(str(annotations), f"{folder}/images")}, Path(folder) / "run", num_workers=WORKERS,
            global_batch_size=SAMPLES, max_length=4096, fast_images=True, layout=replace(LAYOUT, image_size=32),
        )  # fmt: skip
        opening = time.perf_counter() - start
        data.trainer.max_steps = count // SAMPLES
        rows, main_before = [], private_megabytes("self")
        start = time.perf_counter()
        batches = iter(data.train_dataloader())
        marks = {max(1, data.trainer.max_steps * part // 100): part for part in PARTS}
        for number in range(1, data.trainer.max_steps + 1):
            batch = next(batches)
            assert not batch.bad_samples, batch.bad_samples
            if number in marks:  # before the loader ends its workers
                private = [private_megabytes(worker.pid) for worker in batches._workers]
                seconds = time.perf_counter() - start
                rows.append((f"{marks[number]} %", *private, private_megabytes("self"), f"{number * SAMPLES / seconds:.0f}"))
                print(*rows[-1], flush=True)  # an epoch takes minutes
        title = f"{count:,} conversations, {megabytes:.0f} MB of JSON, opened in {opening:.1f} s; main {main_before:.0f} MB before"
        columns = ("of the epoch", *(f"worker {n}, MB" for n in range(WORKERS)), "main, MB", "samples/s")
        print(table(f"Private memory (USS), {WORKERS} workers, at most {BOUND} MB wanted. {title}", columns, rows))


def write_conversations(folder: Path, count: int) -> Path:
    """A LLaVA file with the lengths of the 665K mix, and the one picture it shows under many names."""
    random = np.random.default_rng(0)
    lengths = np.resize(modelled_lengths(), count)
    images = folder / "images"
    for number in range(FOLDERS):
        (images / f"{number:03d}").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(images / "000" / "picture.jpg")
    for number in range(1, FOLDERS):
        (images / f"{number:03d}" / "picture.jpg").hardlink_to(images / "000" / "picture.jpg")
    text = " ".join(random.choice(list(WORDS), 20_000))
    path = folder / "mix.json"
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, length in enumerate(lengths.tolist()):
            characters = 4 * (abs(length) - 38 - (576 if length > 0 else 0))
            begin = int(random.integers(0, len(text) - 9000))
            answer = text[begin : begin + max(8, characters - 40)]
            turns = [
                {"from": "human", "value": "<image>\nwhat is it" if length > 0 else "what is it"},
                {"from": "gpt", "value": answer},
            ]
            record = {"id": str(number), "conversations": turns}
            if length > 0:
                record["image"] = f"{number % FOLDERS:03d}/picture.jpg"
            file.write((",\n" if number else "") + json.dumps(record))
        file.write("]")
    return path


def private_megabytes(pid: int | str) -> float:
    """Memory that is a process's alone (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024 / 1e6
