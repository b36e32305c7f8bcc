"""The factors of one projection in their slots, checked once instead of at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import config
from .checks import check_aligned, fail


class Factors:
    """A and B of w13 (two slices, or one that is fused) or of w2, for every adapter slot.

    Attributes:
        lora_a: per slice [slots, experts or 1, max_rank, width].
        lora_b: per slice [slots, experts or 1, out, max_rank].
        ranks: [slices, slots, experts] int32 on the device, 0 where there is no factor. What
            the factors hold past a rank is never used.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        num_experts: int,
    ) -> None:
        """All ranks start at 0.

        Raises:
            TypeError: dtypes or devices differ, or the dtype is none the kernels compute in.
            ValueError: shapes or strides of slices differ, a size but slots and experts is no
                multiple of 8, or rows do not start at multiples of 16 bytes.
        """
        if not 1 <= len(lora_a) == len(lora_b) <= 2:
            fail(ValueError, "factors", f"{len(lora_a)} A and {len(lora_b)} B; one or two of each")
        first_a, first_b = lora_a[0], lora_b[0]
        if first_a.ndim != 4 or first_b.ndim != 4:
            fail(ValueError, "factors", "A and B are [slots, experts or 1, rows, columns]")
        self.dtype, self.device = first_a.dtype, first_a.device
        if self.dtype not in config.DTYPES:
            fail(TypeError, "factors", f"{self.dtype}; the kernels compute in {config.DTYPES}")
        self.num_slots, self.num_experts = first_a.shape[0], num_experts
        self.max_rank, self.width = first_a.shape[2:]
        self.out = first_b.shape[2]
        if self.out % 8:
            fail(ValueError, "lora_b", f"out is {self.out}, not a multiple of 8; pad it")
        for what, tensors, rows, columns in (
            ("lora_a", lora_a, self.max_rank, self.width),
            ("lora_b", lora_b, self.out, self.max_rank),
        ):
            for tensor in tensors:
                self._check(what, tensor, tensors[0], rows, columns)
        self.slices = len(lora_a)
        self.lora_a, self.lora_b = tuple(lora_a), tuple(lora_b)
        self.strides_a, self.strides_b = _strides(first_a), _strides(first_b)
        self.ranks = torch.zeros(
            (self.slices, self.num_slots, num_experts), dtype=torch.int32, device=self.device
        )

    def _check(
        self, what: str, tensor: torch.Tensor, first: torch.Tensor, rows: int, columns: int
    ) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            fail(
                TypeError,
                what,
                f"{tensor.dtype} on {tensor.device}, another factor is "
                f"{self.dtype} on {self.device}",
            )
        shapes = [(self.num_slots, n, rows, columns) for n in (self.num_experts, 1)]
        if tuple(tensor.shape) not in shapes:
            fail(
                ValueError,
                what,
                f"shape {tuple(tensor.shape)}, expected {shapes[0]}, or 1 for "
                "the experts where they share it",
            )
        if tensor.shape != first.shape or tensor.stride() != first.stride():
            fail(ValueError, what, "slices differ in shape or strides")
        check_aligned(what, tensor)

    def set_ranks(self, slot: int, ranks: int | torch.Tensor) -> None:
        """Say which ranks of ``slot`` are in use: one for all, or [slices, experts] on the CPU.

        Raises:
            ValueError: no such slot, a rank below 0 or above the buffers', or a wrong shape.
        """
        if not 0 <= slot < self.num_slots:
            fail(ValueError, "slot", f"{slot}, there are {self.num_slots}")
        host = torch.as_tensor(ranks, dtype=torch.int32)
        if host.ndim and tuple(host.shape) != (self.slices, self.num_experts):
            fail(
                ValueError,
                "ranks",
                f"shape {tuple(host.shape)}, expected one number or "
                f"{(self.slices, self.num_experts)}",
            )
        if int(host.min()) < 0 or int(host.max()) > self.max_rank:
            fail(
                ValueError,
                "ranks",
                f"slot {slot}: {int(host.min())} to {int(host.max())}, the "
                f"buffers hold 0 to {self.max_rank}",
            )
        self.ranks[:, slot] = host.to(self.device)

    def find_ranks(self, slot: int) -> None:
        """Set the ranks of ``slot`` from what its factors hold, without asking the device.

        A rank counts up to the last at which neither A's row nor B's column is all zero, so an
        expert that an adapter left out, or never trained, has none.

        Raises:
            ValueError: no such slot.
        """
        if not 0 <= slot < self.num_slots:
            fail(ValueError, "slot", f"{slot}, there are {self.num_slots}")
        for ranks, a, b in zip(self.ranks, self.lora_a, self.lora_b, strict=True):
            used = _any(a[slot], 2) & _any(b[slot], 1)  # [experts or 1, max_rank]
            numbers = torch.arange(1, self.max_rank + 1, dtype=torch.int32, device=self.device)
            ranks[slot] = (used * numbers).amax(1)


def _any(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Where a row or column has a number other than 0; NaN is one."""
    return (values.amax(dim) != 0) | (values.amin(dim) != 0)


def active_segments(*factors: Factors) -> torch.Tensor:
    """[slots, experts] bool: where any of a layer's projections has a factor. For `route`.

    Copy it into one buffer if a CUDA graph is to read it.
    """
    return torch.stack([one.ranks.gt(0).any(0) for one in factors]).any(0)


def _strides(factor: torch.Tensor) -> tuple[int, int, int]:
    """Strides in groups of 8 elements; a shared factor is the same for every expert."""
    slot, expert, row, _ = (stride // 8 for stride in factor.stride())
    return slot, 0 if factor.shape[1] == 1 else expert, row
