"""Factors of the adapters in a layer's slots, each with its adapter's own rank.

vLLM allocates [slots, experts, max_lora_rank, in] for a factor, whether adapters are there or not,
and copies an adapter into it. A `SlotStack` takes the place of such a stack on a CPU. It looks like
one to vLLM's LoRA layer, but a slot is the tensor that loading has staged, and not a copy of it. So
an adapter takes the memory of its own rank, once, while it is loaded, and an empty slot takes none.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from .writable_slots import WritableSlots


class SlotStack(WritableSlots):
    """One factor (lora_a or lora_b) of a layer's experts, for all slots.

    Attributes:
        version: another number after each change of a slot.

    Args:
        shape: of vLLM's stack: [slots, experts or 1, max rank, in] of lora_a, [slots, experts or 1,
            out, max rank] of lora_b. With 1, all experts share the factor.
        dtype: of the factors.
        rank_axis: where the rank is in a slot: 1 for lora_a, 2 for lora_b.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, rank_axis: int) -> None:
        self.shape, self.dtype, self.rank_axis = torch.Size(shape), dtype, rank_axis
        self.device = torch.device("cpu")
        self._empty = torch.zeros(1, dtype=dtype).expand(self.shape[1:])
        self._slots: dict[int, torch.Tensor] = {}
        self._table: array[int] | None = None  # both are made anew after a change of a slot
        self._ranks: array[int] | None = None
        self.version = 0

    @classmethod
    def of(cls, stack: torch.Tensor, ranks: Sequence[int], rank_axis: int) -> SlotStack:
        """Make one of a dense stack, whose slots use only the first ``ranks``; 0: an empty slot."""
        made = cls(stack.shape, stack.dtype, rank_axis)
        for slot, rank in enumerate(ranks):
            if rank:
                made._put(slot, stack[slot].narrow(rank_axis, 0, rank).clone())
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the slots. An expanded axis counts once."""
        return sum(nbytes(one) for one in self._slots.values())

    @property
    def highest_rank(self) -> int:
        """The highest rank of all slots; 0 if all are empty."""
        return max(self.ranks())

    def ranks(self) -> array[int]:
        """Return the rank of each slot; 0 if it is empty. Do not change it."""
        if self._ranks is None:
            sizes = {slot: one.shape[self.rank_axis] for slot, one in self._slots.items()}
            self._ranks = array("q", [sizes.get(slot, 0) for slot in range(self.shape[0])])
        return self._ranks

    def empty(self, slot: int) -> None:
        """Forget the factor of a slot."""
        self._put(slot, None)

    def slot(self, slot: int) -> torch.Tensor:
        """Return [experts or 1, rank, in] or [experts or 1, out, rank]; an empty slot is all 0."""
        return self._slots.get(slot, self._empty)

    def factor(self, slot: int, expert: int) -> torch.Tensor:
        """Return the factor of one expert: [rank, in] or [out, rank]."""
        return self.slot(slot)[0 if self.shape[1] == 1 else expert]

    def factors(self, slot: int, experts: torch.Tensor) -> torch.Tensor:
        """Copy the factors of ``experts``, [n] int64: [n, rank, in] or [n, out, rank]."""
        one = self.slot(slot)
        if self.shape[1] == 1:
            return one.expand(experts.numel(), -1, -1)
        return one.index_select(0, experts)

    def write(self, slot: int, factor: torch.Tensor) -> None:
        """Put a factor into a slot. It is not copied unless it does not fit as it is.

        Args:
            slot: from 0.
            factor: [experts or 1, rank, in] or [experts or 1, out, rank]. If it has fewer rows or
                columns than the stack, zeros are appended.
        """
        whole = list(self.shape[1:])
        whole[self.rank_axis] = factor.shape[self.rank_axis]
        factor = factor.to(self.dtype)
        if factor.shape[0] == 1 or factor.stride(0) == 0:  # the same for all experts: one of them
            whole[0], factor = 1, factor[:1]
        if list(factor.shape) != whole:
            padded = factor.new_zeros(whole)
            padded[tuple(slice(0, size) for size in factor.shape)] = factor
            factor = padded
        if factor.stride(-1) != 1:
            factor = factor.contiguous()
        self._put(slot, factor.expand(self.shape[1], -1, -1))

    def set_rank(self, slot: int, rank: int) -> None:
        """Append zeros to the rank of a slot, up to ``rank``; other factors of the slot have it."""
        factor = self.slot(slot)
        missing = rank - factor.shape[self.rank_axis]
        if missing > 0:
            shared = factor.stride(0) == 0
            pad = (0, missing) if self.rank_axis == 2 else (0, 0, 0, missing)
            wide = torch.nn.functional.pad(factor[:1] if shared else factor, pad)
            self._put(slot, wide.expand(self.shape[1], -1, -1))

    def _put(self, slot: int, factor: torch.Tensor | None) -> None:
        self._table = self._ranks = None
        self.version += 1
        if factor is None:
            self._slots.pop(slot, None)
        else:
            self._slots[slot] = factor

    def table(self) -> int:
        """Return the address of 3 int64 for each slot: address, stride of experts, of rows.

        It is valid until a slot changes. The strides count elements. An empty slot has zeros.
        """
        if self._table is None:
            table = array("q", bytes(8 * 3 * self.shape[0]))
            for slot, one in self._slots.items():
                experts = one.stride(0) if one.shape[0] > 1 else 0
                table[3 * slot : 3 * slot + 3] = array(
                    "q", (one.data_ptr(), experts, one.stride(1))
                )
            self._table = table
        return self._table.buffer_info()[0]


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor. An expanded axis counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride else 1
    return count * tensor.element_size()
