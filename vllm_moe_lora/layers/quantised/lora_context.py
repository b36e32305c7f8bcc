"""Experts whose `apply` never looks at the LoRA context, made to (0.20 to 0.33).

From 0.20 on a wrapper gives its experts a context and their `apply` is to add the factors. Some
classes inherit the promise and replace `apply`. What they do call, as all of upstream's Triton and
Marlin experts do, is `activation` between the two products and `moe_sum` after the second: the two
places where factors are added.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def consuming(
    experts: Any,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> Any:
    """``experts`` for one call of `apply`: itself without a context, else a copy that adds LoRA.

    A copy, because two batches may be on their way through the same experts at once.

    Args:
        hidden_states: [tokens, hidden], not quantised.
        topk_weights, topk_ids: [tokens, top_k].
    """
    context = experts._lora_context
    if context is None:
        return experts
    tokens, top_k = topk_ids.shape
    common = of_batch(w1, w2, topk_weights)
    kept: dict[str, Any] = {}

    def activation(kind: Any, output: torch.Tensor, input: torch.Tensor, **options: Any) -> None:
        found = experts.apply_w13_lora(
            context,
            y=input.view(tokens, top_k, -1),
            x=hidden_states,
            topk_ids=topk_ids,
            expert_map=expert_map,
            **common,
        )
        kept.update(zip(PLACES, found, strict=True))
        experts.activation(kind, output, input, **options)
        kept["x"] = output

    def moe_sum(input: torch.Tensor, output: torch.Tensor, *rest: Any) -> None:
        experts.apply_w2_lora(context, y=input, **kept, **common)
        experts.moe_sum(input, output, *rest)

    once = copy.copy(experts)
    once.activation, once.moe_sum = activation, moe_sum
    return once


# What `apply_w13_lora` gives back, under the names by which `apply_w2_lora` takes it.
PLACES = (
    "sorted_token_ids_lora",
    "expert_ids_lora",
    "num_tokens_post_padded_lora",
    "token_lora_mapping",
)


def of_batch(w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor) -> dict[str, Any]:
    """What `apply_w13_lora` and `apply_w2_lora` both take; ``topk_weights`` [tokens, top_k]."""
    tokens, top_k = topk_weights.shape
    sizes = {"num_tokens": tokens, "top_k_num": top_k}
    return {**sizes, "topk_weights": topk_weights, "w1": w1, "w2": w2}
