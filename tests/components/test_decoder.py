"""Decoders: packed documents as if each were alone, transformers' own generation, weights that must fit the recipe."""

import copy
import inspect
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from components.decoder import HuggingFaceDecoder, attention, probe
from components.errors import RecipeError
from components.tokenizer import WordTokenizer

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": {"model_type": "llama", **WIDTHS},
    "llama_one_key_head": {"model_type": "llama", **WIDTHS, "num_key_value_heads": 1},
    "mistral_window": {"model_type": "mistral", **WIDTHS, "sliding_window": 4},
    "qwen2": {"model_type": "qwen2", **WIDTHS},
    "qwen2_some_window": {"model_type": "qwen2", **WIDTHS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **WIDTHS, "head_dim": 16},
    "phi3": {"model_type": "phi3", **WIDTHS, **IDS},
    "phi": {"model_type": "phi", **WIDTHS},
    "gemma": {"model_type": "gemma", **WIDTHS, "head_dim": 16},
    "olmo2": {"model_type": "olmo2", **WIDTHS, **IDS},
    "granite": {"model_type": "granite", **WIDTHS, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
}
LENGTHS = [9, 1, 6, 11]


def built(name: str = "llama", **changes) -> HuggingFaceDecoder:
    torch.manual_seed(0)
    decoder = HuggingFaceDecoder({**CONFIGS[name], **changes}, WordTokenizer())
    decoder.build()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:  # weights that make every attended position count
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return decoder.eval()


def documents(decoder: HuggingFaceDecoder) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, decoder.vocab_size, (length,), generator=generator) for length in LENGTHS]


def packed(decoder: HuggingFaceDecoder, ids: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(one) for one in ids]
    positions = torch.cat([torch.arange(length, device=ids[0].device) for length in lengths])
    ends = torch.tensor([0, *lengths], device=ids[0].device).cumsum(0).to(torch.int32)
    return decoder.head(decoder(decoder.embed(torch.cat(ids)), positions, ends, max(lengths)))


def left_padded(decoder: HuggingFaceDecoder, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.zeros(len(prompts), max(map(len, prompts)), decoder.embed_dim)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        embeds[row, -len(prompt) :] = decoder.embed(prompt).detach()
        mask[row, -len(prompt) :] = 1
    return embeds, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_transformers_on_each_alone(name):
    decoder = built(name)
    ids = documents(decoder)
    # a second model with the same weights and transformers' own attention knows nothing of packing
    other = AutoModelForCausalLM.from_config(copy.deepcopy(decoder.lm.config), attn_implementation="eager").eval()
    other.load_state_dict(decoder.lm.state_dict())
    logits = packed(decoder, ids)
    alone = torch.cat([other(input_ids=one[None]).logits[0] for one in ids])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=2e-5)

    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    (alone * weights).sum().backward()
    theirs = dict(other.named_parameters())
    for parameter_name, parameter in decoder.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[parameter_name].grad, rtol=1e-4, atol=2e-4, msg=parameter_name)


def test_no_gradient_crosses_a_document():
    decoder = built("llama")
    ids = torch.cat(documents(decoder))
    embeds = decoder.embed(ids).detach().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = decoder(embeds, positions, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), max(LENGTHS))
    hidden[9 + 1 + 2].sum().backward()  # third position of the third document
    reached = embeds.grad.abs().sum(-1).nonzero().squeeze(-1).tolist()
    assert reached == [10, 11, 12]


