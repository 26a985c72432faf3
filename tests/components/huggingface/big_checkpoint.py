"""A checkpoint of any size with random weights, as one file or sharded."""

from pathlib import Path
from typing import Any

import torch
import yaml
from small_recipe import RECIPE, merged
from torch.distributed.checkpoint import FileSystemWriter, save

from components.huggingface.initial import allocate
from components.manifest import seal
from components.rebuild import rebuild
from components.run_folder import RECIPE as RECIPE_FILE
from components.run_folder import STATE, checkpoint_folder


def write_checkpoint(run: Path, model_changes: dict[str, Any], sharded: bool) -> int:
    """The bytes of the weights that were written for the small recipe with some keys of its model changed."""
    model_section = merged(RECIPE["model"], model_changes)
    recipe = {"model": model_section, "data": {"template": "brief", "decoding": "upright", "image_mode": "pad", "max_length": 512}}
    model, _ = rebuild(recipe)
    allocate(model, torch.float32)
    model.adapt()
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for tensor in state.values():
        tensor.normal_(std=0.02, generator=generator)
    folder = checkpoint_folder(run, 1)
    folder.mkdir(parents=True)
    if sharded:
        save({"state_dict": state}, storage_writer=FileSystemWriter(folder / STATE), no_dist=True)
    else:
        torch.save({"state_dict": state}, folder / STATE)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    seal(folder, step=1)
    return sum(tensor.nbytes for tensor in state.values())
