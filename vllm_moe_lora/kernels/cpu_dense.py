"""LoRA on the dense linear layers of a MoE model, on the CPU.

These layers are attention, shared experts, gates and embeddings. hooks/lora_punica_cpu.py calls the
functions here in place of vLLM's. A token without an adapter is not touched.

`add_lora` is one call of a native kernel (native/), where there is one. Its plain form,
`add_lora_torch`, takes the rows of each adapter and computes two matrix products. The kernel sums
in fp32 and rounds once; the plain form rounds each product to y's dtype.
"""

from __future__ import annotations

import torch

from .native import calls
from .native.calls import Segments


def row_segments(token_slots: torch.Tensor) -> Segments:
    """Group the rows of a batch by adapter.

    Args:
        token_slots: [tokens] int, the adapter slot of each token; -1 for a token without an
            adapter.

    Returns:
        (slot, rows) for each adapter in the batch. rows is None if one adapter has all rows. Rows
        of tokens without an adapter are in none.
    """
    slots = token_slots.unique().tolist()
    if len(slots) == 1:
        return Segments([(slots[0], None)] if slots[0] >= 0 else [])
    return Segments((s, (token_slots == s).nonzero().flatten()) for s in slots if s >= 0)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    segments: Segments,
    scale: float,
    output_slices: tuple[int, ...],
) -> None:
    """Compute y[:, slice i] += scale * lora_b[i] (lora_a[i] x) in place, for rows with an adapter.

    A merged layer has several slices, for example q, k and v.

    Args:
        y: [tokens, out], any float dtype; its last axis is contiguous.
        x: [tokens, in].
        lora_a: one tensor per slice, [slots, 1, rank, in] or [slots, rank, in].
        lora_b: one tensor per slice, [slots, 1, out_i, rank] or [slots, out_i, rank].
        segments: from `row_segments`.
        scale: number to multiply each product with.
        output_slices: the width of each slice in y. It may be smaller than out_i, if the base
            layer is padded.
    """
    if not calls.DenseLora().add(y, x, lora_a, lora_b, segments, scale, output_slices):
        add_lora_torch(y, x, lora_a, lora_b, segments, scale, output_slices)


def add_lora_torch(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    segments: Segments,
    scale: float,
    output_slices: tuple[int, ...],
) -> None:
    """Do what `add_lora` does with torch's operators. All products are in y's dtype."""
    for slot, rows in segments:
        picked = (x if rows is None else x.index_select(0, rows)).to(y.dtype)
        start = 0
        for a, b, width in zip(lora_a, lora_b, output_slices, strict=True):
            a2 = a[slot].reshape(-1, a.shape[-1]).to(y.dtype)
            b2 = b[slot].reshape(-1, b.shape[-1]).to(y.dtype)
            own = min(width, b2.shape[0], y.shape[1] - start)
            z = picked[:, : a2.shape[1]] @ a2.t()
            delta = z @ b2[:own].t()
            if scale != 1.0:
                delta *= scale
            part = y[:, start : start + own]
            if rows is None:
                part += delta
            else:
                part.index_add_(0, rows, delta)
            start += width


def add_expanded(
    y: torch.Tensor, z: torch.Tensor, lora_b: torch.Tensor, segments: Segments
) -> None:
    """Compute y += lora_b z in place, for rows with an adapter.

    This is for embeddings. Their layer computes z = lora_a x itself, by looking up columns.

    Args:
        y: [tokens, out], any float dtype.
        z: [tokens, rank].
        lora_b: [slots, 1, out, rank] or [slots, out, rank].
        segments: from `row_segments`.
    """
    for slot, rows in segments:
        b = lora_b[slot].reshape(-1, lora_b.shape[-1]).to(y.dtype)
        if rows is None:
            y += z.to(y.dtype) @ b.t()
        else:
            y.index_add_(0, rows, z.index_select(0, rows).to(y.dtype) @ b.t())
