"""The data: sources, the order of their samples, and packed micro-batches."""

from components.data.micro_batches import Preparation
from components.data.module import InstructionData
from components.data.sources import LlavaConversations, QuestionAnswers, Sample, ShapesWorld, Source

__all__ = ["InstructionData", "LlavaConversations", "Preparation", "QuestionAnswers", "Sample", "ShapesWorld", "Source"]
