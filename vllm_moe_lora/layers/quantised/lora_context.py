"""Adds LoRA to experts classes whose `apply` ignores it, in vLLM 0.20 to 0.33.

From 0.20 on vLLM's LoRA layer gives its experts a `MoELoRAContext`, and `apply` of the experts has
to add the LoRA. Some classes inherit ``supports_lora() == True`` from `TritonExperts`, but have an
`apply` of their own that does not read the context. Adapters are then ignored without a message.

Every such `apply` calls `self.activation` between the two GEMMs, and `self.moe_sum` after the
second. `adding_lora` returns a copy of the experts on which these two methods add LoRA first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def adding_lora(
    experts: Any,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> Any:
    """Return the experts to use for one call of `apply`.

    It is a copy, because two batches may run through the same experts at once (--enable-dbo).

    Args:
        experts: upstream's experts.
        hidden_states: [tokens, hidden], not quantised.
        w1, w2: the experts' weights, [experts, out, in] or packed.
        topk_weights, topk_ids: [tokens, top_k]; the ids are those of the whole model.
        expert_map: [experts of the model] int32, the local expert, or -1 for one on another device.
            None if all experts are local.

    Returns:
        A copy of ``experts`` that adds LoRA; ``experts`` itself if it has no LoRA context.
    """
    context = experts._lora_context
    if context is None:
        return experts
    tokens, top_k = topk_ids.shape
    common = common_arguments(w1, w2, topk_weights)
    w2_arguments: dict[str, Any] = {}  # what apply_w2_lora needs from before the activation

    def activation(kind: Any, output: torch.Tensor, input: torch.Tensor, **options: Any) -> None:
        found = experts.apply_w13_lora(
            context,
            y=input.view(tokens, top_k, -1),
            x=hidden_states,
            topk_ids=topk_ids,
            expert_map=expert_map,
            **common,
        )
        w2_arguments.update(zip(ROUTING_ARGUMENTS, found, strict=True))
        experts.activation(kind, output, input, **options)
        w2_arguments["x"] = output

    def moe_sum(input: torch.Tensor, output: torch.Tensor, *rest: Any) -> None:
        experts.apply_w2_lora(context, y=input, **w2_arguments, **common)
        experts.moe_sum(input, output, *rest)

    changed = copy.copy(experts)
    changed.activation, changed.moe_sum = activation, moe_sum
    return changed


# The parameters of `apply_w2_lora` that take the tuple which `apply_w13_lora` returns, in order.
ROUTING_ARGUMENTS = (
    "sorted_token_ids_lora",
    "expert_ids_lora",
    "num_tokens_post_padded_lora",
    "token_lora_mapping",
)


def common_arguments(
    w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments that `apply_w13_lora` and `apply_w2_lora` have in common.

    Args:
        w1, w2: the experts' weights.
        topk_weights: [tokens, top_k].
    """
    tokens, top_k = topk_weights.shape
    sizes = {"num_tokens": tokens, "top_k_num": top_k}
    return {**sizes, "topk_weights": topk_weights, "w1": w1, "w2": w2}
