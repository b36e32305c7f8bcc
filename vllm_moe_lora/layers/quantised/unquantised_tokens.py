"""FP8 and INT8 experts with LoRA see the tokens before they are quantised (0.20 to 0.23).

There the tokens are quantised on their way to the experts, and the factors of gate and up are
multiplied with the quantised numbers, without their scale. 0.24 keeps the tokens beside; here they
are quantised by the experts themselves, which 0.24 also does where tokens travel between ranks.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch


def wanted(experts: Any) -> bool:
    """Whether these experts are to be given tokens that are not quantised yet."""
    return (
        getattr(experts, "_lora_context", None) is not None
        # Other formats name themselves by a string; their experts quantise for themselves.
        and isinstance(experts.quant_dtype, torch.dtype)
        and not getattr(experts, "quantization_emulation", False)
        and experts.quant_config.ocp_mx_scheme is None
    )


def quantised(
    experts: Any, hidden_states: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Experts, tokens and their scales for one call of `apply`.

    Args:
        hidden_states: [tokens, hidden] as they came.
        scale: their scales, None where they are not quantised.
    """
    if not wanted(experts) or scale is not None or hidden_states.dtype == experts.quant_dtype:
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
    once = copy.copy(experts)
    once.apply_w13_lora = functools.partial(_with, experts.apply_w13_lora, hidden_states)
    return once, tokens, scale


def _with(apply_w13_lora: Any, tokens: torch.Tensor, *args: Any, **more: Any) -> Any:
    return apply_w13_lora(*args, **{**more, "x": tokens})
