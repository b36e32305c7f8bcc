"""The definition of LoRA on routed experts, as plain loops in fp32.

All other kernels of this package are tested against this file. It is slow; no engine runs it.

Let token t belong to the adapter in slot s, and let expert e be the router's k-th choice for t. For
each slice of a projection (w13 has two slices, gate and up; w2 has one, down) the rule is

    y[t, k, columns of the slice] += weight[t, k] * lora_b[s, e] @ (lora_a[s, e] @ x)

Here lora_a and lora_b are cut to the rank of (s, e), and lora_b already contains the LoRA scaling.
Everything else in y keeps its bits: rows of base tokens (tokens without an adapter), rows of
experts that live on another device, and rows whose (slot, expert) has rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    token_slots: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Add the LoRA product of every token-expert pair to y, in place.

    Args:
        y: [tokens, top_k, out], any float dtype. out is the sum over the slices. Each result is
            computed in fp32 and rounded once.
        x: [tokens, in] with one row per token (for w13), or [tokens * top_k, in] with one row per
            pair (for w2).
        lora_a: one tensor per slice, [slots, experts or 1, rank, in]. 1 means that all experts
            share the factor.
        lora_b: one tensor per slice, [slots, experts or 1, out of the slice, rank].
        ranks: [slices, slots, experts] int, the rank in use; 0 if the adapter has no factor there.
            Numbers of lora_a and lora_b beyond this rank are not read.
        token_slots: [tokens] int, the adapter slot of each token; -1 for a base token.
        topk_ids: [tokens, top_k] int, the expert of each pair.
        topk_weights: [tokens, top_k], the router weights to multiply with; None to multiply with 1.
        expert_map: [experts of the whole model] int, the local index of each expert; -1 if it lives
            on another device. None if ``topk_ids`` are local indices already; ids outside
            [0, experts) then belong to other devices.
    """
    tokens, top_k = topk_ids.shape
    experts = ranks.shape[2]
    for token in range(tokens):
        slot = int(token_slots[token])
        if slot < 0:
            continue
        for k in range(top_k):
            expert = _local_expert(int(topk_ids[token, k]), expert_map)
            if not 0 <= expert < experts:
                continue
            row = x[token if x.shape[0] == tokens else token * top_k + k].float()
            weight = 1.0 if topk_weights is None else float(topk_weights[token, k])
            start = 0
            for a, b, rank_of in zip(lora_a, lora_b, ranks, strict=True):
                rank, stop = int(rank_of[slot, expert]), start + b.shape[2]
                if rank:
                    a_2d = a[slot, expert if a.shape[1] > 1 else 0, :rank].float()
                    b_2d = b[slot, expert if b.shape[1] > 1 else 0, :, :rank].float()
                    out = y[token, k, start:stop]
                    out.copy_(out.float() + weight * (b_2d @ (a_2d @ row)))
                start = stop


def _local_expert(expert: int, expert_map: torch.Tensor | None) -> int:
    """Return the index of an expert on this device, or -1 if it lives on another one."""
    if expert_map is None:
        return expert
    return int(expert_map[expert]) if 0 <= expert < expert_map.numel() else -1
