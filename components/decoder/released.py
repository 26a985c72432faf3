"""Released language models: tensors in files in, those of transformers' live model out, renamed and put together as it does.

Source: `convert_and_load_state_dict_in_model` of transformers, which reads whole models. Differs: a tensor is read when it is asked
for, and of a sharded model only the rows of this rank.
"""

import copy
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from components.decoder.lora import without_adapters
from components.errors import RecipeError
from components.named_tensors import NamedTensors, TensorInfo, differences, fill, listed

KEY = "model.decoder.init_args.weights"

_COMPUTED = r"rotary_emb\.inv_freq|(^|\.)position_ids$"
"""Buffers that old releases hold and that live models compute."""


def load_released(lm: PreTrainedModel, stored: NamedTensors, weights: str) -> None:
    """Copy a released model into a live one.

    Args:
        lm: The live model, in memory, perhaps sharded. Its adapters stay as they are.
        stored: The tensors of its files.
        weights: What the recipe calls them.

    Raises:
        RecipeError: A tensor is missing, left over or of another shape, or two that should be one differ.
    """
    state = without_adapters(lm.state_dict())
    given = Released(stored, lm, state)
    for second, first in _twins(lm).items():  # such as a head that is the embedding table: one of them is enough
        there = [name for name in (first, second) if name in given.infos]
        if len(there) == 2 and not torch.equal(given.read(first), given.read(second)):
            raise RecipeError(f"{KEY}: {first} and {second} differ in '{weights}', though its config makes them one tensor.")
        for needless in {first, second} - set(there[:1] or [first]):
            state.pop(needless)
            given.infos.pop(needless, None)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if problems := differences(expected, {name: info.shape for name, info in given.infos.items()}):
        raise RecipeError(f"{KEY}: the tensors of '{weights}' do not fit the architecture of the recipe:\n  {listed(problems)}")
    fill(state, given)


class Released(NamedTensors):
    """The tensors of a released model under the names of the live one.

    Args:
        source: The tensors of its files.
        lm: The live model, which may be on the meta device.
        state: Its state dict, without adapters.
    """

    def __init__(self, source: NamedTensors, lm: PreTrainedModel, state: dict[str, Tensor]) -> None:
        self.where, self._source, self._lm = source.where, source, lm
        self.infos = {}
        self._old: dict[str, str] = {}
        self._made: dict[str, tuple[str, WeightConverter]] = {}
        self._parts: dict[str, list[tuple[str, str]]] = {}
        transforms = get_model_conversion_mapping(lm)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = {pattern: each for each in transforms if isinstance(each, WeightConverter) for pattern in each.source_patterns}
        prefix, needless = lm.base_model_prefix, "|".join([_COMPUTED, *(lm._keys_to_ignore_on_load_unexpected or ())])
        for old in sorted(source.infos, key=dot_natural_key):  # the order in which parts are put together
            new, pattern = rename_source_key(old, renamings, [*dict.fromkeys(converters.values())], prefix, state)
            if new not in state and re.search(needless, new):
                continue
            if pattern is None:
                self._old[new], self.infos[new] = old, source.infos[old]
                continue
            converter = converters[pattern]
            self._parts.setdefault(new, []).append((old, pattern))
            for target in converter.target_patterns:  # one may become several
                name = new.replace(converter.target_patterns[0], target)
                self._made[name] = (new, converter)
                if name in state:
                    self.infos[name] = TensorInfo(tuple(state[name].shape), source.infos[old].dtype)

    def read(self, name: str) -> Tensor:
        """The tensor, put together if need be."""
        if name in self._old:
            return self._source.read(self._old[name])
        first, converter = self._made[name]
        converter = copy.deepcopy(converter)
        for old, pattern in self._parts[first]:
            converter.add_tensor(first, old, pattern, partial(self._source.read, old))  # type: ignore[arg-type]
        try:
            made: Any = converter.convert(first, model=self._lm, config=self._lm.config)[name]
        except RuntimeError as error:  # shapes that do not go together
            raise self._incomplete(name, str(error)) from error
        tensor: Tensor = made[0] if isinstance(made, list) else made
        if tuple(tensor.shape) != self.infos[name].shape:
            raise self._incomplete(name, f"its shape becomes {tuple(tensor.shape)}, not {self.infos[name].shape}")
        return tensor

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor; those of one that is put together are read with all others."""
        return self._source.read_rows(self._old[name], rows) if name in self._old else self.read(name)[rows]

    def _incomplete(self, name: str, reason: str) -> RecipeError:
        parts = ", ".join(old for old, _ in self._parts[self._made[name][0]])
        return RecipeError(f"{KEY}: {self.where}: {name} cannot be put together of {parts}: {reason}. Is the download complete?")


def _twins(lm: PreTrainedModel) -> dict[str, str]:
    """Second names of parameters that have two, and their first ones."""
    first = {id(parameter): name for name, parameter in lm.named_parameters()}
    every = lm.named_parameters(remove_duplicate=False)
    found = {name: first[id(parameter)] for name, parameter in every}
    return {name: one for name, one in found.items() if name != one}
