"""Sources of samples: LLaVA conversations, questions with answers, tar shards, Hugging Face datasets, and ShapesWorld."""

from components.data.sources.base import Overrides, Sample, Source
from components.data.sources.dataset_folder import HuggingFaceDataset
from components.data.sources.llava import LlavaConversations
from components.data.sources.question_answers import QuestionAnswers
from components.data.sources.shapes_world import ShapesWorld
from components.data.sources.tar_shards import TarShards

__all__ = [
    "HuggingFaceDataset",
    "LlavaConversations",
    "Overrides",
    "QuestionAnswers",
    "Sample",
    "ShapesWorld",
    "Source",
    "TarShards",
]
