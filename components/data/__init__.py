"""The data: sources, the order of their samples, and packed micro-batches."""

from components.data.module import InstructionData
from components.data.preparation import Preparation
from components.data.sources import (
    HuggingFaceDataset,
    LlavaConversations,
    Overrides,
    QuestionAnswers,
    Sample,
    ShapesWorld,
    Source,
    TarShards,
)

__all__ = [
    "HuggingFaceDataset",
    "InstructionData",
    "LlavaConversations",
    "Overrides",
    "Preparation",
    "QuestionAnswers",
    "Sample",
    "ShapesWorld",
    "Source",
    "TarShards",
]
