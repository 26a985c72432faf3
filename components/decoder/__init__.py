"""Decoder: embeddings in, text out. Hugging Face causal language models whose attention is replaced by a packed one."""

from components.decoder.base import Decoder
from components.decoder.causal_lm import HuggingFaceDecoder
from components.decoder.lora import LoRA, Merged, without_adapters

__all__ = ["Decoder", "HuggingFaceDecoder", "LoRA", "Merged", "without_adapters"]
