"""Calls of the native kernels with torch's tensors.

Every function here can refuse: it returns False or None, without having changed anything, if the
kernels do not exist on this machine, or if a tensor has a dtype or strides that they do not take.
The caller then does the same with torch.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch

from . import build, pool

DTYPES = {torch.bfloat16: 0, torch.float32: 1}
# Multiplications below which a second thread costs more than it saves (2-core EPYC).
SMALL = 50_000


def address(table: array[int]) -> int:
    return table.buffer_info()[0]


def fit(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels take these tensors: one dtype, and contiguous last axes."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(
        t.dtype == dtype and t.stride(-1) == 1 and t.device.type == "cpu" for t in tensors
    )


class Segments(list[tuple[int, "torch.Tensor | None"]]):
    """The rows of a batch by adapter: (slot, rows), as the plain form takes them.

    The slots ascend, and so do the rows of each. `table` makes what the kernels read of it, once
    for all layers.
    """

    _made: tuple[int, array[int], int, int] | None = None

    def table(self, tokens: int) -> tuple[int, int, int]:
        """Prepare the segments for a batch of ``tokens`` rows.

        Returns:
            The address of a table, which dense.py describes; how many rows the segments have
            together; the highest slot.

        Raises:
            IndexError: a row is not in the batch.
        """
        if self._made is None or self._made[0] != tokens:
            made = array("q")
            for slot, rows in self:
                count = tokens if rows is None else rows.numel()
                if rows is not None and count and int(rows[-1]) >= tokens:
                    raise IndexError(f"adapter slot {slot}: row {int(rows[-1])} of {tokens} rows")
                made.extend((slot, 0 if rows is None else rows.data_ptr(), count, 0))
            self._made = tokens, made, sum(made[2::4]), max(made[::4], default=-1)
        _, made, count, highest = self._made
        return address(made), count, highest


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    segments: Segments,
    scale: float,
    output_slices: Sequence[int],
) -> bool:
    """Do what `kernels.cpu_dense.add_lora` does; return whether it was possible."""
    if not fit(y, x, *lora_a, *lora_b):
        return False
    kernels = build.kernels()
    if kernels is None:
        return False
    parts, start, ranks, work = array("q"), 0, 0, 0
    width, columns = x.shape[1], y.shape[1]
    for a, b, wide in zip(lora_a, lora_b, output_slices, strict=True):
        rank, inner = a.shape[-2:]
        own = max(0, min(wide, b.shape[-2], columns - start))
        if inner > width or b.shape[-1] != rank:
            return False
        strides = a.stride(), b.stride()
        parts.extend((a.data_ptr(), strides[0][0], strides[0][-2], inner, rank))
        parts.extend((b.data_ptr(), strides[1][0], strides[1][-2], own, start))
        start, ranks, work = start + wide, ranks + rank, work + rank * (inner + own)
    place, count, highest = segments.table(x.shape[0])
    if count == 0:
        return True
    if y.shape[0] != x.shape[0] or any(t.shape[0] <= highest for t in (*lora_a, *lora_b)):
        return False
    spans, slices = (len(segments), place), (len(lora_a), address(parts))
    run(kernels, y, x, spans, slices, count, ranks, scale, count * work < SMALL)
    return True


def run(
    kernels: build.Kernels,
    y: torch.Tensor,
    x: torch.Tensor,
    segments: tuple[int, int],
    slices: tuple[int, int],
    rows: int,
    ranks: int,
    scale: float,
    one_thread: bool,
    factors: tuple[int, int] = (0, 0),
) -> None:
    """Call the kernel of `dense.py`, which says what is in its table.

    Args:
        kernels: the compiled ones.
        y: [rows, out of all slices].
        x: [rows, in].
        segments: their number and their address.
        slices: their number and their address.
        rows: of all segments.
        ranks: sum of the slices' ranks.
        scale: of the product.
        one_thread: the work is too small for more.
        factors: address of the slots' own factors, number of slots; 0: the slices have them.
    """
    z = torch.empty(rows * ranks, dtype=torch.float32)
    given = struct.unpack("<i", struct.pack("<f", scale))[0]
    table = array("q", bytes(24 * 8))
    table.extend((DTYPES[y.dtype], *segments, *slices))
    table.extend((x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), z.data_ptr(), ranks))
    table.extend((given, *factors))
    pool.run(kernels.add_lora, address(table), one_thread)
