"""Tokenizers: from the hub or a folder, or file-free for small models."""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from components.errors import RecipeError


@dataclass(frozen=True)
class WordTokenizer:
    """A tokenizer without files, for small models: whole words it is told, single bytes for everything else.

    It behaves like LLaMA's sentencepiece tokenizer: a word carries its leading space, unknown text falls back to bytes, ids 0, 1
    and 2 are `<unk>`, `<s>` and `</s>`.

    Args:
        words: Words, or phrases, worth one token each, in any order; other text costs one token a byte. May be empty.
    """

    words: list[str] = field(default_factory=list)

    def build(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers knows it."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        specials = ["<unk>", "<s>", "</s>"]
        single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        words = list(
            dict.fromkeys(piece for word in self.words for piece in (f"▁{word}".replace(" ", "▁"), word.replace(" ", "▁")))
        )
        # equal cost for every piece: the segmentation with the fewest pieces wins
        vocabulary = [(piece, -1.0) for piece in [*specials, *single_bytes, "▁", *words]]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
        )


def load_tokenizer(source: str | WordTokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer from its source.

    LLaMA's kind of `tokenizer.model` without a `tokenizer.json` beside it is read here, to the ids that sentencepiece gives:
    transformers 5 orders its merges by id instead of by score, which splits runs of spaces differently, and leaves out the begin
    token. What the folder states holds: special and added tokens, chat template, `add_bos_token` and `legacy`. Where it does not,
    the begin token is added, `legacy` is false (as Llama-2 and vicuna-v1.5 state it, and as transformers 5 takes it to be), and
    the padding is the unknown token, as in LLaVA.

    Args:
        source: Hub name or folder of a Hugging Face tokenizer, or a `WordTokenizer`.

    Raises:
        RecipeError: The name or folder holds no tokenizer.
    """
    if isinstance(source, WordTokenizer):
        return source.build()
    try:
        pieces = None if _find(source, "tokenizer.json") else _llama_pieces(_find(source, "tokenizer.model"))
        return AutoTokenizer.from_pretrained(source) if pieces is None else _llama_tokenizer(source, pieces)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"No tokenizer could be loaded from '{source}' (key model.decoder.init_args.tokenizer). "
            f"Give a hub name that this machine can reach, or a folder with tokenizer files.\n{str(error).splitlines()[0]}"
        ) from error


def _find(source: str, name: str) -> str | None:
    """The path of a file of a folder or hub name; None where it cannot be had."""
    from transformers.utils import cached_file

    try:
        return cached_file(source, name)
    except OSError:
        return None


def _llama_pieces(file: str | None) -> list[Any] | None:
    """The pieces of a sentencepiece model that works like LLaMA's (also Mistral's and Vicuna's); None for any other file."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    if file is None:
        return None
    try:
        model = SentencePieceExtractor(file).proto
    except DecodeError:  # a `tokenizer.model` of tiktoken
        return None
    pairs, text = model.trainer_spec.model_type == model.trainer_spec.BPE, model.normalizer_spec
    untouched = text.name == "identity" and text.add_dummy_prefix and not text.remove_extra_whitespaces
    return list(model.pieces) if pairs and untouched and model.trainer_spec.byte_fallback else None


def _llama_tokenizer(source: str, pieces: list[Any]) -> PreTrainedTokenizerBase:
    from tokenizers import models
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    stated = {"legacy": False, "add_bos_token": True, **get_tokenizer_config(source)}
    settings = {key: stated[key] for key in ("legacy", "add_bos_token")}
    tokenizer: Any = LlamaTokenizer.from_pretrained(source, **settings)
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    merges = generate_merges(ids, {piece.piece: piece.score for piece in pieces})
    tokenizer.backend_tokenizer.model = models.BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True)
    tokenizer.init_kwargs["legacy"] = settings["legacy"]  # else save_pretrained would forget it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer
