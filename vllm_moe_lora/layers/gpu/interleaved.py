"""Gate's and up's factors apart, on experts whose gate and up alternate (gpt-oss)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def wanted(experts: Any, context: Any) -> bool:
    """Whether ``experts`` have rows in turn and ``context``, their `MoELoRAContext`, two slices."""
    activation = experts.moe_config.activation
    name = str(getattr(activation, "value", activation))
    return bool(context.w13_num_slices == 2 and name == "swigluoai")


def added(y: torch.Tensor, add: Callable[[torch.Tensor], Any], fresh: bool) -> Any:
    """What ``add`` returns, which adds to a tensor like ``y`` gate's change and then up's.

    Args:
        y: [tokens, top_k, 2 * inner] or any shape of that width, gate and up in turn.
        fresh: ``y`` is to be the change itself.
    """
    change = torch.zeros_like(y)
    result = add(change)
    in_turn = change.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if fresh:
        y.copy_(in_turn)
    else:
        y.add_(in_turn)
    return result
