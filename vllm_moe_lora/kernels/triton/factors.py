"""The LoRA factors of one projection, as the Triton kernels take them.

`Factors` holds vLLM's slot buffers, or the `PagedStack`s in their place, without copying them. It
checks their shapes and strides once, so that a kernel launch does not have to. It also keeps the
rank in use for each slot and expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..paged_stack import PAGE_RANKS, PagedStack
from . import config
from .checks import check_aligned, fail


class Factors:
    """lora_a and lora_b of w13 or w2, for all adapter slots of one layer.

    w13 has two slices (gate and up) if these have factors of their own, and one if they are fused.
    w2 has one slice.

    Attributes:
        lora_a: one tensor or `PagedStack` per slice, [slots, experts or 1, max_rank, width].
        lora_b: one of the same kind per slice, [slots, experts or 1, out, max_rank].
        page: the ranks of a page if the factors are in pages, 0 if they are tensors.
        ranks: [slices, slots, experts] int32 on the device: the rank in use, 0 for no factor. The
            kernels do not use numbers of the factors beyond it.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor | PagedStack],
        lora_b: Sequence[torch.Tensor | PagedStack],
        num_experts: int,
    ) -> None:
        """All ranks are 0 at first; see `set_ranks` and `find_ranks`.

        Args:
            lora_a, lora_b: as the attributes. They are kept, not copied.
            num_experts: experts on this device.

        Raises:
            TypeError: dtypes or devices differ, the kernels cannot compute in the dtype, or some
                factors are in pages and others are not.
            ValueError: the slices differ in shape or strides; max_rank, width or out is not a
                multiple of 8; or a row does not start at a multiple of 16 bytes.
        """
        if not 1 <= len(lora_a) == len(lora_b) <= 2:
            fail(
                ValueError,
                "factors",
                f"are {len(lora_a)} lora_a and {len(lora_b)} lora_b, expected one or two of each",
            )
        first_a, first_b = lora_a[0], lora_b[0]
        if first_a.ndim != 4 or first_b.ndim != 4:
            fail(ValueError, "factors", "must be tensors [slots, experts or 1, rows, columns]")
        if isinstance(first_a, PagedStack) != isinstance(first_b, PagedStack):
            fail(TypeError, "factors", "are in pages for one of lora_a and lora_b only")
        self.dtype, self.device = first_a.dtype, first_a.device
        if self.dtype not in config.DTYPES:
            fail(TypeError, "factors", f"are {self.dtype}, expected one of {config.DTYPES}")
        self.num_slots, self.num_experts = first_a.shape[0], num_experts
        self.max_rank, self.width = first_a.shape[2:]
        self.out = first_b.shape[2]
        if self.out % 8:
            fail(ValueError, "lora_b", f"has out = {self.out}, not a multiple of 8; pad it")
        if self.max_rank % 8:
            fail(ValueError, "max_rank", f"is {self.max_rank}, not a multiple of 8; raise it")
        for what, tensors, rows, columns in (
            ("lora_a", lora_a, self.max_rank, self.width),
            ("lora_b", lora_b, self.out, self.max_rank),
        ):
            for tensor in tensors:
                self._check(what, tensor, tensors[0], rows, columns)
        self.slices = len(lora_a)
        self.lora_a, self.lora_b = tuple(lora_a), tuple(lora_b)
        self.page = PAGE_RANKS if isinstance(first_a, PagedStack) else 0
        self.strides_a, self.strides_b = _strides(first_a), _strides(first_b)
        self.ranks = torch.zeros(
            (self.slices, self.num_slots, num_experts), dtype=torch.int32, device=self.device
        )

    def _check(
        self,
        what: str,
        tensor: torch.Tensor | PagedStack,
        first: torch.Tensor | PagedStack,
        rows: int,
        columns: int,
    ) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            fail(
                TypeError,
                what,
                f"is {tensor.dtype} on {tensor.device}, but another factor is "
                f"{self.dtype} on {self.device}",
            )
        shapes = [(self.num_slots, n, rows, columns) for n in (self.num_experts, 1)]
        if tuple(tensor.shape) not in shapes:
            fail(
                ValueError,
                what,
                f"has shape {tuple(tensor.shape)}, expected {shapes[0]}, or {shapes[1]} if all "
                "experts share the factor",
            )
        if isinstance(tensor, PagedStack):
            if not isinstance(first, PagedStack) or tensor.arena is not first.arena:
                fail(TypeError, what, "has slices that do not share their pages")
            return check_aligned(what, tensor.arena.memory)
        if isinstance(first, PagedStack):
            fail(TypeError, what, "is a tensor, but other factors are in pages")
        if tensor.shape != first.shape or tensor.stride() != first.stride():
            fail(ValueError, what, "has slices that differ in shape or strides")
        return check_aligned(what, tensor)

    def pointers(self, side: Sequence[torch.Tensor | PagedStack]) -> tuple[torch.Tensor, ...]:
        """Return the kernels' arguments for ``lora_a`` or ``lora_b``: two tensors, two page tables.

        The kernels do not read the page tables of tensors, but need something in their place.
        """
        both = side[0], side[-1]
        memory = [one.arena.memory if isinstance(one, PagedStack) else one for one in both]
        tables = [one.table if isinstance(one, PagedStack) else self.ranks for one in both]
        return *memory, *tables

    def set_ranks(self, slot: int, ranks: int | torch.Tensor) -> None:
        """Set the ranks of the adapter in ``slot``.

        Args:
            slot: from 0.
            ranks: one rank for all experts, or [slices, experts] int on the CPU.

        Raises:
            ValueError: the slot does not exist, a rank is below 0 or above ``max_rank``, or
                ``ranks`` has the wrong shape.
        """
        if not 0 <= slot < self.num_slots:
            fail(ValueError, "slot", f"is {slot}, but there are {self.num_slots}, from 0")
        host = torch.as_tensor(ranks, dtype=torch.int32)
        if host.ndim and tuple(host.shape) != (self.slices, self.num_experts):
            fail(
                ValueError,
                "ranks",
                f"has shape {tuple(host.shape)}, expected one number or "
                f"{(self.slices, self.num_experts)}",
            )
        if int(host.min()) < 0 or int(host.max()) > self.max_rank:
            fail(
                ValueError,
                "ranks",
                f"of slot {slot} are {int(host.min())} to {int(host.max())}, but the buffers hold "
                f"0 to {self.max_rank}",
            )
        self.ranks[:, slot] = host.to(self.device)

    def find_ranks(self, slot: int) -> None:
        """Set the ranks of the adapter in ``slot`` from the numbers in the buffers.

        The rank of an expert is the number of the last row of lora_a and column of lora_b, counted
        from 1, that are both not all zero. An expert without LoRA thus gets rank 0. The ranks are
        computed on the device, and the call does not wait for it.

        Raises:
            ValueError: the slot does not exist.
        """
        if not 0 <= slot < self.num_slots:
            fail(ValueError, "slot", f"is {slot}, but there are {self.num_slots}, from 0")
        for ranks, a, b in zip(self.ranks, self.lora_a, self.lora_b, strict=True):
            used = _used(a, slot, 2) & _used(b, slot, 1)  # [experts or 1, max_rank]
            numbers = torch.arange(1, self.max_rank + 1, dtype=torch.int32, device=self.device)
            ranks[slot] = (used * numbers).amax(1)


