"""Hostile files and records through the loader's own worker: trained or quarantined by name, and the worker lives on, small."""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.data import LlavaConversations
from components.data.sources.folder import Folder
from components.errors import BadSample, RecipeError
from tests.components.data.small_data import end_workers, opened
from tests.components.test_images import encoded, noise, png_chunk, png_header, text_bomb
from tests.natural_pictures import jpegs

MIB = 2**20
BOUND = 100 * MIB
"""What a worker may need for pictures as small as these, refused bombs included, beyond what it shares with its parent."""


def flipped() -> bytes:
    """One bit of a Huffman table: more codes of a length than there are."""
    data = bytearray(encoded(noise(40, 30), "JPEG"))
    data[data.index(b"\xff\xc4") + 5] ^= 0x80
    return bytes(data)


def real_bomb() -> bytes:
    """144 megapixels of black that are all there, in 420 KB."""
    compressor = zlib.compressobj(1)
    row = bytes(1 + 3 * 12_000)
    pixels = b"".join(compressor.compress(row) for _ in range(12_000)) + compressor.flush()
    return png_header(12_000, 12_000) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def turned() -> bytes:
    """Red on the left as stored, on top when seen upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 16, 32))
    return encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)


def animation() -> bytes:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut off": (lambda: jpegs(1, (40, 60))[0][:-200], "JPEG picture is damaged"),
    "flipped": (flipped, "JPEG picture is damaged"),
    "bomb header": (
        lambda: png_header(20_000, 20_000) + png_chunk(b"IDAT", b""),
        r"400000000 pixels\) exceeds limit",
    ),
    "real bomb": (real_bomb, "12000 x 12000 pixels; the limit is 50 megapixels"),
    "text bomb": (text_bomb, "Decompressed data too large"),
    "empty": (lambda: b"", r"empty \(0 bytes\)"),
    "huge file": (lambda: bytes(33 * MIB), r"has 34603008 bytes; the limit is 33554432 \(32 MiB\)"),
}
"""Files that are refused, and why."""

TRAINED: dict[str, Callable[[], bytes]] = {
    "turned": turned,
    "animation": animation,
    "cmyk": lambda: encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"),
    "long exif": lambda: encoded(Image.new("RGB", (32, 32), "red"), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(3_600_000)),
    "plain": lambda: encoded(Image.new("RGB", (32, 32), "red"), "JPEG"),
}
"""Files that are trained; all show red on top when they are seen as meant."""

NAMES = {
    "absolute": ("/etc/passwd", r"'/etc/passwd' is not named relative to the image folder"),
    "above": ("../secret.jpg", r"'\.\./secret\.jpg' is not named relative"),
    "around": ("inside/../../secret.jpg", "is not named relative"),
    "link": ("link.jpg", r"link\.jpg is reached by a link out of the image folder, to .*secret\.jpg.*follow_links: true"),
    "linked folder": ("linked/secret.jpg", "is reached by a link out of the image folder"),
    "nul": ("a\0b.jpg", r"cannot be read \(embedded null byte\)"),
    "surrogate": ("\ud800.jpg", r"cannot be read \(.*surrogates not allowed\)"),
    "long name": ("x" * MIB, r"cannot be read \(File name too long\)"),
    "folder": ("inside", r"inside cannot be read \(Is a directory\)"),
    "pipe": ("pipe", "pipe is not a file"),
    "nothing": ("nothing.jpg", r"nothing\.jpg cannot be read \(No such file or directory\)"),
}
"""Names that lead to no picture of the folder, and why."""

TEXTS = {
    "nul text": ("a\0b", "NUL character at position 1"),
    "long text": ("word " * 200_000, r"1,000,000 characters is longer than the 100,000 allowed"),
}
"""Answers that are refused, and why."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, and links and names that lead out of their folder."""
    images = tmp_path / "images"
    (images / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for outside in (tmp_path / "secret.jpg", tmp_path / "outside" / "secret.jpg", images / "inside" / "own.jpg"):
        outside.write_bytes(TRAINED["plain"]())
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "linked").symlink_to(tmp_path / "outside")
    (images / "own link.jpg").symlink_to("inside/own.jpg")
    (images / "own linked").symlink_to(images / "inside")
    os.mkfifo(images / "pipe")
    return images


def record(name: str, image: str, answer: str = "a cross") -> dict[str, Any]:
    return {
        "id": name, "image": image,
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}],
    }  # fmt: skip