def reference_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window=(-1, 0)):
    """Flash attention as its documentation words it: query i sees the keys from i - left to i + right."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert end - start <= max_q == max_k
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= -window[1]) & ((distance <= window[0]) | (window[0] < 0))
        scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end]))
    return torch.cat(outputs)


def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return reference_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def varlen_attn_2_15(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return reference_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)


@pytest.mark.parametrize("varlen_attn", [varlen_attn_2_11, varlen_attn_2_15])
@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_the_kernel_gets_the_arguments_of_its_version(monkeypatch, varlen_attn, sliding_window, scaling):
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_VARLEN_ARGUMENTS", inspect.signature(varlen_attn).parameters)
    query, key, value = torch.randn(1, 4, 27, 8), torch.randn(1, 2, 27, 8), torch.randn(1, 2, 27, 8)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    if sliding_window and varlen_attn is varlen_attn_2_11:
        with pytest.raises(RecipeError, match="sliding_window 4 needs a newer PyTorch"):
            attention._kernel(query, key, value, ends, 11, scaling, sliding_window)
        return
    ours = attention._kernel(query, key, value, ends, 11, scaling, sliding_window)
    torch.testing.assert_close(ours, attention._per_document(query, key, value, ends, scaling, sliding_window))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; its arguments and the path of a CPU are compared above")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel_equals_one_document_at_a_time(name):
    decoder = built(name).to("cuda", torch.bfloat16)
    ids = [one.cuda() for one in documents(decoder)]
    alone = torch.cat([packed(decoder, [one]) for one in ids])
    torch.testing.assert_close(packed(decoder, ids), alone, rtol=5e-2, atol=5e-2)


def test_autocast_computes_in_its_own_precision():
    decoder = built("qwen3")
    ids = documents(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed(decoder, ids)
        answers = decoder.generate(*left_padded(decoder, ids), max_new_tokens=3, eos_token_id=2)
    assert logits.dtype == torch.bfloat16 and answers.shape[0] == len(ids)
    torch.testing.assert_close(logits.float(), packed(decoder, ids), rtol=0.1, atol=0.1)


def test_attention_without_document_ends_raises():
    decoder = built()
    with pytest.raises(RuntimeError, match="got no document ends"):
        decoder.lm(input_ids=torch.arange(5)[None])
    with pytest.raises(RecipeError, match="asks for attention_mask"):
        mask = torch.zeros(1, 1, 5, 5)
        ends = {"cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 5}
        decoder.lm(input_ids=torch.arange(5)[None], attention_mask=mask, **ends)


def test_a_config_changed_by_another_model_raises():
    decoder = built()
    LlavaConfig(text_config=decoder.lm.config)  # transformers writes into the config it is given
    with pytest.raises(RuntimeError, match="copy.deepcopy"):
        packed(decoder, documents(decoder))


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3", "phi3"])
def test_generate_equals_one_prompt_at_a_time_and_a_loop_over_the_whole_prompt(name):
    decoder = built(name)
    prompts = documents(decoder)
    steps, eos = 6, 2
    together = decoder.generate(*left_padded(decoder, prompts), max_new_tokens=steps, eos_token_id=eos)
    assert together.shape == (len(prompts), steps)
    for row, prompt in enumerate(prompts):
        alone = decoder.generate(*left_padded(decoder, [prompt]), max_new_tokens=steps, eos_token_id=eos)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        ids = prompt
        for _ in range(len(alone)):
            ids = torch.cat([ids, packed(decoder, [ids])[-1:].argmax(-1)])
        assert alone.tolist() == ids[len(prompt) :].tolist()


def test_generate_ends_at_the_end_token_and_fills_up_with_it():
    decoder = built()
    prompts = documents(decoder)
    free = decoder.generate(*left_padded(decoder, prompts), max_new_tokens=6, eos_token_id=2)
    eos = int(free[0, 1])  # the first row now ends with its second token
    ended = decoder.generate(*left_padded(decoder, prompts), max_new_tokens=6, eos_token_id=eos)
    for before, after in zip(free.tolist(), ended.tolist(), strict=True):
        stop = before.index(eos) + 1 if eos in before else len(before)
        assert after == (before[:stop] + [eos] * 6)[: ended.shape[1]]
    assert ended[0, 1:].tolist() == [eos] * (ended.shape[1] - 1)


def test_sampling_depends_on_the_seed_and_top_p_keeps_the_likely():
    decoder = built()
    inputs = left_padded(decoder, documents(decoder))
    greedy = decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2)
    torch.manual_seed(0)
    first = decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2, temperature=1.0)
    second = decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2, temperature=1.0)
    torch.manual_seed(0)
    again = decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2, temperature=1.0)
    assert first.tolist() == again.tolist() != second.tolist()
    narrow = decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2, temperature=1.0, top_p=1e-6)
    assert narrow.tolist() == greedy.tolist()
    with pytest.raises(RecipeError, match="top_p 0.9 has no effect"):
        decoder.generate(*inputs, max_new_tokens=8, eos_token_id=2, top_p=0.9)


def test_training_attention_is_back_after_generation_and_after_an_error(monkeypatch):
    decoder = built()
    ids = documents(decoder)
    before, config = packed(decoder, ids), decoder.lm.config.to_dict()
    decoder.generate(*left_padded(decoder, ids), max_new_tokens=2, eos_token_id=2)
    assert torch.equal(packed(decoder, ids), before)

    def broken(*args, **kwargs) -> BaseModelOutputWithPast:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.lm.base_model, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(*left_padded(decoder, ids), max_new_tokens=2, eos_token_id=2)
    assert torch.equal(packed(decoder, ids), before)
    assert decoder.lm.config.to_dict() == config


def test_13b_on_the_meta_device():
    start = time.perf_counter()
    llama_2_13b = {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    }
    with torch.device("meta"):
        decoder = HuggingFaceDecoder(llama_2_13b, tokenizer="not/read")
        decoder.build()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 13_015_864_320
    assert {parameter.device.type for parameter in decoder.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert (decoder.embed_dim, decoder.vocab_size, len(decoder.blocks())) == (5120, 32000, 40)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3"])
def test_memory_given_to_a_meta_model(name):
    real = built(name)
    with torch.device("meta"):
        decoder = HuggingFaceDecoder(CONFIGS[name], WordTokenizer())
        decoder.build()
    decoder.to_empty(device="cpu")
    for buffer in decoder.buffers():
        buffer.fill_(float("nan"))
    decoder.load_state_dict(real.state_dict())
    decoder.eval().reset_buffers()
    ids = documents(real)
    assert torch.equal(packed(decoder, ids), packed(real, ids))


def test_construction_leaves_the_random_numbers_alone_and_is_quick():
    state = torch.get_rng_state()
    HuggingFaceDecoder({**CONFIGS["llama"], "rms_norm_eps": 1e-4}, WordTokenizer())  # not proven before
    assert torch.equal(torch.get_rng_state(), state)
    start = time.perf_counter()
    for depth in range(1, 11):
        HuggingFaceDecoder({**CONFIGS["llama"], "num_hidden_layers": depth}, WordTokenizer())
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2"}, "gemma2 .* softcap"),
        ({"model_type": "gpt_oss"}, "gpt_oss .* s_aux"),
        ({"model_type": "mamba"}, "mamba .* no attribute .num_attention_heads"),
        ({"model_type": "bloom"}, "bloom .* differ"),
        ({"model_type": "mpt"}, "mpt .* does not run"),
        ({"model_type": "falcon"}, "falcon .* does not run"),
        ({"model_type": "stablelm"}, "stablelm .* no document ends"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "lfm2 .* differ"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "granite .* scaled or capped"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "llama .* dropout 0.1"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_unsupported_architectures_are_refused_by_name(config, message):
    with torch.device("meta"), pytest.raises(RecipeError, match=message) as caught:
        HuggingFaceDecoder(config, WordTokenizer())
    assert "Use one of llama, mistral" in str(caught.value)


def test_the_probe_sees_documents_that_are_not_kept_apart(monkeypatch):
    def one_document(query, key, value, cumulative_lengths, scaling, sliding_window):
        whole = torch.tensor([0, query.shape[2]])
        return per_document(query, key, value, whole, scaling, sliding_window)

    per_document = attention._per_document
    probe._failure.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_per_document", one_document)
        with pytest.raises(RecipeError, match="llama .* differ"):
            HuggingFaceDecoder(CONFIGS["llama"], WordTokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_per_document", lambda *inputs: per_document(*inputs[:5], None))  # no window
        with pytest.raises(RecipeError, match="mistral .* differ"):
            HuggingFaceDecoder(CONFIGS["mistral_window"], WordTokenizer())
    probe._failure.cache_clear()
