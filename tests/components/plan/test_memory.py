"""What lies on a GPU, against the published table and against what autograd saves of a real block."""

from dataclasses import replace

import pytest
import torch
from reference import ALIGN, FULL, machine, schedule, workload
from torch import Tensor, nn

from components import loss
from components.decoder import HuggingFaceDecoder, LoRA
from components.loss import MOST_LOGITS, cross_entropy_sum
from components.plan import Blocks, memory_of
from components.plan.memory import GIB, activations, decoder_bytes, tower_bytes
from components.plan.workload import Adapters
from components.tokenizer import WordTokenizer
from components.vision_tower import OpenClipTower
from components.vlm import LearningRates
from tests.benchmarks.loss import Peak

TOKENS = 64


def saved_bytes(block: nn.Module, run) -> int:
    """Bytes that autograd keeps of a forward pass, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(found.values())


def llama_block(
    key_heads: int,
    trained: bool,
    dtype: torch.dtype,
    compiled: bool = False,
    lora: LoRA | None = None,
    autocast: bool = False,
) -> tuple[float, Blocks]:
    """Bytes a token of a real block, and its shape."""
    width, mlp, heads = 256, 704, 2
    decoder = HuggingFaceDecoder(
        {
            "model_type": "llama",
            "vocab_size": 260,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
        },
        WordTokenizer(),
        lora=lora,
    )
    decoder.build()
    decoder.adapt()
    decoder.to(torch.float32 if autocast else dtype).requires_grad_(trained)
    hidden = torch.randn(1, TOKENS, width, dtype=torch.float32 if autocast else dtype, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    rotary = decoder.lm.base_model.rotary_emb(hidden, position_ids=positions)
    (block,) = decoder.blocks()
    step = torch.compile(block, backend="aot_eager_decomp_partition") if compiled else block

    def run():
        with torch.autocast("cpu", dtype, enabled=autocast):
            return step(
                hidden,
                position_embeddings=rotary,
                cu_seq_lens_q=ends,
                cu_seq_lens_k=ends,
                max_length_q=TOKENS,
                max_length_k=TOKENS,
            )

    found = saved_bytes(decoder, run) - 2 * rotary[0].nbytes  # one pair for all blocks
    if autocast:  # the weights that it has cast
        found -= dtype.itemsize * sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)
    return found / TOKENS, Blocks(1, width, mlp, width, width * key_heads // heads)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_llama_block_saves(key_heads, trained, dtype):
    found, shape = llama_block(key_heads, trained, dtype)
    number = dtype.itemsize
    # on the CPU attention puts the documents together again, for the matrix behind it
    copy = number * shape.query_dim if trained else 0
    # the sums of a softmax and the scales of two norms are a few numbers of a token
    assert found == pytest.approx(decoder_bytes(shape, number, trained, compiled=False) + copy, rel=5e-3)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_a_llama_block_saves_under_autocast(trained):
    found, shape = llama_block(2, trained, torch.bfloat16, autocast=True)
    copy = 2 * shape.query_dim if trained else 0
    assert found == pytest.approx(decoder_bytes(shape, 2, trained, compiled=False, autocast=True) + copy, rel=5e-3)


@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_llama_block_with_adapters_saves(dtype, dropout):
    found, shape = llama_block(2, True, dtype, lora=LoRA(rank=8, alpha=8.0, dropout=dropout))
    number, inputs = dtype.itemsize, 6 * shape.width + shape.mlp_dim
    expected = decoder_bytes(shape, number, True, compiled=False, adapters=Adapters(inputs, 7 * 8, 0, dropout > 0))
    copy = number * shape.query_dim
    if dropout:  # a CPU keeps a number where a GPU keeps a byte
        assert found == pytest.approx(expected + (number - 1) * inputs, rel=5e-3)
    else:  # the norms are not trained
        assert found == pytest.approx(expected + copy - 2 * number * shape.width, rel=5e-3)


@pytest.mark.slow  # several seconds of tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, in 2.11
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_a_compiled_block_saves(trained):
    torch._dynamo.reset()
    found, shape = llama_block(2, trained, torch.bfloat16, compiled=True)
    assert found == pytest.approx(decoder_bytes(shape, 2, trained, compiled=True), rel=5e-3)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_what_a_vision_block_saves(quick_gelu):
    width = 128
    tower = OpenClipTower(
        config={"image_size": 32, "patch_size": 4, "width": width, "layers": 1, "head_width": 64, "quick_gelu": quick_gelu},
        feature_layer=-1,
    )
    tower.build()
    tower.to(torch.bfloat16)
    pictures = torch.randn(2, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
    (block,) = tower.blocks()
    found = saved_bytes(tower, lambda: block(pictures)) / (2 * TOKENS)
    expected = tower_bytes(Blocks(1, width, 4 * width, width, width), 2)
    # the plain GELU keeps no sigmoid
    assert found == pytest.approx(expected if quick_gelu else expected - 2 * 4 * width, rel=0.01)


def per_token(rates: LearningRates = FULL, **options) -> float:
    """Bytes of a token in the decoder's blocks."""
    work = workload(rates=rates)
    projector = 2 * 2 * (1024 + 5120) * 256
    norm = (8 if rates is FULL else 4) * 5120 * work.tokens
    return (activations(work, schedule(1, 16, **options)) - projector - norm) / work.tokens


