"""Conversation templates: our own, those of tokenizers, and either as a Jinja chat template for an exported model."""

from components.chat_template.of_tokenizer import OF_TOKENIZER, resolve_template
from components.chat_template.template import IMAGE_PLACEHOLDER, TEMPLATES, Template
from components.chat_template.to_jinja import to_jinja
from components.chat_template.token_ids import Tokenizer

__all__ = ["IMAGE_PLACEHOLDER", "OF_TOKENIZER", "TEMPLATES", "Template", "Tokenizer", "resolve_template", "to_jinja"]
