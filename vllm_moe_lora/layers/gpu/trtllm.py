"""LoRA in TRT-LLM's experts from FlashInfer, vLLM's choice for bf16 on Blackwell (0.26 on).

Their kernel has up's rows before gate's, and numbers a rank's experts on from rank * count.
"""

from __future__ import annotations

from typing import Any

import torch

_KEPT = "_moe_lora_places"  # attribute of experts


def up_first(experts: Any, delta: torch.Tensor | None) -> torch.Tensor | None:
    """``delta`` [tokens, top_k, 2 * inner] as the kernel wants it: up's half, then gate's.

    Upstream turns two slices round, each with its factors; where gate and up are one slice there
    is nothing that it could turn.
    """
    if delta is None or experts._lora_context.w13_num_slices != 1:
        return delta
    return delta.roll(delta.shape[-1] // 2, -1)


def placed(
    experts: Any, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Experts' numbers and their map with this rank's experts where the kernel looks for them.

    vLLM places others where experts are uneven or dealt round robin.

    Args:
        topk_ids: [tokens, top_k] of the whole model's experts.
        expert_map: [experts] -> this rank's, -1 for others'; None where a rank has all.
    """
    if expert_map is None:
        return topk_ids, expert_map
    kept = experts.__dict__.get(_KEPT)
    if kept is None or kept[0] is not expert_map:
        # Looks at the device once a layer, while vLLM warms up.
        kept = (expert_map, _places(experts, expert_map))
        setattr(experts, _KEPT, kept)
    if kept[1] is None:
        return topk_ids, expert_map
    numbers, own = kept[1]
    return numbers[topk_ids.long()].to(topk_ids.dtype), own


def _places(experts: Any, expert_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[experts + 1] the kernel's numbers, and the map of those; None where they are vLLM's."""
    count = experts.local_num_experts
    first = experts.ep_rank * count
    own = torch.full_like(expert_map, -1)
    own[first : first + count] = torch.arange(count).to(own)
    if torch.equal(own, expert_map):
        return None
    # Any number that is another rank's stands for all of theirs, and at the end for -1.
    numbers = expert_map.new_full((len(expert_map) + 1,), (first + count) % len(expert_map))
    numbers[:-1] = torch.where(expert_map >= 0, expert_map + first, numbers[:-1])
    return numbers, own
