"""Small tokenizers of every kind, LLaMA-2's from the golden data, and chat templates as models have them."""

import copy
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from components.tokenizer import WordTokenizer, load_tokenizer

KINDS = ("word", "byte-level", "llama", "llama legacy")

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEXT = "user assistant what color is the red bus? It is red.\n\nIt is a red bus, and the color of the user is what?\n\n" * 3


@cache
def word_tokenizer() -> PreTrainedTokenizerBase:
    return WordTokenizer(["Q:", "A:", "red", "bus", "what", "color", "USER:", "ASSISTANT:"]).build()


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """Like GPT-2's and Qwen's: no begin token, no space put before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|end|>", *alphabet, "Ġr", "Ġre", "Ġred"]
    merges = [("Ġ", "r"), ("Ġr", "e"), ("Ġre", "d")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def llama_tokenizer(model: Path, legacy: bool) -> PreTrainedTokenizerBase:
    """LLaMA-2's tokenizer, from a folder as the hub has it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, folder)
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
        return load_tokenizer(folder)


def tokenizer_of(kind: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if kind == "word":
        return word_tokenizer()
    if kind == "byte-level":
        return byte_level_tokenizer()
    golden = request.getfixturevalue("golden")
    return llama_tokenizer(golden / "llava" / "tokenizer.model", legacy=kind == "llama legacy")


@cache
def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that knows `<image>` as a special token, as an exported model's does."""
    extended: Any = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return extended


# --- tokenizers with a chat template

_CHATML = """\
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are {helpful}.<|im_end|>\\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
# the history is without thoughts, the last answer has an empty one
_THINKING = """\
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' and loop.index0 > last.user -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
_HEADERS = """\
{%- for message in messages -%}
{%- if loop.first -%}{{- bos_token -}}{%- endif -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
_INST = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}"""
CHAT_TEMPLATES = {"chatml": _CHATML, "thinking": _THINKING, "headers": _HEADERS, "inst": _INST}


@cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer in the manner of Qwen 2.5 and 3 (chatml, thinking), LLaMA-3 (headers) or Mistral (inst)."""
    specials = {
        "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "thinking": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        "headers": ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "inst": ["<s>", "</s>", "[INST]", "[/INST]"],
    }[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    begin = {"headers": {"bos_token": "<|begin|>"}, "inst": {"bos_token": "<s>"}}.get(name, {})
    # the end of a text is another token than the end of an answer, as in the base models
    end = {"headers": "<|end_of_text|>", "inst": "</s>"}.get(name, "<|endoftext|>")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, **begin)
    made.chat_template = CHAT_TEMPLATES[name]
    return made


@cache
def with_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """A copy with a chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT_TEMPLATES[name]
    return changed
