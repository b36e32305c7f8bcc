"""LoRA of dense linear layers on CPU: one pair of matrix products for each adapter in the batch."""

from __future__ import annotations

import torch

Segments = list[tuple[int, torch.Tensor | None]]


def row_segments(token_slots: torch.Tensor) -> Segments:
    """[(slot, rows)] of the adapters in the batch; rows is None when one adapter has them all.

    Args:
        token_slots: [tokens] int, -1 for tokens without adapter, which are in no segment.
    """
    slots = token_slots.unique().tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(s, (token_slots == s).nonzero().flatten()) for s in slots if s >= 0]


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    segments: Segments,
    scale: float,
    output_slices: tuple[int, ...],
) -> None:
    """y[:, slice i] += scale * B_i (A_i x), in place, rows of no segment untouched.

    Args:
        y: [tokens, out], contiguous in its last axis.
        x: [tokens, in].
        lora_a: each slice's [slots, 1, rank, in] or [slots, rank, in].
        lora_b: each slice's [slots, 1, out_i, rank] or [slots, out_i, rank].
        segments: from `row_segments`.
        scale: factor on every delta.
        output_slices: out_i; a slice may be narrower than its B (padding of the base layer).
    """
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
    """y += B z, in place, rows of no segment untouched (embeddings look A up by themselves).

    Args:
        y: [tokens, out].
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