def test_published_figures_of_a_token():
    # of published figures each block saves a product less, since a compiler makes that of the activation again; and if it is
    # frozen, what two norms make
    again, norms = 40 * 2 * 13824, 40 * 2 * 5120
    assert (per_token(compile_blocks=True) + again) / 2**20 == pytest.approx(7.3, rel=0.01)
    whole_block = 16 * 5120 + 6 * 13824
    full = per_token(compile_blocks=True, activation_checkpointing="full")
    assert (full - whole_block) / 2**20 == pytest.approx(0.39, rel=0.01)
    assert (per_token(ALIGN, compile_blocks=True) + again + norms) / 2**20 == pytest.approx(5.9, rel=0.01)
    # FSDPMemTracker's 9.7 is of a CPU, whose attention copies its result, and of another transformers
    assert per_token() / 2**20 == pytest.approx(9.7 - 40 * 2 * 5120 / 2**20, rel=0.05)


def test_selective_checkpointing_keeps_products():
    kept = 40 * (14 * 5120 + 4 * 13824)
    computed_again = 24 * 5120 + 8 * 13824
    assert per_token(activation_checkpointing="selective") == kept + computed_again


@pytest.mark.parametrize(("shards", "bytes_16"), [(8, 24.3), (64, 3.0), (128, 1.5)])
def test_static_state(shards, bytes_16):
    work = workload()
    memory = memory_of(work, machine(nodes=shards // 8), schedule(1, 1, shards=shards))
    assert memory.parameters + memory.gradients + memory.optimizer == pytest.approx(bytes_16, rel=0.02)
    assert memory.parameters == memory.gradients == memory.optimizer / 2


def test_frozen_parts():
    work = workload(rates=ALIGN)
    sharded = memory_of(work, machine(), schedule(1, 1))
    whole = memory_of(work, machine(), schedule(1, 1, replicate_frozen=True))
    tower = 290_581_504
    assert whole.frozen == pytest.approx(24.2 + 2 * tower / GIB, rel=2e-3)
    assert sharded.frozen == pytest.approx(4 * (13_015_864_320 + tower) / 128 / GIB, rel=1e-4)
    assert whole.gathered < 0.2 < 1.2 < sharded.gathered
    assert sharded.parameters == whole.parameters < 0.001


def test_what_is_in_flight():
    block, root, projector = 317_204_480, 327_685_120, 31_467_520
    plain = memory_of(workload(), machine(), schedule(1, 16))
    assert plain.gathered * GIB == 2 * (2 * block + root)
    assert plain.reduction * GIB == 2 * (block + root) + 4 * block
    kept = memory_of(workload(), machine(), schedule(1, 16, reshard_after_forward=False))
    assert kept.gathered * GIB == 2 * (40 * block + projector + root + block)
    deferred = memory_of(workload(), machine(), schedule(1, 16, defer_reduce_scatter=True))
    assert deferred.gradients - plain.gradients == pytest.approx(48.6, rel=2e-3)
    half = memory_of(workload(), machine(), schedule(1, 16, defer_reduce_scatter=True, reduce_dtype="bfloat16"))
    assert half.gradients - plain.gradients == pytest.approx(24.3, rel=2e-3)
    assert half.reduction * GIB == 2 * (block + root) + 2 * block


def test_logits_on_supervised_positions():
    memory = memory_of(workload(target_tokens=32), machine(), schedule(16, 1))
    assert memory.logits * GIB == 12 * 32000 * 32 * 16
    # published with one gradient of them in the number format of the computation, which comes when another one is gone
    assert memory_of(workload(), machine(), schedule(16, 1)).logits * 10 / 12 == pytest.approx(0.3, rel=0.02)


def test_logits_in_pieces():
    at_once = memory_of(workload(target_tokens=64), machine(), schedule(65, 1)).logits * GIB
    assert at_once == 12 * 32000 * 64 * 65 < 12 * MOST_LOGITS
    in_two = memory_of(workload(target_tokens=64), machine(), schedule(66, 1)).logits * GIB
    assert in_two == 12 * 32000 * 64 * 33 + 2 * 32000 * 5120
    frozen = memory_of(workload(rates=ALIGN, target_tokens=64), machine(), schedule(66, 1)).logits * GIB
    assert frozen == 12 * 32000 * 64 * 33


@pytest.mark.parametrize(
    ("pieces", "expected"), [(1, 12 * 8000 * 512), (4, 12 * 8000 * 128 + 4 * 8000 * 128), (16, 12 * 8000 * 128)]
)
def test_the_logits_of_a_real_loss(pieces, expected, monkeypatch):
    """Probabilities and two gradients of the logits are there at once, or, of many pieces, three gradients of the head."""
    monkeypatch.setattr(loss, "MOST_LOGITS", 8000 * 512 // pieces)
    head, targets = nn.Linear(128, 8000, bias=False), torch.arange(512)
    hidden = torch.randn(512, 128, requires_grad=True)
    with Peak() as peak:
        cross_entropy_sum(head, hidden, targets, 8000).backward()
    assert peak.bytes == pytest.approx(expected, rel=0.04)


def test_a_whole_model_gathers_nothing():
    alone = machine(nodes=1)
    plain = memory_of(workload(), alone, schedule(1, 1, shards=1, param_dtype="float32", whole=True))
    assert plain.gathered == plain.reduction == 0
    autocast = memory_of(workload(), alone, schedule(1, 1, shards=1, whole=True))
    # a frozen tower keeps nothing for backward, and no product reads the table of the embeddings
    assert autocast.gathered * GIB == 2 * (13_015_864_320 - 32000 * 5120 + 31_467_520)
    assert autocast.reduction == 0
    # the table of tied embeddings is the head, which a product reads
    *blocks, root = workload().units
    tables = [parameter for parameter in root.parameters if parameter.shape == (32000, 5120)]
    tied = replace(root, parameters=tuple(parameter for parameter in root.parameters if parameter is not tables[0]))
    of_tied = memory_of(replace(workload(), units=(*blocks, tied)), alone, schedule(1, 1, shards=1, whole=True))
    assert (root.is_root, len(tables), of_tied.gathered) == (True, 2, autocast.gathered)
    buckets = memory_of(workload(), alone, schedule(1, 1, replicas=8, shards=1, whole=True)).reduction * GIB
    assert buckets == 4 * (13_015_864_320 + 31_467_520)


def test_one_shard_is_gathered_unit_by_unit():
    """FSDP2 casts each unit when it is needed, on one rank too."""
    one, many = (memory_of(workload(), machine(), schedule(1, 1, shards=shards)) for shards in (1, 128))
    assert (one.gathered, one.reduction) == (many.gathered, many.reduction)
    assert one.gathered > 0


def test_a_trained_tower_needs_activations():
    frozen, trained = (
        activations(workload(rates=rates), schedule(16, 1))
        for rates in (FULL, LearningRates(vision_tower=1e-5, projector=1e-5, decoder=1e-5))
    )
    assert trained - frozen == 16 * 256 * 23 * 2 * (16 + 4) * 1024


def test_verdict():
    roomy = memory_of(workload(), machine(), schedule(16, 1))
    assert roomy.fits
    assert roomy.total == sum(roomy.components.values()) < roomy.usable == 79.1
    large = workload(336)
    assert not memory_of(large, machine(), schedule(16, 1)).fits
    assert memory_of(large, machine(gpu="h200-141gb"), schedule(16, 1)).fits
    assert memory_of(large, machine(), schedule(16, 1, activation_checkpointing="selective")).fits
    assert memory_of(large, machine(), schedule(8, 2)).fits
