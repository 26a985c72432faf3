"""Export: a checkpoint in, a Hugging Face LLaVA folder with a certificate of its equality out."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from components.chat_template import resolve_template, to_jinja
from components.checkpoint_files import demand_fit, merged_weights
from components.errors import RecipeError
from components.huggingface.certificate import CERTIFICATE, certify
from components.huggingface.folder_files import extend, write_config, write_generation, write_processor
from components.huggingface.layout import DECODER, TOWER, pairings
from components.huggingface.memory import peak_mib
from components.named_tensors import NamedTensors, TensorInfo
from components.projector import MLP
from components.rebuild import read_checkpoint_recipe, rebuild
from components.run_folder import UNFINISHED
from components.safetensors_writer import write_safetensors
from components.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLES = {f"{DECODER}model.embed_tokens.weight", f"{DECODER}lm_head.weight"}
"""Tensors with a row for each token."""


def export(checkpoint: Path, final: Path, dtype: str | None, pictures: list[Path]) -> None:
    """Write a trained model as a Hugging Face LLaVA folder and prove that transformers computes the same with it.

    Args:
        checkpoint: A checkpoint folder.
        final: The new folder; visible only when it is whole and proven.
        dtype: Number format of the weights; None for that of an imported model, else the one that the run computed in.
        pictures: Picture files for the proof; none for pictures drawn by the program.

    Raises:
        RecipeError: The model has no place in the layout, or the written folder does not compute the same.
    """
    unfinished = final.with_name(final.name + UNFINISHED)
    recipe = read_checkpoint_recipe(checkpoint)
    model, preparation = rebuild(recipe)
    _demand_llava_shape(model)
    model.demand_vocabulary()
    with torch.device("meta"):
        model.build()
    weights = merged_weights(checkpoint)
    demand_fit(model.state_dict(), weights, checkpoint, "--ckpt")
    written_as = DTYPES[dtype] if dtype else default_dtype(recipe, weights)
    tokenizer = load_tokenizer(model.decoder.tokenizer)
    template = resolve_template(preparation.template, tokenizer)
    end_token_id = preparation.end_token_id(tokenizer)
    vocabulary = extend(tokenizer, model.decoder.vocab_size)

    unfinished.mkdir(parents=True)
    try:
        before = peak_mib()
        tensors = Tensors(model, weights, vocabulary.rows)
        infos = {name: TensorInfo(shape, written_as) for name, shape in tensors.shapes.items()}
        bar = tqdm(total=len(infos), desc="weights", unit="tensor", leave=False)

        def read(name: str) -> Iterator[Tensor]:
            bar.update()
            return tensors.read(name)

        files = write_safetensors(unfinished, infos, read)
        bar.close()
        write_config(unfinished, model, vocabulary, tensors.layers, written_as, preparation)
        write_processor(unfinished, model, vocabulary, preparation, to_jinja(template, tokenizer))
        write_generation(unfinished, vocabulary, end_token_id)
        facts = {
            "tower_layers": f"{tensors.layers} of {model.vision_tower.num_layers}{tensors.note}",
            "export_memory_mib_above_imports": round(peak_mib() - before),
            "sha256": files,
        }
        certify(checkpoint, unfinished, written_as, pictures, facts)
    except BaseException:
        if not (unfinished / CERTIFICATE).is_file():  # else the folder shows what is unlike
            shutil.rmtree(unfinished)
        raise
    unfinished.rename(final)
    print(f"{final} equals {checkpoint}: see {final / 'certificate.json'}.")


def default_dtype(recipe: dict[str, Any], weights: NamedTensors) -> torch.dtype:
    """The number format of an imported model's weights, else the one that the run computed in."""
    stored = {info.dtype for info in weights.infos.values()}
    if len(stored) == 1 and stored != {torch.float32}:
        return stored.pop()
    trainer = recipe.get("trainer") or {}
    strategy = trainer.get("strategy")
    sharded = strategy.get("init_args", {}).get("param_dtype") if isinstance(strategy, dict) else None
    said = str(sharded or trainer.get("precision"))
    if said.startswith(("bf16", "bfloat16")):
        return torch.bfloat16
    return torch.float16 if said.startswith(("16", "float16")) else torch.float32


class Tensors:
    """The tensors of an export: their canonical names and shapes, and one after another their numbers.

    Args:
        model: The model, built on the meta device.
        weights: The weights of its checkpoint.
        rows: Rows of the token tables in the export.
    """

    def __init__(self, model: Any, weights: NamedTensors, rows: int) -> None:
        self._weights = weights
        self._rows = rows
        self._ours = {name: pair for pair in pairings(model) for name in pair.theirs}
        self._unused: NamedTensors | None = None
        self.note = ""
        tower = model.vision_tower
        try:
            self._unused = tower.unused_weights()
        except RecipeError as error:
            self.note = f" (the others, which no feature passes through, could not be read: {str(error).splitlines()[0]})"
        self.layers = tower.num_layers if self._unused else tower.feature_layer % tower.num_layers + 1
        self.shapes: dict[str, tuple[int, ...]] = {}
        state = model.state_dict()
        for name, pair in self._ours.items():
            shape = tuple(state[pair.ours].shape)[1 if pair.leading_one else 0 :]
            shape = (shape[0] // len(pair.theirs), *shape[1:]) if len(pair.theirs) > 1 else shape
            self.shapes[name] = (rows, *shape[1:]) if name in TABLES else shape
        if self._unused:
            self.shapes |= {TOWER + name: info.shape for name, info in self._unused.infos.items()}
        else:  # transformers wants the final norm, which nothing passes through
            self.shapes |= {f"{TOWER}post_layernorm.{kind}": (tower.feature_dim,) for kind in ("weight", "bias")}

    def read(self, name: str) -> Iterator[Tensor]:
        """The pieces of a tensor, which lie end to end."""
        if name in self._ours:
            pair = self._ours[name]
            tensor = pair.split(self._weights.read(pair.ours))[name]
            yield tensor
            if name in TABLES and (new := self._rows - tensor.shape[0]):
                # the mean of all rows is never the most likely token
                mean = sum(part.double().sum(0) for part in tensor.split(4096)) / tensor.shape[0]
                yield mean.expand(new, -1)
        elif self._unused:
            yield self._unused.read(name.removeprefix(TOWER))
        else:
            yield torch.full(self.shapes[name], 1.0 if name.endswith("weight") else 0.0)


def _demand_llava_shape(model: Any) -> None:
    projector = model.projector
    if not (type(projector) is MLP and projector.depth == 2):
        depth = f" of depth {projector.depth}" if hasattr(projector, "depth") else ""
        raise RecipeError(
            f"The projector of this run is {type(projector).__name__}{depth}, and Hugging Face's LLaVA has an MLP of depth 2. "
            "Train with recipes/projector/mlp_2.yaml to export."
        )
