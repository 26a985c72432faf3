"""How fast shards are audited, from a disk and over HTTP, and whether to read them whole or to seek from header to header.

python -m tests.benchmarks audit [SAMPLES]
"""

import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from components.shards import one_shard
from components.shards.sample import read_sample
from components.shards.storage import Storage
from tests.benchmarks import table
from tests.components.shards.counting import CountingStorage
from tests.components.shards.hostile_shards import tar
from tests.components.shards.serving import serving
from tests.natural_pictures import jpegs

PIECES = {"4 KiB (seeks over pictures)": 2**12, "1 MiB": 2**20, "4 MiB": 2**22, "16 MiB": 2**24}
ROUNDS = 3


def main(arguments: list[str]) -> None:
    samples = int(arguments[0]) if arguments else 2000
    pictures = jpegs(500, (300, 500))
    members = []
    for number in range(samples):
        text = f"a caption of some ten words, as the web has them {number}"
        for extension, content in (
            ("jpg", pictures[number % 500]),
            ("json", json.dumps({"caption": text}).encode()),
            ("txt", text.encode()),
        ):
            members.append((f"{number:09d}.{extension}", content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(tar(members))
        megabytes = path.stat().st_size / 1e6
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("fork").Process(target=_serve, args=(Path(folder), there), daemon=True)
        server.start()
        places = {"disk": str(path), "HTTP": f"{here.recv()}/0.tar"}
        try:
            rows = [
                _measure(place, url, pieces, samples, megabytes)
                for pieces in PIECES
                for place, url in places.items()
                if place == "disk" or PIECES[pieces] >= 2**20  # a request for each header takes minutes
            ]
            rows.append(_lookups(str(path), samples))
        finally:
            server.terminate()
        server.join()
    title = f"One shard of {samples} samples, {megabytes:.0f} MB, pictures of 300 to 500 px, in the page cache; best of {ROUNDS}"
    print(table(title, ("pieces", "read from", "samples/CPU-s", "MB/CPU-s", "samples/s", "MB/s", "bytes read of each"), rows))


def _measure(place: str, url: str, pieces: str, samples: int, megabytes: float) -> tuple[object, ...]:
    one_shard._PIECE = PIECES[pieces]
    spent = []
    for _ in range(ROUNDS):
        storage = CountingStorage()
        before = time.process_time(), time.perf_counter()
        found, _ = one_shard.audit_shard(url, "0", storage)
        assert found.samples == samples
        spent.append((time.process_time() - before[0], time.perf_counter() - before[1]))
    computed, passed = np.min(spent, axis=0)
    return (
        pieces,
        place,
        *(round(float(figure)) for figure in (samples / computed, megabytes / computed, samples / passed, megabytes / passed)),
        f"{storage.read_bytes / 1e6 / megabytes:.3f}",
    )


def _lookups(path: str, samples: int) -> tuple[object, ...]:
    storage, order = Storage(), np.random.default_rng(0).permutation(samples)
    rows = one_shard.audit_shard(path, "0", storage)[1]
    before = time.process_time(), time.perf_counter()
    for number in order:
        read_sample(storage, path, rows[number])
    computed, passed = time.process_time() - before[0], time.perf_counter() - before[1]
    return "one sample, by its row", "disk", round(samples / computed), "", round(samples / passed), "", ""


def _serve(folder: Path, ready: Connection) -> None:
    with serving(folder) as server:
        ready.send(server.url)
        time.sleep(3600)
