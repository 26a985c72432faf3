"""What a layout does to a model on one process: units, recomputation, frozen parameters; and the layouts that are refused."""

from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from tiny import ALL, DECODER_FROZEN, LLAMA, TOWER_FROZEN, built_model, fill, gradients, tiny_batch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.decoder import HuggingFaceDecoder, LoRA
from components.errors import RecipeError
from components.sharding import Layout
from components.sharding.layout import demand_fit
from components.sharding.recomputation import recompute
from components.sharding.units import keep_frozen_whole, units
from components.tokenizer import WordTokenizer

TOWER_BLOCKS = ["vision_tower.visual.transformer.resblocks.0", "vision_tower.visual.transformer.resblocks.1"]
DECODER_BLOCKS = ["decoder.lm.model.layers.0", "decoder.lm.model.layers.1"]


def blocks_of(model):
    return [block for part in model.parts.values() for block in part.blocks()]


def adapted(dropout=0.0):
    lora = LoRA(rank=2, alpha=2.0, dropout=dropout)
    model = built_model(TOWER_FROZEN, decoder=HuggingFaceDecoder(LLAMA, WordTokenizer(), lora=lora))
    fill(model)
    return model


@pytest.mark.parametrize("rates", [ALL, TOWER_FROZEN, DECODER_FROZEN])
def test_every_parameter_is_in_one_unit_with_others_that_train_as_it_does(rates):
    model = built_model(rates)
    found = units(model, blocks_of(model))
    assert [unit.name for unit in found] == [*TOWER_BLOCKS, *DECODER_BLOCKS, "vision_tower", "projector", "model"]
    assert not any(unit.is_mixed for unit in found)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [[names[parameter] for parameter in unit.parameters] for unit in found]
    assert sorted(name for each in held for name in each) == sorted(names.values())
    assert held[-1] == [f"decoder.lm.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head")]


def test_gradients_flow_through_what_trains_and_all_after_it():
    for rates, first in ((ALL, "vision_tower"), (DECODER_FROZEN, "projector"), (TOWER_FROZEN, "projector")):
        model = built_model(rates)
        still = {unit.name for unit in units(model, blocks_of(model)) if not unit.gradients_flow}
        assert still == (set() if first == "vision_tower" else {*TOWER_BLOCKS, "vision_tower"})


def test_adapters_are_in_the_unit_of_what_they_adapt():
    model = adapted()
    mixed = [unit.name for unit in units(model, blocks_of(model)) if unit.is_mixed]
    assert mixed == DECODER_BLOCKS
    frozen = {p for p in model.parameters() if not p.requires_grad}
    alone = units(model, blocks_of(model), frozen)
    assert [unit.name for unit in alone] == [*DECODER_BLOCKS, "projector", "model"]
    assert alone[-1].parameters == ()
    assert not any(unit.is_mixed for unit in alone)


def test_a_unit_that_trains_in_part_is_named():
    model = built_model(ALL)
    model.decoder.blocks()[1].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"decoder\.lm\.model\.layers\.1 has parameters that train and others"):
        units(model, blocks_of(model))


