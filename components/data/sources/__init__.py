"""Sources of samples: LLaVA conversations, questions with answers, and ShapesWorld."""

from components.data.sources.base import Overrides, Sample, Source
from components.data.sources.llava import LlavaConversations
from components.data.sources.question_answers import QuestionAnswers
from components.data.sources.shapes_world import ShapesWorld

__all__ = ["LlavaConversations", "Overrides", "QuestionAnswers", "Sample", "ShapesWorld", "Source"]
