"""Memory: what lies on one GPU at the peak of a step, by component.

Static parts are exact. Activations are what autograd saves of the layers as they are: transformers' LLaMA block, whose RMSNorm
keeps fp32 copies unless the block is compiled, and open_clip's vision block; other architectures are taken for these. Nearly all
of it is there when backward begins: the gradients of the step before are freed only then. Units in flight and gradients on their
way peak at other moments, and are part of the sum all the same.
"""

from dataclasses import dataclass, fields
from math import prod

from components.loss import pieces_of
from components.plan.communication import BYTES, sent_units
from components.plan.machine import GIB, Machine
from components.plan.schedule import Schedule
from components.plan.workload import Adapters, Blocks, Workload
from components.sharding.layout import Layout

CONTEXT_GIB = 1.5
"""CUDA context, its libraries' workspaces and the buffers of the collectives, in GiB: an estimate."""
FRAGMENTATION = 0.05
"""Share that the allocator cannot use, and by which micro-batches differ in their tokens: an estimate."""


@dataclass(frozen=True)
class Memory:
    """GiB on one GPU at the peak of a step.

    Args:
        parameters: Shards of the trained parameters, fp32.
        gradients: Their gradients, fp32; with those that wait, whole, for the last micro-batch.
        optimizer: Both moments of Adam, fp32.
        frozen: Frozen parameters: fp32 shards, or whole in the number format of the computation.
        gathered: Whole units in flight, in the number format of the computation: two blocks and the root, or all that were kept.
            Where the model is whole, what autocast casts for backward.
        reduction: Gradients of a block on their way: as computed, and as they are sent; and those of the root, until the end.
            Where the model is whole on several ranks, the buckets in which gradients are sent.
        activations: What backward needs of forward.
        logits: Probabilities and two gradients of the logits, fp32, at the supervised positions, or at as many as are held at once.
        allowance: CUDA context, communication buffers and fragmentation: an estimate.
        usable: What the GPU has.
    """

    parameters: float
    gradients: float
    optimizer: float
    frozen: float
    gathered: float
    reduction: float
    activations: float
    logits: float
    allowance: float
    usable: float

    @property
    def components(self) -> dict[str, float]:
        """Every component by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "usable"}

    @property
    def total(self) -> float:
        """Sum of the components."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.total <= self.usable


def memory_of(workload: Workload, machine: Machine, schedule: Schedule) -> Memory:
    """What a schedule needs on each GPU of a machine."""
    layout = schedule.layout
    trained = sum(part.trained_parameters for part in workload.parts.values())
    frozen = sum(part.parameters for part in workload.parts.values()) - trained
    shard = sum(unit.padded_trained(layout.shards) for unit in workload.units) // layout.shards
    frozen_shard = sum(unit.padded(layout.shards) for unit in workload.units) // layout.shards - shard
    waiting = trained if layout.defer_reduce_scatter else 0
    parts = {
        "parameters": 4 * shard,
        "gradients": 4 * shard + BYTES[layout.reduce_dtype] * waiting,
        "optimizer": 8 * shard,
        "frozen": BYTES[layout.param_dtype] * frozen if layout.replicate_frozen else 4 * frozen_shard,
        "gathered": _gathered(workload, schedule),
        "reduction": _reduction(workload, schedule),
        "activations": activations(workload, schedule),
        "logits": _logits(workload, schedule),
    }
    gib = {name: number / GIB for name, number in parts.items()}
    return Memory(**gib, allowance=CONTEXT_GIB + FRAGMENTATION * sum(gib.values()), usable=machine.gpu.memory_gib)