def test_frozen_parameters_change_their_number_format_and_nothing_else():
    model = built_model(DECODER_FROZEN)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    frozen = keep_frozen_whole(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert (parameter in frozen) == (not name.startswith("projector"))
        assert torch.equal(parameter, before[name].to(torch.bfloat16 if parameter in frozen else torch.float32))
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers
    with pytest.raises(RecipeError, match="replicate_frozen has no effect"):
        keep_frozen_whole(built_model(ALL), torch.bfloat16)


class Log(TorchDispatchMode):
    """The operators that run, and what they make that is still in memory afterwards."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        output = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.made += [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
        return output

    def kept(self, others):
        """Bytes of the storages that are alive but belong to none of the `others`."""
        known = {tensor.untyped_storage()._cdata for tensor in others}
        alive = {ref.cdata: size for ref, size in self.made if not ref.expired()}
        return sum(size for storage, size in alive.items() if storage not in known)


TOKENS, WIDTH, MLP_DIM, HEADS = 96, 64, 160, 4


def passes(what):
    """Gradients of one LLaMA block in bfloat16, the operators of both passes, and the bytes that it keeps between them."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP_DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    decoder = HuggingFaceDecoder({**LLAMA, **sizes}, WordTokenizer())
    torch.manual_seed(0)
    decoder.build()
    decoder.to(torch.bfloat16)
    block = decoder.blocks()[0]
    names = list(decoder.state_dict())
    if what != "none":
        recompute(block, what)
    assert list(decoder.state_dict()) == names
    inputs = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    rotary = decoder.lm.model.rotary_emb(inputs, torch.arange(TOKENS)[None])
    lengths = torch.tensor([0, TOKENS])
    forward, backward = Log(), Log()
    with forward:
        output = block(inputs, position_embeddings=rotary, cu_seq_lens_q=lengths, max_length_q=TOKENS)
    kept = forward.kept([*block.parameters(), *rotary, lengths, output])
    with backward:
        output.float().square().sum().backward()
    return [inputs.grad, *(p.grad for p in block.parameters())], forward.calls, backward.calls, kept


def test_selective_recomputation_runs_no_matrix_product_and_no_attention_twice():
    expected, _, plain, all_kept = passes("none")
    theirs, _, whole, little_kept = passes("full")
    ours, forward, backward, kept = passes("selective")
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, ours, theirs, strict=True))
    assert forward["mm"] == 7 and forward[attention] == 1
    assert backward["mm"] == plain["mm"] == 14 and backward[attention] == 0
    assert whole["mm"] == 14 + 6 and whole[attention] == 1  # the last product is needed by what comes after the block alone
    # 14 D counts the input of the block, and attention keeps a number in float32 for every token and head
    assert kept == TOKENS * (12 * WIDTH + 4 * MLP_DIM + 4 * HEADS)
    assert all_kept > kept + TOKENS * 4 * MLP_DIM
    assert little_kept == 0


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputation_changes_no_gradient_of_the_model(what):
    expected = adapted(dropout=0.5)
    model = adapted(dropout=0.5)
    for block in blocks_of(model):
        recompute(block, what)
    for each in (expected, model):
        torch.manual_seed(5)  # dropout draws the same numbers, in the recomputation too
        each.loss_sum(tiny_batch()).backward()
    ours, theirs = gradients(model), gradients(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum("lora" in name for name in ours) == 2 * 2 * 7


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputation_of_a_trained_tower(what):
    expected, model = built_model(ALL), built_model(ALL)
    for block in blocks_of(model):
        recompute(block, what)
    for each in (expected, model):
        each.loss_sum(tiny_batch()).backward()
    ours, theirs = gradients(model), gradients(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def trainer(**changes):
    facts = {"world_size": 8, "num_nodes": 1, "num_devices": 8, "precision": "32-true", "accumulate_grad_batches": 4}
    return SimpleNamespace(**{**facts, "strategy": SimpleNamespace(_timeout=timedelta(minutes=1)), **changes})


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ({"replicas": 0}, {}, "replicas 0 and shards 4 must be at least 1"),
        ({"shards": 8}, {}, "2 replicas x 8 shards = 16 ranks, but the trainer has 1 nodes x 8 devices"),
        ({}, {"precision": "bf16-mixed"}, "trainer.precision is bf16-mixed"),
        ({}, {"strategy": SimpleNamespace(_timeout=timedelta(minutes=-1))}, "timeout_minutes must be above 0"),
        ({"replicas": 8, "shards": 1, "defer_reduce_scatter": True}, {}, "no effect, since shards is 1"),
        ({"defer_reduce_scatter": True}, {"accumulate_grad_batches": 1}, "no effect, since trainer.accumulate_grad_batches is 1"),
        ({"compile_blocks": True, "activation_checkpointing": "selective"}, {}, "compile_blocks has its own choice"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, changes, message):
    demand_fit(Layout(2, 4), trainer())
    with pytest.raises(RecipeError, match=message):
        demand_fit(Layout(**{"replicas": 2, "shards": 4, **layout}), trainer(**changes))


def test_a_layout_in_one_line():
    assert Layout(16, 8).describe() == "16 replicas x 8 shards, activation checkpointing none"
    everything = Layout(1, 8, "bfloat16", "float32", False, True, "full", True, True)
    assert everything.describe() == (
        "1 replicas x 8 shards, activation checkpointing full, gathered parameters kept until backward, "
        "gradients reduced with the last micro-batch, blocks compiled, frozen parameters whole in bfloat16"
    )
