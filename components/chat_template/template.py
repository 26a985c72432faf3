"""How a conversation becomes text: the templates of LLaVA-1.5 and one for small models.

Source: LLaVA-1.5 (github.com/haotian-liu/LLaVA, commit c121f0432, llava/conversation.py); `brief` is ours.
"""

import re
from dataclasses import dataclass

from components.chat_template.token_ids import Tokenizer
from components.errors import RecipeError

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text.

    Args:
        first: Text up to the first answer; `{question}` is the user's text, `{images}` its placeholders alone.
        later: Text up to each later answer, after the end token; empty when there is room for one question and answer only.
        answer: The supervised text around `{answer}`.
        ends: Whether an end token follows every answer (and is supervised).
        begins_every_round: Whether the begin token stands before every question, not only before the first.
        end: Text of the end token; null takes the tokenizer's `eos_token`.
        jinja: The tokenizer's chat template that this one was made from; `first` then holds the begin token, if any.
        strips: Whether the white space around questions, and around answers, is dropped.
    """

    first: str
    later: str
    answer: str
    ends: bool = True
    begins_every_round: bool = False
    end: str | None = None
    jinja: str | None = None
    strips: tuple[bool, bool] = (False, False)

    def begin_token(self, tokenizer: Tokenizer) -> str:
        """Text of the token that is put before the first round; empty where there is none."""
        return "" if self.jinja else tokenizer.special_tokens_map.get("bos_token", "")

    def end_token(self, tokenizer: Tokenizer) -> str:
        """Text of the token that follows every answer; empty where there is none.

        Raises:
            RecipeError: The tokenizer has no end token.
        """
        if not self.ends:
            return ""
        if self.end is None and "eos_token" not in tokenizer.special_tokens_map:
            raise RecipeError("The template ends answers with the end token, but this tokenizer has no eos_token.")
        return self.end or tokenizer.special_tokens_map["eos_token"]

    @property
    def before_answer(self) -> str:
        """The fixed text between a question and its answer: what the first ids of an answer may depend on."""
        return re.split(r"\{question\}|\{images\}", self.first)[-1].format()


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


def _llama_2(system: str) -> Template:
    return Template(
        first=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{{question}} [/INST]",
        later="[INST] {question} [/INST]",
        answer=" {answer} ",
        begins_every_round=True,
    )


TEMPLATES = {
    "plain": Template(first="{images}", later="", answer="{answer}\n", ends=False),
    "vicuna_v1": Template(
        first=_VICUNA_SYSTEM + " USER: {question} ASSISTANT:", later="USER: {question} ASSISTANT:", answer=" {answer}"
    ),
    "llama_2": _llama_2(_LLAMA_2_SYSTEM),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2_SYSTEM),
    "brief": Template(first="Q: {question} A:", later="Q: {question} A:", answer=" {answer}"),
}
"""Our templates by the names that recipes use. `plain` (picture, caption) pretrains a projector; `brief` suits small models."""
