"""Proof, on a tiny copy of an architecture, that packed documents are computed as if each were alone.

The reference is transformers' own eager attention and its own whole forward pass on one document at a time, so that every
architecture is compared with code that knows nothing of packing. A second or less, on the CPU, once per architecture and process.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from components.decoder.architecture import NOT_ARCHITECTURE
from components.decoder.attention import PACKED, attention, packed_hidden_states
from components.errors import RecipeError

SUPPORTED = "llama, mistral, qwen2, qwen3, phi3, phi, gemma, olmo2 or granite"

_LENGTHS = [7, 1, 5]
_WINDOW = 3  # shorter than the documents, so that a window which is not honored shows
_TOLERANCE = 1e-4  # of values around 1, computed in float64 with the float32 steps that the architectures contain

# widths of the copy; head_dim stays, since the settings of the rotary embedding belong to it
_TINY = {
    "vocab_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": _WINDOW,
    "attention_chunk_size": _WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def prove(config: PreTrainedConfig) -> None:
    """Compares packed documents with each document alone, for the architecture of `config`.

    Raises:
        RecipeError: They differ, or the architecture does not let its attention be replaced.
    """
    try:
        failure = _failure(json.dumps(tiny(config), sort_keys=True))
    except AttributeError as error:
        failure = f"it does not describe layers of attention ({error})."
    if failure is not None:
        raise RecipeError(f"Architecture {config.model_type} with this config is not supported: {failure} Use one of {SUPPORTED}.")


def tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys of a small model with every trait of `config`: kinds of layers, grouped heads, rotary embedding, window."""
    keys = {key: value for key, value in config.to_dict().items() if key not in NOT_ARCHITECTURE}
    depth, heads = config.num_hidden_layers, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads

    per_layer = {key: value for key, value in keys.items() if isinstance(value, list) and len(value) == depth}
    kinds = {json.dumps([value[layer] for value in per_layer.values()]): layer for layer in reversed(range(depth))}
    layers = sorted(kinds.values())
    layers = layers * 2 if len(layers) == 1 else layers

    sizes = {
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": {heads: 4, 1: 1}.get(key_heads, 2),
        "hidden_size": 4 * head_dim,
        **{key: [value[layer] for layer in layers] for key, value in per_layer.items()},
        **_TINY,
    }
    for key, value in sizes.items():
        name = config.attribute_map.get(key, key)
        if keys.get(name) is not None:
            keys[name] = value
    return keys


@functools.cache
def _failure(keys: str) -> str | None:
    """Why the architecture cannot be used, or None. The argument is JSON, so that the answer can be remembered."""
    # the caller may be building on the meta device, and its random numbers are its own
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            config = AutoConfig.for_model(**json.loads(keys))
            # experts one after another: the grouped kernel knows no float64
            lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, experts_implementation="eager")
            return _compare(lm.double())
        except RecipeError as error:
            return str(error)
        except Exception as error:  # whatever an architecture raises, it is the reason
            return f"it does not run with packed attention ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})."


def _compare(lm: PreTrainedModel) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():
        # large enough weights that every position of the attention counts
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + noise / 10)
    documents = [torch.randint(3, lm.config.vocab_size, (length,), generator=generator) for length in _LENGTHS]

    lm.train()  # attention dropout only shows here
    _packed(lm, documents)
    lm.eval()
    hidden = _packed(lm, documents)
    with attention(lm, "eager"):
        alone = torch.cat([lm.base_model(document[None], use_cache=False).last_hidden_state[0] for document in documents])
        logits = torch.cat([lm(document[None], use_cache=False).logits[0] for document in documents])
    if not (difference := _distance(hidden, alone)) < _TOLERANCE:
        return f"the hidden states of packed documents differ from those of each document alone by {difference:.2g}."
    if not (difference := _distance(lm.get_output_embeddings()(hidden), logits)) < _TOLERANCE:
        return f"its logits are not the plain output of its last layer but scaled or capped (they differ by {difference:.2g})."

    others = [(documents[0] - 3 + 1) % (lm.config.vocab_size - 3) + 3, *documents[1:]]
    if not (leak := _distance(_packed(lm, others)[_LENGTHS[0] :], hidden[_LENGTHS[0] :])) < _TOLERANCE:
        return f"a document sees the one before it: its hidden states change by {leak:.2g} with it."
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _packed(lm: PreTrainedModel, documents: list[Tensor]) -> Tensor:
    embeds = lm.get_input_embeddings()(torch.cat(documents))
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])
    ends = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0).to(torch.int32)
    return packed_hidden_states(lm, embeds, position_ids, ends, max(_LENGTHS))
