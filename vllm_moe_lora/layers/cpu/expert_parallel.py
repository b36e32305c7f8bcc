"""Expert parallelism on the CPU: from the router's choices to those that are on this rank.

Upstream's CPU operators take the router's global expert ids for local ones, and so read and write
beyond the end of a rank's experts, with and without LoRA. So they only get local ids here.
"""

from __future__ import annotations

import torch


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """Return the local id of each expert, -1 for those of other ranks; in ``topk_ids``' dtype.

    Args:
        topk_ids: [tokens, top_k] int, global expert ids.
        expert_map: [global experts] int, the local id of each expert; -1 if it is on another rank.
    """
    return expert_map[topk_ids.long()].to(topk_ids.dtype)


def local_choices(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leave the experts of other ranks out of the router's choices.

    A token keeps its local experts in their order. If it has fewer than another token of the batch,
    its first one is repeated with the weight 0: that adds 0 to its sum, and reads no other weights.

    Args:
        topk_weights: [tokens, top_k].
        topk_ids: [tokens, top_k] int, local ids; -1 for experts of other ranks.

    Returns:
        The tokens that have an expert on this rank, [rows] int64; and their weights and ids,
        [rows, the highest number of local experts of a token].
    """
    here = topk_ids >= 0
    counts = here.sum(1)
    rows = counts.nonzero().flatten()
    most = int(counts.max()) if rows.numel() else 0
    first = (~here[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    ids, weights = topk_ids[rows].gather(1, first), topk_weights[rows].gather(1, first)
    away = ids < 0
    return rows, weights.masked_fill(away, 0), torch.where(away, ids[:, :1], ids)
