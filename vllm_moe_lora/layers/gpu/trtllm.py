"""LoRA on the TRT-LLM experts of FlashInfer, in vLLM 0.26 to 0.33.

vLLM uses them on Blackwell, for bf16 experts and, in newer releases, for MXFP4 ones. Their kernel
differs from vLLM's others in two ways: the output of w13 has up before gate (`swap_gate_up`), and
the kernel assumes that the experts of a rank are numbered from rank * (experts per rank) on
(`renumber`).
"""

from __future__ import annotations

from typing import Any

import torch

_CACHE = "_moe_lora_numbering"  # attribute of experts: (expert_map, result of `_numbering`)


def swap_gate_up(experts: Any, delta: torch.Tensor | None) -> torch.Tensor | None:
    """Bring a LoRA delta of w13 into the kernel's order: up, then gate.

    If gate and up have factors of their own (two slices), upstream does it by swapping the slices.
    If they are fused into one slice, upstream's swap has no effect.

    Args:
        experts: upstream's `TrtLlmBf16LoRAExperts`.
        delta: [tokens, top_k, 2 * intermediate]; None if the batch has no LoRA.

    Returns:
        ``delta`` with its halves swapped if there is one slice, else ``delta``.
    """
    if delta is None or experts._lora_context.w13_num_slices != 1:
        return delta
    return delta.roll(delta.shape[-1] // 2, -1)


def renumber(
    experts: Any, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Renumber the model's experts as the kernel assumes them under expert parallelism.

    vLLM numbers them differently if their number is not divisible by the ranks, or with round-robin
    placement. The kernel would then run other experts, also without LoRA.

    Args:
        experts: upstream's TRT-LLM experts.
        topk_ids: [tokens, top_k], ids of the whole model.
        expert_map: [experts of the model] int32, the local expert, or -1 for one on another device.
            None without expert parallelism.

    Returns:
        ``topk_ids`` and ``expert_map`` in the kernel's numbers.
    """
    if expert_map is None:
        return topk_ids, expert_map
    cached = experts.__dict__.get(_CACHE)
    if cached is None or cached[0] is not expert_map:
        # This waits for the device, but only once per layer, while vLLM warms up.
        cached = (expert_map, _numbering(experts, expert_map))
        setattr(experts, _CACHE, cached)
    if cached[1] is None:
        return topk_ids, expert_map
    numbers, own = cached[1]
    return numbers[topk_ids.long()].to(topk_ids.dtype), own


def _numbering(experts: Any, expert_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the kernel's numbers.

    Returns:
        [experts + 1] int32, vLLM's id -> the kernel's id, and the expert map for the kernel's ids.
        None if the kernel's numbers are vLLM's.
    """
    count = experts.local_num_experts
    first = experts.ep_rank * count
    own = torch.full_like(expert_map, -1)
    own[first : first + count] = torch.arange(count).to(own)
    if torch.equal(own, expert_map):
        return None
    # All experts on other devices get the same id, one that is not local. The last entry is for the
    # id -1.
    numbers = expert_map.new_full((len(expert_map) + 1,), (first + count) % len(expert_map))
    numbers[:-1] = torch.where(expert_map >= 0, expert_map + first, numbers[:-1])
    return numbers, own
