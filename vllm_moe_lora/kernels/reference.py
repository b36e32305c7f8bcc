"""What a LoRA adapter does to routed experts, in plain fp32 loops: this file defines right.

A token t of adapter slot s that the router sends to expert e as its k-th choice gets, for every
slice of a projection (gate and up of w13; down of w2),

    y[t, k, columns of the slice] += weight[t, k] * B[s, e] @ (A[s, e] @ x)

with A and B cut to the rank of that (slot, expert) and scaling already folded into B. Nothing
else of y changes: base tokens, experts of other ranks and pairs of rank 0 keep their bits.
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
    """Add every pair's LoRA to y, in place.

    Args:
        y: [tokens, top_k, out], any float dtype, rounded to once; out is the sum of the slices'.
        x: [tokens, in], one row a token (w13), or [tokens * top_k, in], one row a pair (w2).
        lora_a: per slice [slots, experts or 1, rank, in]; 1 is a factor shared by all experts.
        lora_b: per slice [slots, experts or 1, out of the slice, rank].
        ranks: [slices, slots, experts] int, the rank in use; 0 where the adapter has no factor.
            What the factors hold past it is never read.
        token_slots: [tokens] int, adapter slot, -1 for a base token.
        topk_ids: [tokens, top_k] int, expert of each pair.
        topk_weights: [tokens, top_k] router weights to multiply the change by, or None.
        expert_map: [experts of the whole model] int, local expert of each or -1, or None when
            ``topk_ids`` are local; ids outside [0, experts) are then experts of another rank.
    """
    tokens, top_k = topk_ids.shape
    experts = ranks.shape[2]
    for token in range(tokens):
        slot = int(token_slots[token])
        if slot < 0:
            continue
        for k in range(top_k):
            expert = _local(int(topk_ids[token, k]), expert_map)
            if not 0 <= expert < experts:
                continue
            row = x[token if x.shape[0] == tokens else token * top_k + k].float()
            weight = 1.0 if topk_weights is None else float(topk_weights[token, k])
            start = 0
            for a, b, rank_of in zip(lora_a, lora_b, ranks, strict=True):
                rank, stop = int(rank_of[slot, expert]), start + b.shape[2]
                if rank:
                    down = a[slot, expert if a.shape[1] > 1 else 0, :rank].float()
                    up = b[slot, expert if b.shape[1] > 1 else 0, :, :rank].float()
                    out = y[token, k, start:stop]
                    out.copy_(out.float() + weight * (up @ (down @ row)))
                start = stop


def _local(expert: int, expert_map: torch.Tensor | None) -> int:
    if expert_map is None:
        return expert
    return int(expert_map[expert]) if 0 <= expert < expert_map.numel() else -1
