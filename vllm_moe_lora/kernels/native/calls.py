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


class Prepared:
    """A call of the kernel of `dense.py`, of which most is the same each time.

    A step of decoding calls it for each layer, between products that read tens of megabytes of
    weights. So whatever Python code and objects a call touches come from main memory: they cost
    more than the kernel itself. What is the same in each call is looked up once.
    """

    _table: array[int] = array("q")  # empty: the kernel cannot be used

    def _prepare_call(
        self,
        kernels: build.Kernels,
        dtype: torch.dtype,
        slices: int,
        parts: array[int],
        ranks: int,
        work: int,
        scale: float = 1.0,
        factors: tuple[int, int] = (0, 0),
    ) -> None:
        """Make the table, which dense.py describes.

        Args:
            kernels: the compiled ones.
            dtype: of activations and factors.
            slices: how many.
            parts: what the table has of the slices.
            ranks: the sum of the slices' ranks.
            work: multiplications for a row.
            scale: of the product.
            factors: address of the slots' own factors, number of slots; 0: the slices have them.
        """
        self._kernel, self._dtype, self._parts = kernels.add_lora, dtype, parts
        self._ranks, self._work = ranks, work
        self._z = torch.empty(0, dtype=torch.float32)
        given = struct.unpack("<i", struct.pack("<f", scale))[0]
        self._table = array("q", bytes(24 * 8))
        self._table.extend((DTYPES[dtype], 0, 0, slices, address(parts)))
        self._table.extend((0,) * 5)
        self._table.extend((ranks, given, *factors, torch.get_num_threads()))
        self._place = address(self._table)

    def _call(
        self, y: torch.Tensor, x: torch.Tensor, number: int, segments: int, rows: int
    ) -> None:
        """Call the kernel.

        Args:
            y: [rows, out of all slices].
            x: [rows, in].
            number: of segments.
            segments: their address.
            rows: of all segments.
        """
        table, z, size = self._table, self._z, rows * self._ranks
        if z.numel() < size:
            z = torch.empty(size, dtype=torch.float32)
            if size <= KEPT:
                self._z = z
        table[0] = table[8] = table[16] = 0
        table[25], table[26] = number, segments
        table[29], table[30], table[31] = x.data_ptr(), x.stride(0), y.data_ptr()
        table[32], table[33] = y.stride(0), z.data_ptr()
        pool.run(self._kernel, self._place, rows * self._work < SMALL)


class DenseLora(Prepared):
    """The call of the dense kernel for one layer."""

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
        self._width, self._slots = width, min(t.shape[0] for t in (*lora_a, *lora_b))
        self._prepare_call(kernels, lora_a[0].dtype, len(lora_a), parts, ranks, work, scale)

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
        dtype = y.dtype
        if not self._table or dtype != self._dtype or x.dtype != dtype or y.device.type != "cpu":
            return False
        if y.stride(1) != 1 or x.stride(1) != 1 or x_shape[1] < self._width:
            return False
        place, rows, highest = segments.table(x_shape[0])
        if rows == 0:
            return True
        if x_shape[0] != tokens or highest >= self._slots:
            return False
        self._call(y, x, len(segments), place, rows)
        return True
