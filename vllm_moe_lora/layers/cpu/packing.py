"""The layout of the weights that vLLM's CPU operator `cpu_fused_moe` takes.

16 output rows are packed together, with all their input columns; `layout_is_plain` checks this once
per process. So columns and rows can be appended to packed weights, and packing can be undone.
"""

from __future__ import annotations

import functools

import torch

PACK_ROWS = 16  # output rows that are packed together, on each instruction set
PACK_COLUMNS = 8  # a multiple of the input columns packed together (2 on AMX and VSX, 4 on NEON)
PACK_UNIT = 32  # rows and columns of a packed weight are multiples of this


def round_up(n: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``n``."""
    return -(-n // unit) * unit


def pack(weight: torch.Tensor, isa: str) -> torch.Tensor:
    """Pack a weight as vLLM does, after padding it with zeros to multiples of `PACK_UNIT`.

    Args:
        weight: [experts, out, in].
        isa: the instruction set that the operator uses: "vec", "amx", "neon" or "vsx".

    Returns:
        The packed weight; its shape is [experts, padded out, padded in].
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    pad = torch.nn.functional.pad
    weight = pad(weight, (0, -weight.shape[2] % PACK_UNIT, 0, -weight.shape[1] % PACK_UNIT))
    return cpu_prepack_moe_weight(weight.contiguous(), isa)


def blocks(packed: torch.Tensor) -> torch.Tensor:
    """View a packed [experts, out, in] as [experts, out / 16, in * 16].

    In this view a range of input columns is a slice of the last axis.
    """
    experts, rows, columns = packed.shape
    return packed.view(experts, rows // PACK_ROWS, columns * PACK_ROWS)


@functools.cache
def layout_is_plain(isa: str, dtype: torch.dtype) -> bool:
    """Return whether packed weights have the layout that this module relies on.

    That is: appending packed columns or rows gives the same as packing the appended weight.
    """
    w = torch.randn(1, 64, 64).to(dtype)
    whole, cut = pack(w, isa), PACK_UNIT + PACK_COLUMNS
    left, right = pack(w[:, :, :cut], isa), pack(w[:, :, cut:], isa)
    keep, rest = cut * PACK_ROWS, (64 - cut) * PACK_ROWS
    columns = torch.cat([blocks(left)[:, :, :keep], blocks(right)[:, :, :rest]], dim=2)
    cut = PACK_UNIT + PACK_ROWS
    rows = torch.cat([pack(w[:, :cut], isa)[:, :cut], pack(w[:, cut:], isa)[:, :PACK_ROWS]], 1)
    return torch.equal(columns.view_as(whole), whole) and torch.equal(rows, whole)


def widen_columns(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a copy of a packed [experts, out, in] with zero columns appended: in = ``columns``."""
    experts, rows, have = packed.shape
    wide = packed.new_zeros(experts, rows, columns)
    blocks(wide)[:, :, : have * PACK_ROWS].copy_(blocks(packed))
    return wide


def widen_rows(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a copy of a packed [experts, out, in] with zero rows appended: out = ``rows``."""
    wide = packed.new_zeros(packed.shape[0], rows, packed.shape[2])
    wide[:, : packed.shape[1]].copy_(packed)
    return wide


@functools.cache
def _unpacking(isa: str, dtype: torch.dtype) -> torch.Tensor:
    """Return where each number of a tile is in the packed tile: [`PACK_ROWS` * `PACK_COLUMNS`].

    A tile is `PACK_ROWS` rows by `PACK_COLUMNS` columns. Its numbers are 0 to 127, which every
    dtype has.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        tile = torch.arange(PACK_ROWS * PACK_COLUMNS).view(1, PACK_ROWS, PACK_COLUMNS)
        packed = blocks(pack(tile.to(dtype), isa))[0, 0, : tile.numel()]
        return packed.to(torch.int64).argsort()


def unpack(packed: torch.Tensor, isa: str) -> torch.Tensor:
    """Undo `pack`: return [experts, out, in] with the numbers in their own order.

    Args:
        packed: [experts, out, in] as the operator takes it; out is a multiple of `PACK_ROWS` and in
            one of `PACK_COLUMNS`.
        isa: the instruction set that it was packed for.
    """
    experts, rows, columns = packed.shape
    tiles = packed.view(experts, rows // PACK_ROWS, columns // PACK_COLUMNS, -1)
    plain = tiles[..., _unpacking(isa, packed.dtype)]
    plain = plain.unflatten(-1, (PACK_ROWS, PACK_COLUMNS))
    return plain.transpose(2, 3).reshape(experts, rows, columns)
