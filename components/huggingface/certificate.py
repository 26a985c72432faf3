"""The proof that an export is the model: the same pictures, ids, features, logits and answers, or there is no export."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from components.errors import RecipeError
from components.huggingface import proof
from components.huggingface.proof import JOB, OURS, THEIRS, Case
from components.images import decode
from components.named_tensors import SafetensorsFiles
from components.rebuild import read_checkpoint_recipe
from components.run_folder import RECIPE
from components.shapes_world import Setting, draw_scene

CERTIFICATE = "certificate.json"
TOLERANCES = {"pixels": 1e-5, "features": 1e-5, "logits": 1e-4}
"""Largest difference, in parts of the largest value of a tensor (of pixels: in normalised values)."""

PACKAGES = ("torch", "transformers", "tokenizers", "open_clip_torch", "safetensors", "pillow")
SHAPES = {"landscape": (96, 61), "portrait": (47, 80), "odd sizes": (75, 33)}
TEXT = "How many colors does a rainbow have?"


def certify(checkpoint: Path, export: Path, dtype: torch.dtype, images: list[Path], facts: dict[str, Any]) -> None:
    """Compare a checkpoint with its export and write `certificate.json` into the export.

    Args:
        checkpoint: The checkpoint.
        export: The folder that was written.
        dtype: Number format of its weights.
        images: Pictures to ask about; none: scenes of ShapesWorld.
        facts: What else the certificate says.

    Raises:
        RecipeError: They differ; the message lists where, the certificate says how much.
    """
    recipe = read_checkpoint_recipe(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = _cases(folder, images, recipe["data"]["decoding"])
        job = {
            "checkpoint": str(checkpoint),
            "export": str(export),
            "dtype": str(dtype).removeprefix("torch."),
            "cases": [asdict(case) for case in cases],
        }
        (folder / JOB).write_text(json.dumps(job))
        ours, theirs = (_run(half, folder) for half in (OURS, THEIRS))
        checks = _compare(folder, cases, ours, theirs)
    failed = [check for check in checks if not check["equal"]]
    certificate = {
        "equal": not failed,
        "checks": checks,
        "answers": {case.name: answer["text"] for case, answer in zip(cases, theirs["answers"], strict=True)},
        "tokens_change_by_rounding": None
        if ours["without_rounding"] is None
        else ours["without_rounding"] != [answer["new"] for answer in ours["answers"]],
        "largest_difference_with_torchvision_resizing_in_gray_levels": theirs["torchvision_levels"],
        **{key: recipe["data"][key] for key in ("template", "decoding", "image_mode")},
        "dtype": job["dtype"],
        "checkpoint": checkpoint.name,
        "recipe_sha256": hashlib.sha256((checkpoint / RECIPE).read_bytes()).hexdigest(),
        "peak_memory_mib": {half: result["peak_mib"] for half, result in ((OURS, ours), (THEIRS, theirs))},
        "packages": {package: version(package) for package in PACKAGES},
        **facts,
    }
    (export / CERTIFICATE).write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n")
    width = max(len(check["what"]) for check in checks)
    for check in checks:
        print(f"{'equal ' if check['equal'] else 'UNLIKE'} {check['what']:<{width}}  {_shown(check['found'])}")
    if failed:
        lines = "\n  ".join(f"{check['what']}: {check['found']}, allowed {check['allowed']}" for check in failed)
        raise RecipeError(
            f"The export is not the model, so it keeps the name {export} (see its {CERTIFICATE}):\n  {lines}\n"
            "Delete the folder, and please report what the certificate says."
        )


def _cases(folder: Path, images: list[Path], decoding: Any) -> list[Case]:
    """Questions about each picture, about two of them, and about none."""
    pictures: dict[str, Image.Image] = {}
    questions = []
    if images:
        for path in images:
            try:
                pictures[str(path)] = decode(path.read_bytes(), decoding)
            except RecipeError as error:
                raise RecipeError(f"--image: {path}: {error}") from error
            questions.append("What is in this picture?")
    else:
        for number, (name, size) in enumerate(SHAPES.items()):
            random = np.random.default_rng(number)
            scene = draw_scene(Setting(), random, held_out_pairs=False)
            pictures[f"ShapesWorld, {name}"] = Image.open(BytesIO(scene.picture())).convert("RGB").resize(size)
            questions.append(scene.conversation(random)[0].text)
    files = []
    for number, picture in enumerate(pictures.values()):
        files.append(str(folder / f"{number}.png"))  # decoded: a processor knows nothing of transparency and orientation
        picture.save(files[-1])
    cases = [Case(*case) for case in zip(pictures, questions, [[file] for file in files], strict=True)]
    return [*cases, Case("two pictures", "What is the difference?", [files[0], files[-1]]), Case("text alone", TEXT, [])]


def _shown(found: Any) -> str:
    return f"{found:.1e}" if isinstance(found, float) else "" if found is True or found == {} else str(found)[:200]


def _run(half: str, folder: Path) -> dict[str, Any]:
    """Run one half in a process of its own; its answers."""
    places = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-m", proof.__name__, half, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RecipeError(f"The certificate could not be made; its half '{half}' ended with: {said[-1]}")
    return json.loads((folder / f"{half}.json").read_text())


def _compare(folder: Path, cases: list[Case], ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """What was found and what is allowed, for everything that is compared."""
    checks: list[dict[str, Any]] = []

    def demand(what: str, found: Any, allowed: Any) -> None:
        equal = found <= allowed if isinstance(allowed, float) else found == allowed
        checks.append({"what": what, "found": found, "allowed": allowed, "equal": bool(equal)})

    demand("tensors that transformers misses or does not know", theirs["loading"], {})
    tensors = {half: SafetensorsFiles([folder / f"{half}.safetensors"]) for half in (OURS, THEIRS)}
    for kind, tolerance in TOLERANCES.items():
        names = [name for name in tensors[OURS].infos if name.startswith(kind)]
        distances = [_distance(tensors, name, kind != "pixels") for name in names]
        demand(kind, torch.tensor(distances).max().item(), tolerance)  # unlike max(), it keeps what is not a number
    image = theirs["image_token_id"]
    for number, case in enumerate(cases):
        our, their = ours["answers"][number], theirs["answers"][number]
        prompt = [image if one == ours["image_token_id"] else one for one in our["prompt"]]
        demand(f"ids of the prompt, {case.name}", their["prompt"] == prompt, True)
        demand(f"{len(our['new'])} new tokens, {case.name}", their["new"] == our["new"], True)
    alone = [answer["new"] for answer in theirs["answers"][:2]]
    demand("two prompts of unequal length in a batch answer as alone", theirs["two_in_a_batch"] == alone, True)
    for half, result in ((OURS, ours), (THEIRS, theirs)):
        demand(f"change of earlier logits with the last token, {half}", result["causality"], TOLERANCES["logits"])
    return checks


def _distance(tensors: dict[str, SafetensorsFiles], name: str, relative: bool) -> float:
    ours, theirs = tensors[OURS].read(name), tensors[THEIRS].read(name)
    if name.startswith("logits"):
        theirs = theirs[:, : ours.shape[1]]  # rows for pictures and padding are new
    if ours.shape != theirs.shape:
        return float("inf")
    return ((ours - theirs).abs().max() / (ours.abs().max() if relative else 1)).item()
