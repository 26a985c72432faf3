"""Compiled blocks: one graph for all of a class and for every packing, and the results of the blocks as they are."""

from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from tiny import ALL, LLAMA, TOWER_FROZEN, assert_equal, built_model, gradients, tiny_batch, tiny_document
from torch._dynamo.utils import counters

from components.batch import pack
from components.decoder import HuggingFaceDecoder, attention
from components.decoder.packed_operator import PlainPackedAttention, packed_operator
from components.sharding.recomputation import compile_block
from components.tokenizer import WordTokenizer

DEEP = {**LLAMA, "num_hidden_layers": 4}
PACKINGS = 50
WARM = 5


# the compiler looks whether tensors have gradients, and hides the warning where warnings are no errors
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.torch.jit.script_method. is deprecated",  # by torch 2.11 itself
)


@pytest.fixture(autouse=True)
def afresh():
    """Nothing is compiled yet, and shapes are not checked: of the checks, which only tests have, the compiler can make no graph."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


def model_with(config=LLAMA, rates=TOWER_FROZEN, **overrides):
    return built_model(rates, decoder=HuggingFaceDecoder(config, WordTokenizer()), **overrides)


def compile_blocks(monkeypatch, model, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    trained = [part for name, part in model.parts.items() if getattr(model.learning_rates, name) is not None]
    for block in [block for part in trained for block in part.blocks()]:
        compile_block(block)
    monkeypatch.undo()


def packings():
    """Micro-batches that differ in their tokens, in the number of their documents and in the longest of them."""
    generator = np.random.default_rng(0)
    for number in range(PACKINGS):
        longest = 200 if number % 5 == 4 else 40  # the operator cuts what is longer than 128
        lengths = generator.integers(2, longest, generator.integers(1, 7)).tolist()
        yield pack([tiny_document(words, (0,) if generator.random() < 0.5 else (), seed=number) for words in lengths])


@pytest.mark.parametrize(
    ("rates", "graphs"),
    # a tower that gets one picture alone runs a graph of its own
    [pytest.param(TOWER_FROZEN, 1, id="decoder"), pytest.param(ALL, 3, id="tower and decoder", marks=pytest.mark.slow)],
)
def test_no_packing_is_compiled_for(monkeypatch, rates, graphs):
    model = model_with(DEEP, rates)
    names = list(model.state_dict())
    compile_blocks(monkeypatch, model, "eager")
    seen = set()
    for step, batch in enumerate(packings()):
        seen.add((batch.num_tokens, len(batch.sample_ids), batch.max_length))
        with torch.compiler.set_stance("default" if step < WARM else "fail_on_recompile"):
            model.loss_sum(batch).backward()
    assert all(len(set(values)) > 5 for values in zip(*seen, strict=True))
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == graphs
    assert list(model.state_dict()) == names


CASES = {
    "grouped heads": LLAMA,
    "heads of their own": {**LLAMA, "num_key_value_heads": 4},
    "sliding window": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "scaled": {**LLAMA, "model_type": "granite", "attention_multiplier": 0.2},
}


def assert_compiled_equals_plain(monkeypatch, config, backend, rates=TOWER_FROZEN):
    plain, model = model_with(config, rates), model_with(config, rates)
    compile_blocks(monkeypatch, model, backend)
    batch = tiny_batch()
    losses = [each.loss_sum(batch) for each in (plain, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)
    assert_equal(gradients(model), gradients(plain), 1e-5)
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] > 0
    with torch.no_grad():
        assert torch.equal(model.loss_sum(batch), plain.loss_sum(batch))


def test_compiled_blocks_equal_plain_ones(monkeypatch):
    assert_compiled_equals_plain(monkeypatch, LLAMA, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_blocks_of_the_real_compiler_equal_plain_ones(monkeypatch, config):
    assert_compiled_equals_plain(monkeypatch, config, "inductor", ALL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("lengths", [[4, 1, 4], [2, 131]], ids=str)
def test_the_operator_keeps_its_promises(dtype, sliding_window, lengths):
    """What it says of its results without computing them, and its gradient against differences."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, sum(lengths), 2, dtype=dtype, generator=generator).requires_grad_() for _ in range(3))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    arguments = (query, key, value, ends, 0.3, sliding_window)
    torch.library.opcheck(packed_operator, arguments)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            lambda *tensors: packed_operator(*tensors, *arguments[3:])[0], arguments[:3], fast_mode=True
        )


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_the_operator_equals_what_runs_without_a_compiler(sliding_window):
    generator, lengths = torch.Generator().manual_seed(0), [4, 131, 1, 64]
    tensors = [torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3)]
    ends, results = torch.tensor([0, *lengths]).cumsum(0), []
    for run in (
        lambda *leaves: packed_operator(*leaves, ends, 0.3, sliding_window)[0],
        lambda *leaves: PlainPackedAttention.apply(*leaves, lengths, 0.3, sliding_window),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = run(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_kernel_of_a_gpu_is_one_operator_of_the_graph(monkeypatch):
    """By shapes alone: tensors without memory, which this operator takes anywhere."""
    graphs = []
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    with torch.device("meta"):
        decoder = HuggingFaceDecoder(LLAMA, WordTokenizer())
        decoder.build()
    block = decoder.blocks()[0]
    compiled = torch.compile(block.forward, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for lengths in ([5, 9], [30, 2, 7], [4, 4, 4, 21], [3, 40]):
        inputs = torch.randn(1, sum(lengths), 32, device="meta")
        rotary = (torch.randn(1, sum(lengths), 8, device="meta"),) * 2
        ends = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="meta")
        compiled(inputs, position_embeddings=rotary, cu_seq_lens_q=ends, max_length_q=max(lengths))
    assert counters["graph_break"] == {}
    assert len(graphs) == 1
    assert graphs[0].code.count("torch_attn._varlen_attn") == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; on a CPU the same blocks are compiled once above")
def test_blocks_of_a_gpu_are_compiled_once_and_wait_for_nothing(monkeypatch):
    plain, model = (model_with(DEEP, TOWER_FROZEN).decoder.to("cuda", torch.bfloat16) for _ in range(2))
    for block in model.blocks():
        compile_block(block)
    try:
        for step, batch in enumerate(packings()):
            batch, losses = batch.to("cuda"), []
            embeds = torch.randn(batch.num_tokens, model.embed_dim, dtype=torch.bfloat16, device="cuda")
            torch.cuda.set_sync_debug_mode("default" if step < WARM else "error")
            for each in (plain, model):
                hidden = each(embeds.clone().requires_grad_(), batch.position_ids, batch.cumulative_lengths, batch.max_length)
                losses.append(hidden.float().square().mean())
                losses[-1].backward()
            torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours, theirs = gradients(model), gradients(plain)
    assert all((ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm() for name in theirs if theirs[name].norm() > 0)
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] <= 2