def status(pid: int, field: str) -> int:
    """A line of /proc/PID/status, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1))


@pytest.mark.parametrize("fast", [False, True])
def test_all_of_it_through_one_worker(fast: bool, folder: Path, write: Callable, tmp_path: Path) -> None:
    for name, make in {**{name: make for name, (make, _) in REFUSED.items()}, **TRAINED}.items():
        (folder / f"{name}.bin").write_bytes(make())
    records = [record(name, f"{name}.bin") for name in [*REFUSED, *TRAINED]]
    records += [record(name, image) for name, (image, _) in NAMES.items()]
    records += [record(name, "inside/own.jpg", answer) for name, (answer, _) in TEXTS.items()]
    records += [record("own link", "own link.jpg"), record("own linked", "own linked/own.jpg")]
    data = opened(
        {"hostile": LlavaConversations(write("hostile.jsonl", records), str(folder))}, tmp_path / "run",
        num_workers=1, global_batch_size=len(records), max_bad_fraction=0.99, fast_images=fast, max_length=500,
    )  # fmt: skip
    data.trainer.max_steps = 3
    batches = iter(data.train_dataloader())
    (worker,) = batches._workers
    shared = status(os.getpid(), "VmRSS")
    reasons = {name: reason for group in (REFUSED, NAMES, TEXTS) for name, (_, reason) in group.items()}
    for number in range(3):
        batch = data.on_before_batch_transfer(next(batches), 0)
        assert worker.is_alive() and worker.pid == batches._workers[0].pid
        pixels = dict(zip([name for name in batch.sample_ids if not name.startswith("null of")], batch.pixels, strict=True))
        assert set(pixels) == {*TRAINED, "own link", "own linked"}, number
        assert len(batch.sample_ids) == len(records)
        for name, picture in pixels.items():
            red, green, blue = picture[:, 3, 8].tolist()
            assert red > 200 and green < 60 and blue < 60, name
        assert pixels["turned"][2, 12, 8] > 200  # blue below
        if number == 1:
            assert status(worker.pid, "VmHWM") - shared < BOUND
    end_workers(batches)
    entries = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(entries) == len(reasons)
    for name, reason in reasons.items():
        (found,) = [entry["reason"] for entry in entries if f"id {name}:" in entry["reason"]]
        assert re.search(reason, found), found
        assert re.search(rf"hostile\.jsonl line {1 + [r['id'] for r in records].index(name)}\b", found), found
        assert len(found) < 1000


def test_links_out_of_the_folder_when_they_are_wanted(folder: Path, tmp_path: Path) -> None:
    wanted = Folder(str(folder), "a.json", follow_links=True)
    assert wanted.read("link.jpg") == wanted.read("linked/secret.jpg") == (tmp_path / "secret.jpg").read_bytes()
    for name in ("/etc/passwd", "../secret.jpg"):
        with pytest.raises(BadSample, match="is not named relative"):
            wanted.read(name)


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(folder)
    pictures = Folder(str(tmp_path / "shortcut"), "a.json", follow_links=False)
    assert pictures.read("inside/own.jpg") == pictures.read("own link.jpg") == (folder / "inside" / "own.jpg").read_bytes()
    with pytest.raises(BadSample, match="by a link out of the image folder"):
        pictures.read("link.jpg")
    with pytest.raises(RecipeError, match=r"image folder .*none of a\.json does not exist"):
        Folder(str(tmp_path / "none"), "a.json", follow_links=False)


def test_a_neighbor_with_the_same_beginning_is_outside(folder: Path, tmp_path: Path) -> None:
    neighbor = tmp_path / "images and more"
    neighbor.mkdir()
    (neighbor / "a.jpg").write_bytes(b"")
    (folder / "neighbor").symlink_to(neighbor)
    with pytest.raises(BadSample, match="by a link out"):
        Folder(str(folder), "a.json", follow_links=False).read("neighbor/a.jpg")


def test_a_network_that_stumbles_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    """A handle gone stale twice costs two pauses; one that stays stale ends the run, and is nobody's bad sample."""
    (tmp_path / "a.jpg").write_bytes(b"picture")
    folder = Folder(str(tmp_path), "a.json", follow_links=False)
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    failures = iter([errno.ESTALE, errno.EIO])
    real_open = os.open

    def stumbling(path, *arguments, **options):
        if str(path).endswith("a.jpg") and (number := next(failures, None)):
            raise OSError(number, os.strerror(number))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr("os.open", stumbling)
    assert folder.read("a.jpg") == b"picture"
    assert len(pauses) == 2 and 0.25 <= pauses[0] <= 0.75
    failures = iter([errno.ESTALE] * 20)
    with pytest.raises(RecipeError, match=r"a\.jpg could not be read in 6 attempts \(Stale file handle\)") as caught:
        folder.read("a.jpg")
    assert not isinstance(caught.value, BadSample)
