"""Gives FP8 and INT8 experts with LoRA the unquantised tokens, in vLLM 0.20 to 0.23.

There vLLM quantises the tokens before it calls the experts' `apply`. The experts then multiply
lora_a of gate and up with the quantised numbers, without their scale, so the LoRA is wrong. vLLM
0.24 keeps the unquantised tokens for LoRA.

Here the experts ask for unquantised tokens (`needed`), and `quantise` quantises them at the start
of `apply`. vLLM 0.24 does the same if tokens are sent between devices.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch


def needed(experts: Any) -> bool:
    """Return whether these experts need unquantised tokens for LoRA."""
    return (
        getattr(experts, "_lora_context", None) is not None
        # FP8 and INT8 are torch dtypes. Other formats are strings, and their experts quantise the
        # tokens themselves.
        and isinstance(experts.quant_dtype, torch.dtype)
        and not getattr(experts, "quantization_emulation", False)
        and experts.quant_config.ocp_mx_scheme is None
    )


def quantise(
    experts: Any, hidden_states: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Quantise the tokens at the start of `apply`, and keep the unquantised ones for LoRA.

    Args:
        experts: upstream's experts.
        hidden_states: [tokens, hidden], quantised or not.
        scale: the scales of quantised tokens, else None.

    Returns:
        The experts to use for this call, a copy whose `apply_w13_lora` uses the unquantised tokens;
        the quantised tokens; and their scales. The arguments themselves if nothing has to be done.
    """
    if not needed(experts) or scale is not None or hidden_states.dtype == experts.quant_dtype:
        return experts, hidden_states, scale
    from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

    config = experts.quant_config
    tokens, scale = moe_kernel_quantize_input(
        hidden_states,
        config.a1_scale,
        config.quant_dtype,
        config.per_act_token_quant,
        config.block_shape,
    )
    changed = copy.copy(experts)
    changed.apply_w13_lora = functools.partial(_replace_x, experts.apply_w13_lora, hidden_states)
    return changed, tokens, scale


def _replace_x(apply_w13_lora: Any, tokens: torch.Tensor, *args: Any, **more: Any) -> Any:
    """Call ``apply_w13_lora`` with ``tokens`` in place of its argument x."""
    return apply_w13_lora(*args, **{**more, "x": tokens})
