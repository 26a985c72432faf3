"""Benchmarks: questions with known answers, and how answers are scored."""

from components.benchmarks.benchmark import Benchmark, Question, text_only_best
from components.benchmarks.gqa import GQA
from components.benchmarks.mme import MME
from components.benchmarks.pope import POPE
from components.benchmarks.question_file import QuestionFile
from components.benchmarks.shapes_world import ShapesWorld
from components.benchmarks.short_answer import ShortAnswer
from components.benchmarks.vizwiz import VizWiz

__all__ = ["GQA", "MME", "POPE", "Benchmark", "Question", "QuestionFile", "ShapesWorld", "ShortAnswer", "VizWiz", "text_only_best"]
