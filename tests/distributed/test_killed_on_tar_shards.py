"""`fit` on tar shards of real pictures: killed and continued, it trains the same samples to the same losses."""

import io
import json
import tarfile
from pathlib import Path

import yaml
from test_kill import SLOW, Life, pages, prove_killed_run

import main


def write_shard(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    """A shard as img2dataset writes it: picture, caption and metadata of each key."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, picture, caption in samples:
            metadata = json.dumps({"key": key, "caption": caption, "status": "success"})
            for extension, data in (("png", picture), ("txt", caption.encode()), ("json", metadata.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def captioned(folder: Path, annotations: str, images: str, count: int) -> list[tuple[bytes, str]]:
    """Pictures with the first answer about each."""
    records = json.loads((folder / annotations).read_text())[:count]
    return [((folder / images / record["image"]).read_bytes(), record["conversations"][1]["value"]) for record in records]


def write_sources(folder: Path, realdata: Path) -> Path:
    """Two sources of tar shards; one picture of them is cut in half, behind its header."""
    pictures = {
        "twemoji": captioned(realdata / "twemoji", "train_llava.json", "images", 48),
        "nlvr": captioned(realdata / "nlvr", "train_from_dev_llava.json", ".", 24),
    }
    sources = {}
    for name, weight, size in (("twemoji", 0.7, 16), ("nlvr", 0.3, 12)):
        shards = folder / name
        shards.mkdir()
        rows = [(f"{number:05}", *row) for number, row in enumerate(pictures[name])]
        if name == "nlvr":
            rows[5] = (rows[5][0], rows[5][1][: len(rows[5][1]) // 2], rows[5][2])
        for first in range(0, len(rows), size):
            write_shard(shards / f"{first // size:05}.tar", rows[first : first + size])
        sources[name] = {
            "class_path": "components.data.TarShards",
            "init_args": {"shards": f"{shards}/{{00000..0000{len(rows) // size - 1}}}.tar", "index": f"{shards}/index", "window": 2,
                          "weight": weight},
        }  # fmt: skip
    file = folder / "sources.yaml"
    file.write_text(yaml.safe_dump(sources))
    return file


def test_killed_on_tar_shards_it_trains_what_it_would_have_trained(tmp_path: Path, realdata: Path, capfd) -> None:
    data = {"sources": str(write_sources(tmp_path, realdata)), "template": "plain", "max_bad_fraction": 0.01}
    run = tmp_path / "killed"
    run.mkdir()
    for name in ("twemoji", "nlvr"):
        assert main.main(["index", "--shards", f"{tmp_path}/{name}/*.tar"]) == 0
    assert prove_killed_run(run, 1, [Life(2, SLOW)], steps=10, data=data | {"global_batch_size": 8}) >= 1
    trained = [name for page in pages(run / "runs/killed")[0] for name in page["samples"]]
    assert any(name.startswith("null of ") for name in trained) and len(set(trained)) > 40
    (bad,) = [json.loads(line) for line in (run / "runs/killed/quarantine.jsonl").read_text().splitlines()]
    assert bad["source"] == "nlvr" and "damaged" in bad["reason"] and "00005" in bad["reason"]
