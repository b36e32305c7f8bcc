"""The token-expert pairs of a batch, and LoRA on them before and after the base experts."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import torch

from ..slot_stack import SlotStack
from . import build, pool
from .calls import DTYPES, SMALL, Prepared, address, fit

Segment = tuple[int, int, int, int]  # slot, expert, first pair, one past the last pair

_HALF, _SEGMENT = 40, 4  # of the table, and int64 a segment: see routed.py


class Pairs:
    """All pairs of the tokens with an adapter, in token order: pair i * top_k + k of row i.

    Attributes:
        all_tokens: whether each token of the batch has an adapter.
        ids: [pairs, 1] int32, the local expert of each pair; 0 if it is on another device.
    """

    def __init__(self, kernels: build.Kernels, table: array[int], keep: Sequence[object]) -> None:
        self._kernels, self._table, self._keep = kernels, table, keep
        ids = keep[1]
        assert isinstance(ids, torch.Tensor)
        self.all_tokens = table[35] == table[24]
        self.ids: torch.Tensor = ids if self.all_tokens else ids[: table[35] * table[29]]

    @property
    def rows(self) -> torch.Tensor:
        """[n] int64, the rows of the batch whose tokens have an adapter, ascending."""
        scratch = self._keep[0]
        assert isinstance(scratch, torch.Tensor)
        return scratch[: self._table[35]]

    def __len__(self) -> int:
        return self._table[35] * self._table[29]

    def sorted(self) -> tuple[torch.Tensor, list[Segment]]:
        """Return the pairs in the order of their experts, then slots; without foreign experts'.

        Returns:
            [n] int64, the number of each pair, and the ranges with the same slot and expert.
        """
        scratch = self._keep[0]
        assert isinstance(scratch, torch.Tensor)
        tokens, top_k = self._table[24], self._table[29]
        count, number = self._table[36], self._table[37]
        first = tokens * (1 + 2 * top_k)
        found = scratch[first : first + number * _SEGMENT].tolist()
        segments = [
            (slot, expert, start, start + size)
            for slot, expert, start, size in zip(
                *(found[i::_SEGMENT] for i in range(4)), strict=True
            )
        ]
        return scratch[tokens : tokens + count], segments

    def _fit(self, wide: torch.Tensor, x: torch.Tensor, factors: Sequence[SlotStack]) -> bool:
        """Return whether the kernels take these tensors."""
        tokens, slots = self._table[24], self._table[32]
        rows = wide.shape[0] == len(self) and x.shape[0] == tokens and wide.shape[1] >= x.shape[1]
        return (
            rows
            and fit(wide, x)
            and all(f.dtype == x.dtype and f.shape[0] >= slots for f in factors)
        )

    def _run(
        self,
        kernel: int,
        x: torch.Tensor,
        wide: torch.Tensor,
        columns: Sequence[int],
        factors: Sequence[SlotStack],
        hidden: int,
        z: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> None:
        table, parts = self._table, array("q", [factor.table() for factor in factors])
        places = array("q", columns)
        del table[_HALF:]
        table[0] = table[8] = table[16] = 0
        table.extend((DTYPES[wide.dtype], x.data_ptr(), x.stride(0), hidden))
        table.extend((wide.data_ptr(), wide.stride(0), address(places)))
        table.extend((len(factors), address(parts)))
        table.extend((0, 0) if z is None else (z.data_ptr(), z.shape[1]))
        table.extend((0, 0) if weights is None else (weights.data_ptr(), weights.stride(0)))
        table.extend((x.data_ptr(), x.stride(0), wide.shape[1], torch.get_num_threads()))
        work = len(self) * hidden * factors[0].highest_rank
        pool.run(kernel, address(table), work < SMALL)

    def before(
        self,
        hidden_states: torch.Tensor,
        wide: torch.Tensor,
        columns: Sequence[int],
        lora_a: Sequence[SlotStack],
    ) -> bool:
        """Fill the rows that the base experts get; return whether it was possible.

        Args:
            hidden_states: [tokens, hidden] of the whole batch.
            wide: [pairs, hidden and more], is overwritten: hidden states, then lora_a x of each
                slice in the columns of the pair's slot, then zeros.
            columns: the first column of each slot, counted from ``hidden``.
            lora_a: one stack a slice, [slots, experts or 1, rank, hidden].
        """
        if not self._fit(wide, hidden_states, lora_a):
            return False
        hidden = hidden_states.shape[1]
        if any(a.shape[-1] != hidden for a in lora_a):
            return False
        x, before = hidden_states, self._kernels.before
        self._run(before, x, wide, columns, lora_a, hidden, None, None)
        return True

    def after(
        self,
        wide: torch.Tensor,
        output: torch.Tensor,
        columns: Sequence[int],
        lora_b: SlotStack,
        rank: int,
        topk_weights: torch.Tensor | None,
    ) -> bool:
        """Write the output of the tokens with an adapter; return whether it was possible.

        Args:
            wide: [pairs, hidden and more], what the base experts gave: w2 h, then lora_a h of each
                slot in its columns.
            output: [tokens, hidden] of the whole batch. Rows of other tokens stay as they are.
            columns: the first column of each slot, counted from ``hidden``.
            lora_b: [slots, experts or 1, hidden, rank].
            rank: the highest rank of the batch's adapters.
            topk_weights: [tokens, top_k] of the whole batch; None if all weights are 1.
        """
        if not self._fit(wide, output, (lora_b,)):
            return False
        hidden = output.shape[1]
        if lora_b.shape[2] != hidden:
            return False
        weights = topk_weights
        if weights is not None and (weights.dtype != torch.float32 or weights.stride(-1) != 1):
            weights = weights.to(torch.float32).contiguous()
        z = torch.empty(len(self), rank, dtype=torch.float32)
        after = self._kernels.after
        self._run(after, output, wide, columns, (lora_b,), hidden, z, weights)
        return True


@functools.cache
def _scratch_size(tokens: int, top_k: int, experts: int, slots: int) -> int:
    return tokens * (1 + (2 + _SEGMENT) * top_k) + max(experts, slots) + 1


def make_pairs(
    token_slots: torch.Tensor, ranks: torch.Tensor, topk_ids: torch.Tensor, num_experts: int
) -> Pairs | None:
    """Collect the token-expert pairs that have an adapter.

    Args:
        token_slots: [tokens] int64, the adapter slot of each token; -1 for a token without one.
        ranks: [slots] int64, the rank of the adapter in each slot. A token whose slot has rank 0,
            or is not among them, counts as one without an adapter.
        topk_ids: [tokens, top_k] int32 or int64, local expert ids. Ids outside [0, num_experts)
            belong to experts on other devices.
        num_experts: the number of experts on this device.

    Returns:
        The pairs; there may be none. None if native kernels cannot be used.
    """
    kernels = build.kernels()
    if kernels is None or topk_ids.dtype not in (torch.int32, torch.int64):
        return None
    for tensor in (token_slots, ranks, topk_ids):
        if tensor.device.type != "cpu" or tensor.stride(-1) != 1:
            return None
    if token_slots.dtype != torch.int64 or ranks.dtype != torch.int64:
        return None
    tokens, top_k = topk_ids.shape
    if token_slots.numel() < tokens:
        return None
    slots = ranks.numel()
    scratch = torch.empty(_scratch_size(tokens, top_k, num_experts, slots), dtype=torch.int64)
    ids = torch.empty(tokens * top_k, 1, dtype=torch.int32)
    table = array("q", bytes(24 * 8))
    table.extend((tokens, token_slots.data_ptr(), topk_ids.data_ptr(), topk_ids.element_size()))
    table.extend((topk_ids.stride(0), top_k, num_experts, ranks.data_ptr(), slots))
    table.extend((scratch.data_ptr(), ids.data_ptr(), 0, 0, 0, 0, 0))
    pool.run(kernels.plan, address(table), True)
    return Pairs(kernels, table, (scratch, ids, token_slots, ranks, topk_ids))


def merge_experts(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Return (expert, first pair, one past the last pair), whatever the slots."""
    merged: list[tuple[int, int, int]] = []
    for _, expert, start, stop in segments:
        if merged and merged[-1][0] == expert:
            merged[-1] = expert, merged[-1][1], stop
        else:
            merged.append((expert, start, stop))
    return merged