def _used(factor: torch.Tensor | PagedStack, slot: int, dim: int) -> torch.Tensor:
    """Return, along ``dim`` of a slot, whether any number is not 0. NaN is not 0."""
    if isinstance(factor, PagedStack):
        return factor.used[slot]
    values = factor[slot]
    return (values.amax(dim) != 0) | (values.amin(dim) != 0)


def active_segments(*factors: Factors) -> torch.Tensor:
    """Return [slots, experts] bool: whether any projection of the layer has a factor there.

    Pass it to `route`, which then leaves out pairs without LoRA. If a CUDA graph reads it, copy it
    into a buffer that stays the same.
    """
    return torch.stack([one.ranks.gt(0).any(0) for one in factors]).any(0)


def _strides(factor: torch.Tensor | PagedStack) -> tuple[int, int, int]:
    """Return the strides of (slot, expert, row) in groups of 8 elements.

    If all experts share the factor, the stride of the expert is 0. If the factor is in pages, the
    strides of slot and expert are those of the page table, in entries.
    """
    if isinstance(factor, PagedStack):
        slot, expert, _ = factor.table.stride()
        row = factor.arena.memory.stride(1) // 8
    else:
        slot, expert, row, _ = (stride // 8 for stride in factor.stride())
    return slot, 0 if factor.shape[1] == 1 else expert, row
