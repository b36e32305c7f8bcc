"""Separate LoRA factors of gate and up, on experts that interleave gate and up (gpt-oss).

With --enable-mixed-moe-lora-format vLLM keeps two slices of w13 factors, for gate and for up. The
output of gpt-oss' w13 alternates between gate and up. Up to vLLM 0.31 `apply_w13_lora` adds gate's
LoRA to the first half of the output, and up's to the second half. vLLM 0.32 does it right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def needed(experts: Any, context: Any) -> bool:
    """Return whether the experts interleave gate and up, and the LoRA context has two slices.

    Args:
        experts: upstream's experts.
        context: their `MoELoRAContext`.
    """
    activation = experts.moe_config.activation
    name = str(getattr(activation, "value", activation))
    return bool(context.w13_num_slices == 2 and name == "swigluoai")


def add_interleaved(y: torch.Tensor, add: Callable[[torch.Tensor], Any], overwrite: bool) -> Any:
    """Add the LoRA of gate and up to an output in which they alternate.

    Args:
        y: [tokens, top_k, 2 * intermediate], or any shape with that width; changed in place.
        add: adds gate's LoRA to the first half of a tensor like ``y``, and up's to the second half.
        overwrite: ``y`` becomes the LoRA itself.

    Returns:
        What ``add`` returned.
    """
    delta = torch.zeros_like(y)
    result = add(delta)
    interleaved = delta.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if overwrite:
        y.copy_(interleaved)
    else:
        y.add_(interleaved)
    return result
