"""Tokenizers: from the hub or a folder, or file-free for small models."""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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

    Args:
        source: Hub name or folder of a Hugging Face tokenizer, or a `WordTokenizer`.

    Raises:
        RecipeError: The name or folder holds no tokenizer.
    """
    if isinstance(source, WordTokenizer):
        return source.build()
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"No tokenizer could be loaded from '{source}' (key model.decoder.init_args.tokenizer). "
            f"Give a hub name that this machine can reach, or a folder with tokenizer files.\n{str(error).splitlines()[0]}"
        ) from error