def dense_segments(segments: Sequence[Segment], slots: int) -> array[int]:
    """Return ``segments`` as `ExpertLora` takes them; ``slots``: of the stacks."""
    made = array("q")
    for slot, expert, start, stop in segments:
        # The kernel for dense layers does the work. There a segment's slot is this number.
        made.extend((expert * slots + slot, 0, stop - start, start))
    return made


class ExpertLora(Prepared):
    """LoRA of one projection of routed experts, on pairs in the order of `Pairs.sorted`."""

    _factors: tuple[Sequence[SlotStack], Sequence[SlotStack]] | None = None
    _versions: list[int] | None = None

    def _prepare(self, lora_a: Sequence[SlotStack], lora_b: Sequence[SlotStack]) -> None:
        self._table = array("q")
        kernels, dtype, slots = build.kernels(), lora_a[0].dtype, lora_a[0].shape[0]
        if kernels is None or dtype not in DTYPES:
            return
        parts, places = array("q"), array("q")
        first, highest, work, width = 0, 0, 0, 0
        for a, b in zip(lora_a, lora_b, strict=True):
            inner, out, ranks = a.shape[3], b.shape[2], a.ranks()
            if a.dtype != dtype or b.dtype != dtype or b.ranks() != ranks:
                return
            if a.shape[0] != slots or b.shape[0] != slots:
                return
            rank = max(ranks)
            parts.extend((0, 0, 0, inner, rank, 0, 0, 0, out, first))
            places.extend((a.table(), b.table(), address(ranks)))
            first, highest, work = first + out, highest + rank, work + rank * (inner + out)
            width = max(width, inner)
        self._width, self._columns, self._places = width, first, places
        by_slot = address(places), slots
        self._prepare_call(kernels, dtype, len(lora_a), parts, highest, work, factors=by_slot)

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a: Sequence[SlotStack],
        lora_b: Sequence[SlotStack],
        segments: array[int],
    ) -> bool:
        """Compute y[pair, slice i] += lora_b[i] (lora_a[i] x[pair]).

        Args:
            y: [pairs, out of all slices], in the order of `Pairs.sorted`.
            x: [pairs, in], in the same order.
            lora_a: one stack a slice, [slots, experts or 1, rank, in].
            lora_b: one stack a slice, [slots, experts or 1, out, rank].
            segments: from `dense_segments`.

        Returns:
            Whether it was possible. If not, y is as it was.
        """
        versions, known = [stack.version for stack in (*lora_a, *lora_b)], self._factors
        same = known is not None and known[0] is lora_a and known[1] is lora_b
        if not same or versions != self._versions:
            self._factors, self._versions = (lora_a, lora_b), versions
            self._prepare(lora_a, lora_b)
        if not self._table or y.dtype != self._dtype or not fit(y, x):
            return False
        rows, width = x.shape
        if y.shape[0] != rows or width < self._width or y.shape[1] < self._columns:
            return False
        self._call(y, x, len(segments) // 4, address(segments), rows)
        return True
