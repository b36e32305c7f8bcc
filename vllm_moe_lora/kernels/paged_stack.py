"""Factors of the adapters in a layer's slots, in pages, as our Triton kernels read them on a GPU.

vLLM allocates [slots, experts, max_lora_rank, in] for a factor, whether adapters are there or not.
A `PagedStack` takes the place of such a stack. Its numbers are in an `Arena`, memory of a fixed
size that all slots share. A page has `PAGE_RANKS` ranks of one expert. An adapter takes the pages
of its own rank while it is in a slot, and an empty slot takes none. A table says which pages belong
to which slot and expert. Memory and table stay where they are, so a captured CUDA graph reads them.

layers/gpu/pages.py puts a `PagedStack` into vLLM's LoRA layer, and says how many pages there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .writable_slots import WritableSlots

# The fewest ranks that an adapter usually has. Larger pages would waste memory for rank 8; the
# kernels load one page number per rank in any case. It must be a multiple of 8, because the expand
# reads whole groups of 8 ranks.
PAGE_RANKS = 8


def pages_for(rank: int) -> int:
    """Return how many pages hold ``rank`` ranks of one expert."""
    return -(-rank // PAGE_RANKS)


class Arena:
    """The pages of lora_a or lora_b of one projection of a layer, and which of them are free.

    Attributes:
        memory: [pages, PAGE_RANKS, width]. A row is a row of lora_a, or a column of lora_b.
        table: [slots, slices, experts or 1, pages for max_rank] int32, the page of each factor's
            ranks, -1 for none. Slices are gate and up, if they have factors of their own.

    Args:
        shape: of vLLM's stack: [slots, experts or 1, max rank, in] of lora_a, [slots, experts or 1,
            out, max rank] of lora_b. With 1, all experts share the factor.
        slices: stacks that share the arena.
        rank_axis: where the rank is in a slot: 1 for lora_a, 2 for lora_b.
        dtype, device: of the factors.
        pages: how many there are; None for as many as full slots need.
    """

    def __init__(
        self,
        shape: Sequence[int],
        slices: int,
        rank_axis: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pages: int | None = None,
    ) -> None:
        self.shape, self.rank_axis = torch.Size(shape), rank_axis
        slots, experts = self.shape[:2]
        self.max_rank, width = self.shape[1 + rank_axis], self.shape[4 - rank_axis]
        each = pages_for(self.max_rank)
        if pages is None:
            pages = slots * slices * experts * each
        self.memory = torch.empty((pages, PAGE_RANKS, width), dtype=dtype, device=device)
        self.table = torch.full(
            (slots, slices, experts, each), -1, dtype=torch.int32, device=device
        )
        self._free = list(range(pages - 1, -1, -1))
        self._taken: dict[tuple[int, int], list[int]] = {}

    @property
    def free_pages(self) -> int:
        """How many pages no slot has."""
        return len(self._free)

    def stacks(self) -> tuple[PagedStack, ...]:
        """Return the stacks of all slices."""
        return tuple(PagedStack(self, index) for index in range(self.table.shape[1]))

    def take(self, slot: int, index: int, count: int) -> list[int]:
        """Give ``count`` pages to a slot of one slice, which has none.

        Raises:
            MemoryError: there are not so many.
        """
        if count > len(self._free):
            raise MemoryError(
                f"MoE LoRA: a slot needs {count} pages of {PAGE_RANKS} ranks for one factor, but "
                f"{len(self._free)} of {self.memory.shape[0]} are free. Raise VLLM_MOE_LORA_MEMORY."
            )
        first = len(self._free) - count
        pages = self._free[first:]
        del self._free[first:]
        self._taken[slot, index] = pages
        return pages

    def give_back(self, slot: int, index: int) -> None:
        """Take all pages of a slot of one slice back."""
        self._free += self._taken.pop((slot, index), ())


class PagedStack(WritableSlots):
    """One factor (lora_a or lora_b) of a layer's experts, for all slots.

    To vLLM's LoRA layer it looks like the tensor that it replaces.

    Attributes:
        used: [slots, experts or 1, max_rank] bool, whether a rank has any number that is not 0.
    """

    ndim = 4

    def __init__(self, arena: Arena, index: int) -> None:
        """Make a stack without adapters.

        Args:
            arena: has the pages.
            index: of the slice.
        """
        self.arena, self.index, self.shape = arena, index, arena.shape
        self.dtype, self.device = arena.memory.dtype, arena.memory.device
        self.table = arena.table[:, index]
        self.used = torch.zeros(
            (*self.shape[:2], arena.max_rank), dtype=torch.bool, device=self.device
        )
        self._empty = torch.zeros(1, dtype=self.dtype, device=self.device).expand(self.shape[1:])

    def data_ptr(self) -> int:
        """Return an address that no other stack has: that of the page numbers."""
        return self.table.data_ptr()

    def expand(self, *sizes: int) -> PagedStack:
        """Return the stack itself. vLLM expands one that all experts share; the kernels do not."""
        return self

    @property
    def taken(self) -> set[int]:
        """The slots that have pages."""
        return {slot for slot, index in self.arena._taken if index == self.index}

    def empty(self, slot: int) -> None:
        """Give the pages of a slot back."""
        self.arena.give_back(slot, self.index)
        self.table[slot] = -1
        self.used[slot] = False

    def slot(self, slot: int) -> torch.Tensor:
        """Return a copy of a slot, as vLLM's stack has it; zeros that take no memory if empty."""
        if slot not in self.taken:
            return self._empty
        pages = self.table[slot].long()
        there = (pages >= 0)[..., None, None]
        rows = torch.where(there, self.arena.memory[pages.clamp(min=0)], 0)
        whole = rows.flatten(1, 2)[:, : self.arena.max_rank]
        return whole if self.arena.rank_axis == 1 else whole.transpose(1, 2)

    def write(self, slot: int, factor: torch.Tensor) -> None:
        """Put a factor into a slot, in place of what is there. One that is all 0 takes no pages.

        Args:
            slot: from 0.
            factor: [experts or 1, rank, in] or [experts or 1, out, rank]. If it has fewer rows or
                columns than the stack, zeros are appended.

        Raises:
            MemoryError: there are not enough free pages. The slot is then empty.
        """
        self.empty(slot)
        if factor.shape[0] == 1 or factor.stride(0) == 0:  # the same for all experts: one of them
            factor = factor[:1]
            if not factor.any():  # a projection that the adapter leaves out
                return
        rows = factor.to(self.device, non_blocking=True)
        if self.arena.rank_axis == 2:
            rows = rows.transpose(1, 2)
        experts, rank, width = rows.shape
        each = pages_for(rank)
        numbers = self.arena.take(slot, self.index, experts * each)
        memory = self.arena.memory
        whole = memory.new_zeros((experts, each * PAGE_RANKS, memory.shape[2]))
        whole[:, :rank, :width] = rows
        pages = torch.tensor(numbers, device=self.device)
        memory[pages] = whole.view(-1, PAGE_RANKS, memory.shape[2])
        self.table[slot, :, :each] = pages.view(experts, each).int()
        # Not a comparison, which would make a tensor of the factor's size.
        used = (whole.amax(2) != 0) | (whole.amin(2) != 0)
        self.used[slot, :, :rank] = used[:, :rank]
