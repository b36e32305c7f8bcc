"""LoRA on routed experts on the CPU, with torch's operators.

The CPU experts in layers/cpu call three functions. `make_plan` collects the token-expert pairs of a
batch that have an adapter. `shrink` computes z = lora_a x for them, and `expand_add` computes
y += lora_b z.

There are two ways to compute. A small batch gathers the factor of each pair and runs one batched
product. A larger batch is sorted by (expert, slot) once. The pairs that share a factor are then
adjacent rows (a segment), and each segment is one matrix product. So each factor is read once, and
no rows are copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .slot_stack import SlotStack

# Up to this many pairs a batch counts as small. Gathering copies rank * in elements per pair, so
# beyond it the loop over segments is faster (benchmarks/cpu_engine.py, 2-core EPYC, rank 16, hidden
# size 2048).
GATHER_PAIRS = 12

Segment = tuple[int, int, int, int]  # slot, expert, first pair, one past the last pair


@dataclass
class PairPlan:
    """The token-expert pairs of this device with an adapter, in one call of one MoE layer.

    "Token order" means: first all top_k pairs of the first row, then those of the second, and so
    on. The plan of a small batch keeps token order. A larger one is sorted by expert, then slot.
    Pairs whose expert lives on another device are left out.

    Attributes:
        rows: [n] int64, the rows of the batch whose tokens have an adapter, ascending.
        top_k: experts per token.
        order: [pairs] int64, the index of each pair in token order. Pair i thus belongs to the
            batch row ``rows[order[i] // top_k]``. None if that is i for each pair.
        slots: [pairs] int64, the adapter slot of each pair.
        experts: [pairs] int64, the local expert of each pair.
        segments: for a sorted plan, the ranges of pairs with the same slot and expert. Empty for a
            small batch.
    """

    rows: torch.Tensor
    top_k: int
    order: torch.Tensor | None
    slots: torch.Tensor
    experts: torch.Tensor
    segments: list[Segment]

    def __len__(self) -> int:
        return self.slots.numel()

    def slot_set(self) -> list[int]:
        """Return the adapter slots of the batch, ascending."""
        return self.slots.unique().tolist()

    def pairs_of(self, slot: int) -> torch.Tensor:
        """Return [n] int64, the indices of the pairs of one slot."""
        return (self.slots == slot).nonzero().flatten()

    def tokens(self) -> torch.Tensor:
        """Return [pairs] int64, the row of each pair in the batch."""
        if self.order is None:
            return self.rows.repeat_interleave(self.top_k)
        return self.rows[self.order // self.top_k]

    def by_token(self, pairs: torch.Tensor) -> torch.Tensor:
        """Bring [pairs, ...] from the plan's order into token order: [rows, top_k, ...].

        Pairs of other devices are 0.
        """
        if self.order is not None:
            ordered = pairs.new_zeros(self.rows.numel() * self.top_k, *pairs.shape[1:])
            ordered[self.order] = pairs
            pairs = ordered
        return pairs.unflatten(0, (self.rows.numel(), self.top_k))

    def expert_slices(self) -> list[tuple[int, int, int]]:
        """Return (expert, first pair, one past the last pair); together they cover all pairs."""
        if not self.segments:
            return [(expert, i, i + 1) for i, expert in enumerate(self.experts.tolist())]
        found, counts = self.experts.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        starts = stops - counts
        return list(zip(found.tolist(), starts.tolist(), stops.tolist(), strict=True))


def make_plan(
    token_slots: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
) -> PairPlan | None:
    """Collect the token-expert pairs that have an adapter.

    Args:
        token_slots: [tokens] int, the adapter slot of each token; -1 for a token without one.
        topk_ids: [tokens, top_k] int, local expert ids. Ids outside [0, num_experts) belong to
            experts on other devices.
        num_experts: the number of experts on this device.

    Returns:
        The plan, or None if no token of the batch has an adapter.
    """
    rows = (token_slots >= 0).nonzero().flatten()
    if rows.numel() == 0:
        return None
    top_k = topk_ids.shape[1]
    experts = topk_ids.index_select(0, rows).reshape(-1).to(torch.int64)
    slots = token_slots.index_select(0, rows).to(torch.int64).repeat_interleave(top_k)
    inside = (experts >= 0) & (experts < num_experts)
    here = None if bool(inside.all()) else inside.nonzero().flatten()
    if here is not None:
        slots, experts = slots[here], experts[here]
    if slots.numel() <= GATHER_PAIRS:
        return PairPlan(rows, top_k, here, slots, experts, [])

    width = int(slots.max()) + 1
    keys, order = (experts * width + slots).sort(stable=True)
    found, counts = keys.unique_consecutive(return_counts=True)
    segments: list[Segment] = []
    start = 0
    for key, count in zip(found.tolist(), counts.tolist(), strict=True):
        segments.append((key % width, key // width, start, start + count))
        start += count
    slots, experts = slots[order], experts[order]
    return PairPlan(rows, top_k, order if here is None else here[order], slots, experts, segments)


def shrink(x: torch.Tensor, lora_a: SlotStack, plan: PairPlan, rank: int) -> torch.Tensor:
    """Compute z[p] = lora_a[slot of p, expert of p] x[p] for each pair p.

    Args:
        x: [pairs, in], one row per pair, in the plan's order.
        lora_a: [slots, experts or 1, rank, in]. 1 means that all experts share the factor.
        plan: from `make_plan`.
        rank: the highest rank of the batch.

    Returns:
        [pairs, rank] in x's dtype, with zeros beyond the rank of the pair's own adapter.
    """
    z = x.new_zeros(len(plan), rank)
    if not plan.segments:
        picked = _pick(lora_a, plan, rank).to(x.dtype)
        torch.bmm(picked, x.unsqueeze(-1), out=z.unsqueeze(-1))
    for slot, expert, start, stop in plan.segments:
        a = lora_a.factor(slot, expert).to(x.dtype)
        torch.mm(x[start:stop], a.t(), out=z[start:stop, : a.shape[0]])
    return z


def expand_add(y: torch.Tensor, z: torch.Tensor, lora_b: SlotStack, plan: PairPlan) -> None:
    """Compute y[p] += lora_b[slot of p, expert of p] z[p] for each pair p, in place.

    Args:
        y: [pairs, out], any float dtype; may be a strided view of wider rows.
        z: [pairs, rank] from `shrink`, in y's dtype.
        lora_b: [slots, experts or 1, out, rank]. 1 means that all experts share the factor.
        plan: from `make_plan`.
    """
    if not plan.segments:
        picked = _pick(lora_b, plan, z.shape[1]).to(y.dtype)
        y += torch.bmm(picked, z.unsqueeze(-1)).squeeze(-1)
    for slot, expert, start, stop in plan.segments:
        b = lora_b.factor(slot, expert).to(y.dtype)
        y[start:stop].addmm_(z[start:stop, : b.shape[1]], b.t())


def _pick(factor: SlotStack, plan: PairPlan, rank: int) -> torch.Tensor:
    """Copy each pair's factor: [pairs, rank, in] or [pairs, out, rank], 0 beyond its own rank."""
    slots = plan.slot_set()
    if len(slots) == 1 and factor.slot(slots[0]).shape[factor.rank_axis] == rank:
        return factor.factors(slots[0], plan.experts)
    size = list(factor.shape[2:])
    size[factor.rank_axis - 1] = rank
    picked = torch.zeros(len(plan), *size, dtype=factor.dtype)
    for slot in slots:
        pairs = plan.pairs_of(slot)
        own = factor.factors(slot, plan.experts[pairs])
        picked.narrow(factor.rank_axis, 0, own.shape[factor.rank_axis])[pairs] = own
    return picked
