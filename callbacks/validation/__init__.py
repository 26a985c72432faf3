"""Validation: the model answers the questions of benchmarks; answers are scored, shown and kept."""

from callbacks.validation.callback import Validation

__all__ = ["Validation"]
