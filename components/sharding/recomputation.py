"""How the blocks of a model run in training: compiled, and computed again in the backward pass in place of being kept.

Source: torch.utils.checkpoint, `create_selective_checkpoint_contexts`; the choice of what is kept follows torchtitan. Differs: a
block stays the module that it was, and so do the names in its state dict.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # which registers its operator
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

_KEPT = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.linear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.torch_attn._varlen_attn,
}


def compile_block(block: nn.Module) -> None:
    """Compile a block for any number of tokens; before `recompute`, which then computes again what is compiled.

    All blocks of a class run what was compiled for the first of them, unless they differ in more than their numbers.
    """
    # not block.compile(): it would compile the hooks that gather the block as well
    compiled = torch.compile(block.forward, dynamic=True)

    def training(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        # the first block gets a view, for which alone another graph would be compiled
        return compiled(tokens.clone() if tokens._is_view() else tokens, *arguments, **options)

    _run_in_training(block, training)


def recompute(block: nn.Module, what: Literal["selective", "full"]) -> None:
    """Let a block forget, after its forward pass, what the backward pass can compute again.

    Args:
        block: Its first argument is a tensor; it may be sharded before or afterwards.
        what: `full`: all but its arguments. `selective`: all but the results of matrix products and of attention, so that none of
            these runs twice; a LLaMA block then keeps 14 D + 4 F bytes a token in bfloat16, for a width D and an MLP of width F.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy) if what == "selective" else noop_context_fn
    _run_in_training(block, partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts))


def _run_in_training(block: nn.Module, training: Callable) -> None:
    """Validation and generation, which have no backward pass, run the block as it was."""
    before = block.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        return (training if torch.is_grad_enabled() else before)(*arguments, **options)

    block.forward = forward  # type: ignore[method-assign]


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = getattr(operator, "overloadpacket", operator) in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
