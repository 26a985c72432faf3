"""The decoder's interface: what the assembler, the sharding and the benchmarks may ask of any language model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from jaxtyping import Float, Int, Int64
from lightning import LightningModule
from torch import Tensor, nn

from components.decoder.lora import LoRA
from components.tokenizer import WordTokenizer


class Decoder(LightningModule, ABC):
    """Embeddings of packed documents in, final hidden states out; a language model in three steps: embed, forward, head.

    `__init__` stores arguments and widths only: no weights, no files, no network. `build` creates the layers, perhaps on the meta
    device; `adapt` puts adapters beside them; `load_weights` reads them.
    """

    embed_dim: int
    vocab_size: int
    tokenizer: str | WordTokenizer
    lora: LoRA | None = None

    @abstractmethod
    def build(self) -> None:
        """Creates the layers with random weights. The caller may be inside `torch.device("meta")`."""

    @property
    def has_weights(self) -> bool:
        """Whether `load_weights` fills every layer, which then need no values before."""
        return False

    @abstractmethod
    def load_weights(self) -> None:
        """Reads the stated weights into the built layers, which are in memory, perhaps sharded; does nothing without."""

    def adapt(self) -> None:
        """Inserts the adapters that `lora` states, with random weights, which changes names in the state dict but no result.

        Called once, after `build` and before any weights are read; does nothing without `lora`.
        """

    def reset_buffers(self) -> None:
        """Computes what no state dict holds, after layers that were built on the meta device were given memory."""

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What a learning rate applies to: the adapters where `lora` is stated, else everything."""
        return self.parameters()

    @abstractmethod
    def embed(self, input_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embed_dim"]:
        """Token ids in, their embeddings out."""

    @abstractmethod
    def forward(
        self,
        inputs_embeds: Float[Tensor, "tokens embed_dim"],
        position_ids: Int64[Tensor, " tokens"],
        cumulative_lengths: Int[Tensor, " documents_and_one"],
        max_length: int,
    ) -> Float[Tensor, "tokens embed_dim"]:
        """Packed embeddings in, hidden states after the last norm out; no document sees another.

        Args:
            inputs_embeds: Embeddings of all documents, end to end.
            position_ids: Position inside the document; restarts at 0 in every document.
            cumulative_lengths: 0 and the end of every document, in tokens.
            max_length: Length of the longest document, in tokens.
        """

    @abstractmethod
    def head(self, hidden: Float[Tensor, "positions embed_dim"]) -> Float[Tensor, "positions vocab"]:
        """Hidden states in, logits over the vocabulary out."""

    @abstractmethod
    def generate(
        self,
        inputs_embeds: Float[Tensor, "prompts length embed_dim"],
        attention_mask: Int64[Tensor, "prompts length"],
        max_new_tokens: int,
        eos_token_id: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        beginnings: list[tuple[int, int]] | None = None,
    ) -> Int64[Tensor, "prompts new"]:
        """Left-padded prompts in, the ids of their answers out, filled up with the end token.

        Args:
            inputs_embeds: Embeddings of the prompts, padded on the left.
            attention_mask: 1 at prompt tokens, 0 at padding.
            max_new_tokens: Longest answer, in tokens; at least 1.
            eos_token_id: Ends an answer, and fills the row after it.
            temperature: 0 takes the most likely token; above 0 samples from the logits divided by it.
            top_p: Samples among the most likely tokens that together have this probability, in (0, 1]. Needs a temperature.
            beginnings: For each prompt the row of the first that begins like it, perhaps its own, and how many tokens they share,
                fewer than the prompt has. They are computed once; no answer depends on it.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer layers: the unit of sharding, activation checkpointing and regional compilation."""
