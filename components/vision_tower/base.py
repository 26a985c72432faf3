"""The vision tower's interface: what the assembler, the sharding and the exports may ask of any image encoder."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, UInt8
from lightning import LightningModule
from torch import Tensor, nn

from components.errors import RecipeError
from components.named_tensors import NamedTensors, Pairing


class VisionTower(LightningModule, ABC):
    """Pictures in, patch features out. The attributes below are known after `__init__`; layers exist after `build`."""

    image_size: int
    """Side of the square pictures, in pixels."""
    num_patches: int
    """Patch features per picture."""
    feature_dim: int
    """Width of a patch feature."""
    mean: tuple[float, float, float]
    """Mean colour that the normalisation subtracts, per channel in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation that the normalisation divides by, per channel."""
    num_layers: int
    """Blocks of the whole architecture, with those that no feature passes through."""
    has_class_token: bool
    """Whether the encoder has a token besides its patches, which is not a feature."""

    @abstractmethod
    def build(self) -> None:
        """Creates the layers with random weights; the caller may be inside `torch.device("meta")`."""

    @property
    def has_weights(self) -> bool:
        """Whether `load_weights` fills every layer, which then need no values before."""
        return False

    @abstractmethod
    def load_weights(self) -> None:
        """Reads the pretrained weights into the built layers, which are in memory, perhaps sharded; does nothing without."""

    @abstractmethod
    def forward(self, pixels: UInt8[Tensor, "images 3 size size"]) -> Float[Tensor, "images patches feature_dim"]:
        """Patch features, in reading order, of pictures that are normalised here, on the device."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks: the unit of sharding, activation checkpointing and compilation."""

    # --- the Hugging Face layout; a tower without a place in it leaves these as they are

    def huggingface_names(self) -> list[Pairing]:
        """Our tensors, named as in this part's state dict, and those of transformers' vision model without any prefix.

        Raises:
            RecipeError: transformers has no such model.
        """
        raise self._no_place()

    def huggingface_config(self, layers: int) -> dict[str, Any]:
        """The `vision_config` of a transformers model with `layers` of this tower's blocks.

        Raises:
            RecipeError: transformers has no such model.
        """
        raise self._no_place()

    def unused_weights(self) -> NamedTensors | None:
        """Tensors of the pretrained encoder that no feature passes through, under transformers' names; None for random weights.

        Raises:
            RecipeError: transformers has no such model, or the pretrained weights cannot be read.
        """
        raise self._no_place()

    def _no_place(self) -> RecipeError:
        return RecipeError(f"The vision tower {type(self).__name__} cannot be written in the Hugging Face LLaVA layout.")
