"""LoRA: low-rank adapters beside the linear layers of a decoder that itself stays as it is, and the way back to plain weights.

Source: arXiv 2106.09685, by way of Hugging Face PEFT, whose layers and tensor names these are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.errors import RecipeError
from components.named_tensors import NamedTensors, TensorInfo

KEY = "model.decoder.init_args.lora"

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class LoRA:
    """Adapters of low rank: alpha / rank * B @ A is added to the weights of the adapted layers, and A and B alone are trained.

    Args:
        rank: Rows of A and columns of B, >= 1.
        alpha: Scale of the adapters, > 0; divided by the rank.
        dropout: Share of a layer's inputs that its adapter misses in training, in [0, 1).
        target_modules: The layers that are adapted: the ends of their names, such as `[q_proj, v_proj]`, or `all-linear` for
            every linear layer but the head.

    Raises:
        RecipeError: A value out of range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1 or not self.target_modules:
            raise RecipeError(
                f"{KEY}: rank {self.rank} must be at least 1, alpha {self.alpha} above 0, dropout {self.dropout} in [0, 1), and "
                f"target_modules {self.target_modules} all-linear or at least one name of a layer."
            )


def insert(lm: PreTrainedModel, lora: LoRA) -> None:
    """Puts adapters beside the layers of `lm` that `lora` names; what the model computes stays the same until they are trained.

    Raises:
        RecipeError: A name is that of no linear layer.
    """
    # takes seconds to import, which most commands need not wait for
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # divided by the rank, whole or not
        lora_dropout=lora.dropout,
        target_modules=_targets(lm, lora.target_modules),
    )
    inject_adapter_in_model(config, lm)
    for layer in lm.modules():
        if isinstance(layer, LoraLayer):  # in memory and with values, though the layer itself may be on the meta device
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.to_empty(device=torch.get_default_device())
            layer.reset_lora_parameters("default", init_lora_weights=True)


def adapters(lm: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that `insert` added."""
    return (parameter for name, parameter in lm.named_parameters() if ".lora_" in name)


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict in, that of the same model without adapters out, with the same tensors."""
    return {name.replace(_BASE, "."): tensor for name, tensor in state.items() if not name.endswith((_DOWN, _UP))}


class Merged(NamedTensors):
    """The weights of a model with adapters under its plain names, the adapters added to the layers they belong to.

    Args:
        source: The weights of the model, adapters included, as in a checkpoint.
        lora: The adapters' setting.

    Raises:
        RecipeError: There are no adapters in `source`, some are not complete, or they have another rank.
    """

    def __init__(self, source: NamedTensors, lora: LoRA) -> None:
        self.where = source.where
        self._source = source
        self._scale = lora.alpha / lora.rank
        self._base_of = {name.replace(_BASE, "."): name for name in source.infos if not name.endswith((_DOWN, _UP))}
        self.infos: dict[str, TensorInfo] = {name: source.infos[base] for name, base in self._base_of.items()}
        self._adapted: dict[str, str] = {}
        for adapter in (name.removesuffix(_DOWN) for name in source.infos if name.endswith(_DOWN)):
            names = (adapter + _BASE + "weight", adapter + _DOWN, adapter + _UP)
            base, down, up = (source.infos[name].shape if name in source.infos else None for name in names)
            if base is None or up != (base[0], lora.rank) or down != (lora.rank, base[1]):
                raise RecipeError(
                    f"{self.where}: the adapter of {adapter} has weights of the shapes {down} and {up} beside {base}, which is not "
                    f"an adapter of rank {lora.rank} (key {KEY}.rank of its recipe)."
                )
            self._adapted[adapter + ".weight"] = adapter
        if not self._adapted:
            raise RecipeError(f"{self.where} holds no adapters, though its recipe states {KEY}.")

    def read(self, name: str) -> Tensor:
        """The tensor, in the number format of the base weights; added up in float32."""
        return self._merged(name, self._source.read(self._base_of[name]), slice(None))

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the tensor, with the same bits as in the whole one."""
        return self._merged(name, self._source.read_rows(self._base_of[name], rows), rows)

    def _merged(self, name: str, base: Tensor, rows: slice) -> Tensor:
        if name not in self._adapted:
            return base
        adapter = self._adapted[name]
        down, up = (self._source.read(adapter + end).float() for end in (_DOWN, _UP))
        # the product of some rows alone may be rounded otherwise
        return torch.add(base.float(), (up @ down)[rows], alpha=self._scale).to(base.dtype)


def _targets(lm: PreTrainedModel, wanted: list[str] | str) -> list[str]:
    """Full names of the layers to adapt."""
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if isinstance(wanted, str):
        return linear
    chosen = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in wanted}
    if strangers := [end for end, names in chosen.items() if not names]:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise RecipeError(
            f"{KEY}.target_modules: no linear layer of the decoder but the head is called {' or '.join(strangers)}. "
            f"There are {ends}; all-linear means all of them."
        )
    return [name for name in linear if any(name in names for names in chosen.values())]
