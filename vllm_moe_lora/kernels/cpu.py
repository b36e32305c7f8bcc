"""MoE LoRA on CPU tensors with torch's own operators: the routing plan, shrink and expand.

Small batches gather the factors of every (token, expert) pair and run one batched product. Larger
ones sort the pairs by (expert, slot) once, so that every segment is a slice of rows: each factor
is read once and no row is copied for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Gathering copies rank x in elements per pair; past this many pairs walking segments is cheaper
# (measured by benchmarks/cpu_engine.py on a 2-core EPYC, rank 16, hidden 2048).
GATHER_PAIRS = 12

Segment = tuple[int, int, int, int]  # slot, expert, first pair, one past the last pair


@dataclass
class PairPlan:
    """The (token, expert) pairs of one MoE layer call that have an adapter.

    Attributes:
        rows: [n] int64, the tokens of the batch that have an adapter, ascending.
        top_k: experts per token.
        order: [pairs] int64: pair i here is pair ``order[i]`` of the rows in turn, so it belongs
            to token ``rows[order[i] // top_k]``. Sorted by expert, then slot; None for a small
            batch, whose pairs stay in turn.
        slots: [pairs] int64, adapter slot of each pair.
        experts: [pairs] int64, local expert of each pair (0 where ``valid`` is False).
        valid: [pairs] bool, or None when every pair's expert lives on this rank.
        segments: the non-empty (slot, expert) slices of a sorted plan, else empty.
    """

    rows: torch.Tensor
    top_k: int
    order: torch.Tensor | None
    slots: torch.Tensor
    experts: torch.Tensor
    valid: torch.Tensor | None
    segments: list[Segment]

    def __len__(self) -> int:
        return self.slots.numel()

    def slot_set(self) -> list[int]:
        """The adapter slots that occur, ascending."""
        return self.slots.unique().tolist()

    def pairs_of(self, slot: int) -> torch.Tensor:
        """Indices of the pairs of one slot."""
        return (self.slots == slot).nonzero().flatten()

    def tokens(self) -> torch.Tensor:
        """[pairs] int64, the batch row of each pair."""
        if self.order is None:
            return self.rows.repeat_interleave(self.top_k)
        return self.rows[self.order // self.top_k]

    def in_turn(self, pairs: torch.Tensor) -> torch.Tensor:
        """[pairs, ...] in this plan's order -> [rows, top_k, ...]."""
        if self.order is not None:
            back = torch.empty_like(self.order)
            back[self.order] = torch.arange(len(self))
            pairs = pairs[back]
        return pairs.unflatten(0, (-1, self.top_k))

    def expert_slices(self) -> list[tuple[int, int, int]]:
        """[(expert, first pair, one past the last pair)], every pair in one of them."""
        if self.order is None:
            return [(expert, i, i + 1) for i, expert in enumerate(self.experts.tolist())]
        found, counts = self.experts.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        starts = stops - counts
        return list(zip(found.tolist(), starts.tolist(), stops.tolist(), strict=True))


def make_plan(
    token_slots: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
) -> PairPlan | None:
    """Collect the pairs that have an adapter; None when the whole batch is base requests.

    Args:
        token_slots: [tokens] int, adapter slot of each token, -1 for a base request.
        topk_ids: [tokens, top_k] int, local expert ids; ids outside [0, num_experts) are experts
            of another rank.
        num_experts: experts on this rank.
    """
    rows = (token_slots >= 0).nonzero().flatten()
    if rows.numel() == 0:
        return None
    top_k = topk_ids.shape[1]
    experts = topk_ids.index_select(0, rows).reshape(-1).to(torch.int64)
    slots = token_slots.index_select(0, rows).to(torch.int64).repeat_interleave(top_k)
    inside = (experts >= 0) & (experts < num_experts)
    valid = None if bool(inside.all()) else inside
    if valid is not None:
        experts = experts.masked_fill(~valid, 0)
    if slots.numel() <= GATHER_PAIRS:
        return PairPlan(rows, top_k, None, slots, experts, valid, [])

    width = int(slots.max()) + 1
    keys, order = (experts * width + slots).sort(stable=True)
    found, counts = keys.unique_consecutive(return_counts=True)
    segments: list[Segment] = []
    start = 0
    for key, count in zip(found.tolist(), counts.tolist(), strict=True):
        segments.append((key % width, key // width, start, start + count))
        start += count
    valid = None if valid is None else valid[order]
    return PairPlan(rows, top_k, order, slots[order], experts[order], valid, segments)


def shrink(x: torch.Tensor, lora_a: torch.Tensor, plan: PairPlan) -> torch.Tensor:
    """z[p] = A[slot_p, expert_p] x[p]; zero for pairs of another rank's experts.

    Args:
        x: [pairs, in], one row a pair.
        lora_a: [slots, E or 1, rank, in]; expert dimension 1 is a factor shared by all experts.
        plan: the pairs.

    Returns:
        [pairs, rank] in x's dtype.
    """
    a = lora_a if lora_a.dtype == x.dtype else lora_a.to(x.dtype)
    shared = a.shape[1] == 1
    z = x.new_empty(len(plan), a.shape[2])
    if plan.order is None:
        picked = a[plan.slots, 0 if shared else plan.experts]
        torch.bmm(picked, x.unsqueeze(-1), out=z.unsqueeze(-1))
    for slot, expert, start, stop in plan.segments:
        torch.mm(x[start:stop], a[slot, 0 if shared else expert].t(), out=z[start:stop])
    return z if plan.valid is None else z.mul_(plan.valid.unsqueeze(-1))


def expand_add(y: torch.Tensor, z: torch.Tensor, lora_b: torch.Tensor, plan: PairPlan) -> None:
    """y[p] += B[slot_p, expert_p] z[p], in place.

    Args:
        y: [pairs, out], may be a strided view of wider rows.
        z: [pairs, rank].
        lora_b: [slots, E or 1, out, rank].
        plan: the pairs.
    """
    b = lora_b if lora_b.dtype == y.dtype else lora_b.to(y.dtype)
    shared = b.shape[1] == 1
    if plan.order is None:
        picked = b[plan.slots, 0 if shared else plan.experts]
        y += torch.bmm(picked, z.unsqueeze(-1)).squeeze(-1)
    for slot, expert, start, stop in plan.segments:
        y[start:stop].addmm_(z[start:stop], b[slot, 0 if shared else expert].t())
