"""Hugging Face causal language models as decoders: packed attention in training, transformers' own in generation."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from components.decoder.architecture import architecture, compare, unreadable
from components.decoder.attention import PACKED, attention, packed_hidden_states
from components.decoder.base import Decoder
from components.decoder.beginnings import CACHE, fill_beginnings, reserved_cache, rotates_by_length
from components.decoder.lora import LoRA, adapters, insert
from components.decoder.probe import prove
from components.decoder.released import KEY, load_released
from components.errors import RecipeError
from components.hub import fetch
from components.named_tensors import weights_in
from components.tokenizer import WordTokenizer


class HuggingFaceDecoder(Decoder):
    """Embeddings of packed documents in, final hidden states out, by a causal language model of transformers.

    Args:
        config: The architecture, with the keys of the model's `config.json`: `model_type` (llama, mistral, qwen2, qwen3, phi3 or
            another that passes the check at construction), `hidden_size`, `num_hidden_layers`, ...
        tokenizer: Hub name or folder of a Hugging Face tokenizer, or a file-free `WordTokenizer`.
        weights: Hub name or folder of the weights; null starts from random ones.
        lora: Adapters that are trained in place of the decoder's own weights, which stay as they are; null trains those.

    Raises:
        RecipeError: The architecture is misspelled, impossible, or cannot keep packed documents apart.
    """

    def __init__(
        self, config: dict[str, Any], tokenizer: str | WordTokenizer, weights: str | None = None, lora: LoRA | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.weights = weights
        self.lora = lora
        checked = architecture(config)
        prove(checked)
        self.embed_dim: int = checked.hidden_size
        self.vocab_size: int = checked.vocab_size
        self.lm: Any  # a PreTrainedModel, whose class is known only to transformers

    def build(self) -> None:
        """Creates the layers with random weights in float32. The caller may be inside `torch.device("meta")`."""
        # a config of its own: whoever else holds it could change the attention of the live model
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture(self.config), attn_implementation=PACKED, dtype=torch.float32
        )
        lm.config.use_cache = False
        lm.generation_config = GenerationConfig()  # the architecture's own may state sampling that nobody asked for
        self.lm = lm.train(self.training)

    @property
    def has_weights(self) -> bool:
        """Whether `weights` are stated."""
        return self.weights is not None

    def load_weights(self) -> None:
        """Reads the stated weights into the built layers, which must be in memory; they may be sharded and adapted already.

        Raises:
            RecipeError: The weights cannot be read, their config differs from the recipe's, or a tensor is missing, left over or
                of another shape.
        """
        if self.weights is None:
            return
        compare(self.config, self.weights)
        try:
            stored = weights_in(fetch(self.weights, KEY))
        except RecipeError as error:
            raise unreadable(self.weights, error) from error
        if stored is None:
            raise unreadable(self.weights, ValueError("It holds no model.safetensors and no pytorch_model.bin."))
        load_released(self.lm, stored, self.weights)

    def adapt(self) -> None:
        """Inserts the adapters that `lora` states; does nothing without.

        Raises:
            RecipeError: It names a layer that the decoder does not have.
        """
        if self.lora is not None:
            insert(self.lm, self.lora)
            self.lm.train(self.training)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What a learning rate applies to: the adapters where `lora` is stated, else everything."""
        return self.parameters() if self.lora is None else adapters(self.lm)

    def requires_grad_(self, requires_grad: bool = True) -> Any:  # Self, which beartype does not take outside its own classes
        """Freezes the decoder, or lets train what is trainable of it."""
        super().requires_grad_(False)
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(requires_grad)
        return self

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Computes what no state dict holds, such as the frequencies of the rotary embedding."""
        for module in self.lm.modules():
            if module._non_persistent_buffers_set:
                parameters: list[Any] = list(module.parameters(recurse=False))
                for parameter in parameters:
                    parameter._is_hf_initialized = True  # transformers leaves such parameters as they are
                self.lm._init_weights(module)
                for parameter in parameters:
                    del parameter._is_hf_initialized

    def embed(self, input_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embed_dim"]:
        """Token ids in, their embeddings out."""
        return self.lm.get_input_embeddings()(input_ids)

    def forward(
        self,
        inputs_embeds: Float[Tensor, "tokens embed_dim"],
        position_ids: Int64[Tensor, " tokens"],
        cumulative_lengths: Int[Tensor, " documents_and_one"],
        max_length: int,
    ) -> Float[Tensor, "tokens embed_dim"]:
        """Packed embeddings in, hidden states after the last norm out; no document sees another."""
        return packed_hidden_states(self.lm, inputs_embeds, position_ids, cumulative_lengths, max_length)

    def head(self, hidden: Float[Tensor, "positions embed_dim"]) -> Float[Tensor, "positions vocab"]:
        """Hidden states in, logits over the vocabulary out."""
        return self.lm.get_output_embeddings()(hidden)

    @torch.no_grad()
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

        Raises:
            RecipeError: `top_p` without a temperature: it would have no effect.
        """
        if temperature == 0 and top_p != 1:
            raise RecipeError(f"top_p {top_p} has no effect at temperature 0. State a temperature above 0, or remove top_p.")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=eos_token_id, use_cache=True, **sampling
        )
        # every step gathers the shards: a rank whose answers have ended goes on until those of the others have
        together = self._shards_of_other_ranks()
        cache = reserved_cache(self.lm, inputs_embeds.shape[1] + max_new_tokens)
        beginnings = beginnings or [(row, 0) for row in range(len(inputs_embeds))]
        shared = len({first for first, _ in beginnings}) < len(beginnings)
        if together:
            shared = _of_any_rank(shared, inputs_embeds.device)
        if shared and not rotates_by_length(self.lm):
            fill_beginnings(self.lm, inputs_embeds, attention_mask, beginnings, cache)
        prompts: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, CACHE: cache}
        with attention(self.lm, "sdpa"):
            return self.lm.generate(**prompts, generation_config=settings, synced_gpus=together)

    def _shards_of_other_ranks(self) -> bool:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return False
        sharded = any(isinstance(parameter, DTensor) for parameter in self.lm.parameters())
        return sharded or any(isinstance(module, FullyShardedDataParallel) for module in self.lm.modules())

    def blocks(self) -> list[nn.Module]:
        """The transformer layers."""
        depth = self.lm.config.num_hidden_layers
        return next(
            list(child) for child in self.lm.base_model.children() if isinstance(child, nn.ModuleList) and len(child) == depth
        )


def _of_any_rank(fact: bool, device: torch.device) -> bool:
    facts = torch.tensor(int(fact), device=device)
    distributed.all_reduce(facts, distributed.ReduceOp.MAX)
    return bool(facts)
