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
KEPT = 4096  # numbers of fp32 scratch that a layer keeps for its next call


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


class DenseLora:
    """The call of the dense kernel for one layer.

    A step of decoding calls it once for each layer, between products that read tens of megabytes
    of weights. So whatever Python code and objects a call touches come from main memory: they cost
    more than the kernel itself. What is the same in each call is looked up once.
    """

    _factors: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None

    def _prepare(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        scale: float,
        columns: int,
    ) -> None:
        self._factors, self._columns, self._table = (lora_a, lora_b), columns, array("q")
        kernels = build.kernels()
        if kernels is None or not fit(*lora_a, *lora_b):
            return
        parts, start, ranks, work, width = array("q"), 0, 0, 0, 0
        for a, b, wide in zip(lora_a, lora_b, output_slices, strict=True):
            rank, inner = a.shape[-2:]
            own = max(0, min(wide, b.shape[-2], columns - start))
            if b.shape[-1] != rank:
                return
            strides = a.stride(), b.stride()
            parts.extend((a.data_ptr(), strides[0][0], strides[0][-2], inner, rank))
            parts.extend((b.data_ptr(), strides[1][0], strides[1][-2], own, start))
            start, ranks, work = start + wide, ranks + rank, work + rank * (inner + own)
            width = max(width, inner)
        self._kernel, self._dtype = kernels.add_lora, lora_a[0].dtype
        self._parts, self._width = parts, width
        self._slots = min(t.shape[0] for t in (*lora_a, *lora_b))
        self._ranks, self._work = ranks, work
        self._z = torch.empty(0, dtype=torch.float32)
        slices = len(lora_a), address(parts)
        self._table = _table(self._dtype, (0, 0), slices, (0,) * 5, ranks, scale)
        self._place = address(self._table)

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        segments: Segments,
        scale: float,
        output_slices: Sequence[int],
    ) -> bool:
        """Do what `kernels.cpu_dense.add_lora` does; return whether it was possible.

        As long as ``lora_a`` and ``lora_b`` are the same objects, the other arguments of the layer
        must be the same, and their tensors must stay where they are.
        """
        y_shape, x_shape = y.shape, x.shape
        if len(y_shape) != 2 or len(x_shape) != 2:
            return False
        tokens, columns = y_shape
        known = self._factors
        if (
            not known
            or known[0] is not lora_a
            or known[1] is not lora_b
            or self._columns != columns
        ):
            self._prepare(lora_a, lora_b, output_slices, scale, columns)
        table, dtype = self._table, y.dtype
        if not table or dtype != self._dtype or x.dtype != dtype or y.device.type != "cpu":
            return False
        y_strides, x_strides = y.stride(), x.stride()
        if y_strides[1] != 1 or x_strides[1] != 1 or x_shape[1] < self._width:
            return False
        place, rows, highest = segments.table(x_shape[0])
        if rows == 0:
            return True
        if x_shape[0] != tokens or highest >= self._slots:
            return False
        size = rows * self._ranks
        z = self._z
        if z.numel() < size:
            z = torch.empty(size, dtype=torch.float32)
            if size <= KEPT:
                self._z = z
        table[0] = table[8] = table[16] = 0
        table[25], table[26] = len(segments), place
        table[29], table[30], table[31] = x.data_ptr(), x_strides[0], y.data_ptr()
        table[32], table[33] = y_strides[0], z.data_ptr()
        pool.run(self._kernel, self._place, rows * self._work < SMALL)
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
    places = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), z.data_ptr()
    table = _table(y.dtype, segments, slices, places, ranks, scale, factors)
    pool.run(kernels.add_lora, address(table), one_thread)


def _table(
    dtype: torch.dtype,
    segments: tuple[int, int],
    slices: tuple[int, int],
    places: tuple[int, ...],
    ranks: int,
    scale: float,
    factors: tuple[int, int] = (0, 0),
) -> array[int]:
    """Return the table of the kernel of `dense.py`; see `run`.

    ``places``: address and stride of x, of y, and the address of z.
    """
    given = struct.unpack("<i", struct.pack("<f", scale))[0]
    table = array("q", bytes(24 * 8))
    table.extend((DTYPES[dtype], *segments, *slices, *places, ranks, given, *factors))
    table.append(torch.get_num_threads())
    return table
