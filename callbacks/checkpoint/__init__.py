"""Checkpoints: written by all ranks, complete or invisible, tried before the first step, and kept."""

from callbacks.checkpoint.callback import Checkpoint

__all__ = ["Checkpoint"]
