"""What trains and how fast: a part without a learning rate is frozen."""

from dataclasses import dataclass


@dataclass
class LearningRates:
    """Peak learning rate of each part; null freezes the part.

    Args:
        vision_tower: Peak learning rate of the vision tower, > 0, or null.
        projector: Peak learning rate of the projector, > 0, or null.
        decoder: Peak learning rate of the decoder, or of its adapters where it has `lora`, > 0, or null.
    """

    vision_tower: float | None = None
    projector: float | None = None
    decoder: float | None = None