def _gathered(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the units in flight."""
    layout = schedule.layout
    if layout.whole:  # matrix products keep what was cast for them until their backward pass
        cast = sum(parameter.size for unit in workload.units for parameter in unit.parameters if unit.gradients_flow)
        table = (workload.vocab_size, workload.decoder.width)
        shapes = [parameter.shape for unit in workload.units if unit.is_root for parameter in unit.parameters]
        unread = prod(table) if shapes.count(table) > 1 else 0  # embeddings go into no product, unless they are the head too
        return 0 if layout.param_dtype == "float32" else BYTES[layout.param_dtype] * (cast - unread)
    units = sent_units(workload, layout)
    root = sum(unit.padded(layout.shards) for unit in units if unit.is_root)
    kept = sum(unit.padded(layout.shards) for unit in units if unit.gradients_flow and not unit.is_root)
    largest = max((unit.padded(layout.shards) for unit in units if not unit.is_root), default=0)
    in_flight = 2 * largest if layout.reshard_after_forward else kept + largest
    return BYTES[layout.param_dtype] * (root + in_flight)


def _reduction(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the gradients that are computed but not yet in their place."""
    layout = schedule.layout
    if layout.whole:
        return 4 * sum(unit.padded_trained(1) for unit in workload.units) * (layout.ranks > 1)
    root = sum(unit.padded_trained(layout.shards) for unit in workload.units if unit.is_root)
    largest = max((unit.padded_trained(layout.shards) for unit in workload.units if not unit.is_root), default=0)
    return BYTES[layout.param_dtype] * (root + largest) + BYTES[layout.reduce_dtype] * largest


def _logits(workload: Workload, schedule: Schedule) -> float:
    """Bytes at the beginning of backward; where they come in pieces, with the head's gradient of the pieces before."""
    positions = workload.target_tokens * schedule.micro_batch
    pieces = pieces_of(positions, workload.vocab_size)
    decoder = workload.parts["decoder"]
    table = workload.vocab_size * workload.decoder.width if pieces > 1 and decoder.trained and not workload.adapters else 0
    gradient = BYTES[schedule.layout.param_dtype] * table
    # a piece's own is made from its transpose, and added to those of the pieces before
    return max(12 * workload.vocab_size * positions / pieces + gradient, 3 * gradient)


def activations(workload: Workload, schedule: Schedule) -> float:
    """Bytes that a micro-batch keeps from its forward pass for its backward pass, without those of the head."""
    layout, number = schedule.layout, BYTES[schedule.layout.param_dtype]
    tower, projector, decoder = (workload.parts[part] for part in ("vision_tower", "projector", "decoder"))
    tokens = schedule.micro_batch * workload.tokens
    pictures = schedule.micro_batch * workload.images_per_sample
    adapters = workload.adapters
    autocast = layout.whole and layout.param_dtype != "float32"
    saved = decoder_bytes(workload.decoder, number, decoder.trained, layout.compile_blocks, adapters, autocast)
    products = 2 * workload.decoder.mlp_dim + (adapters.ranks + adapters.outputs if adapters else 0)
    total = tokens * (_stack(workload.decoder, saved, number, products, layout) + _norm(workload.decoder, number, decoder.trained))
    if projector.gradients_flow:  # the inputs and outputs of two layers
        total += pictures * workload.tokens_per_image * 2 * number * (workload.tower.width + workload.decoder.width)
    if tower.gradients_flow:
        saved = tower_bytes(workload.tower, number)
        total += pictures * workload.num_patches * _stack(workload.tower, saved, number, workload.tower.mlp_dim, layout)
    return float(total)


def decoder_bytes(
    shape: Blocks, number: int, trained: bool, compiled: bool, adapters: Adapters | None = None, autocast: bool = False
) -> int:
    """Bytes of a token that a LLaMA block saves, with its input.

    Attention saves queries, keys, values and its result. Each norm saves its input; a trained one also what it scales and, for the
    matrices behind it, its output. The MLP saves what goes into its activation, what comes out, the other factor and, for a trained
    matrix behind it, their product. A compiler makes norms one operation, and computes the activation once more. Not counted: where
    PyTorch's packed attention takes no grouped keys (torch 2.11, the CPU), keys and values are saved as wide as the queries.

    Args:
        shape: Its widths.
        number: Bytes of a number in the format of the computation.
        trained: Whether its weights need gradients.
        compiled: Whether torch.compile compiles it.
        adapters: What trains instead of the weights. With dropout each keeps its own inputs and a byte for each of them; without,
            they share those of trained weights, which is a bound.
        autocast: Whether norms compute in fp32 and each of the five matrices behind those that train casts its input by itself.
    """
    if adapters is not None:
        kept = number * adapters.ranks + (number + 1) * adapters.inputs * adapters.dropout
        return kept + decoder_bytes(shape, number, not adapters.dropout, compiled, autocast=autocast)
    attention = number * 2 * (shape.query_dim + shape.key_dim)
    if compiled:
        return attention + number * ((3 if trained else 2) * shape.mlp_dim + (4 if trained else 2) * shape.width)
    norms = (16 + 5 * number) * shape.width if autocast and trained else 2 * _norm(shape, number, trained)
    return attention + number * (4 if trained else 3) * shape.mlp_dim + norms


def _norm(shape: Blocks, number: int, trained: bool) -> int:
    """Bytes of a token that transformers' RMSNorm saves, with the input of the matrices behind it; it copies its own to fp32."""
    return 4 * shape.width + (2 * number * shape.width if trained else 0)


def tower_bytes(shape: Blocks, number: int) -> int:
    """Bytes of a patch that a trained vision block saves: as a LLaMA block, with fused norms and an MLP without a second factor."""
    return number * (4 * shape.width + 2 * (shape.query_dim + shape.key_dim) + 3 * shape.mlp_dim)


def _stack(shape: Blocks, saved: int, number: int, more_products: int, layout: Layout) -> int:
    """Bytes of a token that all blocks keep, and the one that is computed again."""
    match layout.activation_checkpointing:
        case "none":
            return shape.layers * saved
        case "full":  # the input
            return shape.layers * number * shape.width + saved
        case "selective":  # the input and the results of matrix products and of attention
            products = 2 * shape.width + 2 * (shape.query_dim + shape.key_dim) + more_products
            return shape.layers * number * (shape.width + products) + saved
