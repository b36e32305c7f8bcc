"""MoE LoRA on CPU tensors with torch's own operators: shrink, expand, and the routing plan.

Small batches gather the factors of every (token, expert) pair and run one batched product;
large ones walk the non-empty (slot, expert) segments, so each factor is read once. Both follow
`kernels/reference.py`, which defines what is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Gathering copies rank x in elements per pair; past this many pairs walking segments is cheaper
# (measured by benchmarks/cpu_engine.py on a 2-core EPYC, rank 16, hidden 2048).
GATHER_PAIRS = 12


@dataclass
class PairPlan:
    """The (token, expert) pairs of one MoE layer call that have an adapter.

    Attributes:
        rows: [n] int64, the tokens of the batch that have an adapter, ascending.
        top_k: experts per token; pair p belongs to token ``rows[p // top_k]``.
        slots: [n * top_k] int64, adapter slot of each pair.
        experts: [n * top_k] int64, local expert of each pair (0 where ``valid`` is False).
        valid: [n * top_k] bool, or None when every pair's expert lives on this rank.
    """

    rows: torch.Tensor
    top_k: int
    slots: torch.Tensor
    experts: torch.Tensor
    valid: torch.Tensor | None
    segments: list[tuple[int, int, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return self.slots.numel()

    def slot_set(self) -> list[int]:
        """The adapter slots that occur, ascending."""
        return self.slots.unique().tolist()

    def pairs_of(self, slot: int) -> torch.Tensor:
        """Indices of the pairs of one slot."""
        return (self.slots == slot).nonzero().flatten()


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
    valid: torch.Tensor | None = (experts >= 0) & (experts < num_experts)
    assert valid is not None
    if bool(valid.all()):
        valid = None
    else:
        experts = experts.masked_fill(~valid, 0)
    plan = PairPlan(rows, top_k, slots, experts, valid)
    if len(plan) > GATHER_PAIRS:
        plan.segments = _segments(plan, num_experts)
    return plan


def segments_of(keys: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """[(key, indices that hold it)] of a 1-d int64 tensor, keys ascending, indices in order."""
    ordered, order = keys.sort(stable=True)
    found, counts = ordered.unique_consecutive(return_counts=True)
    return list(zip(found.tolist(), order.split(counts.tolist()), strict=True))


def _segments(plan: PairPlan, num_experts: int) -> list[tuple[int, int, torch.Tensor]]:
    """[(slot, expert, pair indices)] of the non-empty segments, in ascending order."""
    keys = plan.slots * num_experts + plan.experts
    if plan.valid is not None:
        keys = keys.masked_fill(~plan.valid, -1)
    return [(k // num_experts, k % num_experts, p) for k, p in segments_of(keys) if k >= 0]


def shrink(x: torch.Tensor, lora_a: torch.Tensor, plan: PairPlan) -> torch.Tensor:
    """z[p] = A[slot_p, expert_p] x[p].

    Args:
        x: [pairs, in], one row a pair.
        lora_a: [slots, E or 1, rank, in]; expert dimension 1 is a factor shared by all experts.
        plan: the pairs.

    Returns:
        [pairs, rank] in x's dtype.
    """
    a = lora_a if lora_a.dtype == x.dtype else lora_a.to(x.dtype)
    z = x.new_zeros(len(plan), a.shape[2])
    if plan.segments is None:
        picked = a[plan.slots, plan.experts if a.shape[1] > 1 else 0]
        torch.bmm(picked, x.unsqueeze(-1), out=z.unsqueeze(-1))
        return z if plan.valid is None else z.mul_(plan.valid.unsqueeze(-1))
    for slot, expert, pairs in plan.segments:
        z[pairs] = x[pairs] @ a[slot, expert if a.shape[1] > 1 else 0].t()
    return z


def expand_add(y: torch.Tensor, z: torch.Tensor, lora_b: torch.Tensor, plan: PairPlan) -> None:
    """y[p] += B[slot_p, expert_p] z[p], in place.

    Args:
        y: [pairs, out], may be a strided view of wider rows.
        z: [pairs, rank].
        lora_b: [slots, E or 1, out, rank].
        plan: the pairs.
    """
    b = lora_b if lora_b.dtype == y.dtype else lora_b.to(y.dtype)
    if plan.segments is None:
        picked = b[plan.slots, plan.experts if b.shape[1] > 1 else 0]
        y += torch.bmm(picked, z.unsqueeze(-1)).squeeze(-1)
        return
    for slot, expert, pairs in plan.segments:
        y.index_add_(0, pairs, z[pairs] @ b[slot, expert if b.shape[1] > 1 else 0].t())
