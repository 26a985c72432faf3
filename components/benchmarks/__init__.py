"""Benchmarks: questions with known answers, and how answers are scored."""

from components.benchmarks.benchmark import Benchmark, Question, exact_match, normalize, text_only_best
from components.benchmarks.shapes_world import ShapesWorld
from components.benchmarks.short_answer import ShortAnswer

__all__ = ["Benchmark", "Question", "ShapesWorld", "ShortAnswer", "exact_match", "normalize", "text_only_best"]
