"""Stages the routed experts of one layer: builds the tensors that vLLM copies into a slot.

Each matrix is copied once, from the file or the trainer's memory into the staged tensor. On the way
the experts are put into the order of the device's weights, lora_b is scaled, and the dtype becomes
that of the slots. NaN and infinite values are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters.canonical import Dims, Experts, Part, Stack, first, same
from ..adapters.errors import AdapterError, rank_text
from .memory import empty


@dataclass(frozen=True)
class Slots:
    """The form of the tensors that the LoRA layer of one MoE layer takes.

    Attributes:
        local: numbers of the experts on this device, in the order of its weights.
        fused: the layer takes w13, in which gate and up share one lora_a (FusedMoE3DWithLoRA). If
            false it takes w1 and w3.
        dims: sizes of the model's experts.
        dtype: of the slots.
        limit: the engine's max_lora_rank.
        shared: a slot has only one lora_a of gate and up, and one lora_b of down, for all experts
            (--enable-moe-shared-loras).
        rank_multiple: the rank is padded with zeros to a multiple of this, because
            --fully-sharded-loras splits it over the devices.
    """

    local: Sequence[int]
    fused: bool
    dims: Dims
    dtype: torch.dtype
    limit: int
    shared: bool = False
    rank_multiple: int = 1


@dataclass
class _Piece:
    """A stack and where it goes in a staged tensor. One staged tensor may be made of several.

    Attributes:
        part: the part that the stack belongs to.
        stack: the part's ``a`` or ``b``.
        offset: where the part's rank begins in the staged tensor's rank.
        rows: for lora_b: which rows it fills; None means all.
    """

    part: Part
    stack: Stack
    offset: int = 0
    rows: slice | None = None


def stage(experts: Experts, slots: Slots) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Build the tensors for the LoRA layer's `set_lora`.

    Args:
        experts: the layer's experts in the canonical form.
        slots: the form that the LoRA layer takes.

    Returns:
        lora_a, each [local experts, rank, in], and lora_b, each [local experts, out, rank], of
        [w1, w2, w3], or of [w13, w2] if ``slots.fused``. The scale is multiplied into lora_b. A
        projection that the adapter leaves out is an expanded zero, which takes no memory.

    Raises:
        AdapterError: a rank is above the limit, a value is NaN or infinite, or experts have
            different factors but ``slots.shared`` allows one for all.
    """
    if slots.fused:
        names = ["w13", "w2"]
        pieces = {"w13": _fuse(experts, slots), "w2": _pieces(experts.parts.get("w2", []))}
    else:
        names = ["w1", "w2", "w3"] if slots.dims.gated else ["w1", "w2"]
        whole = experts.split()
        pieces = {name: _pieces(whole.parts.get(name, [])) for name in names}
    out_a, out_b = [], []
    for name in names:
        a, b = _build(name, *pieces[name], slots)
        if slots.shared:
            every = replace(slots, local=range(slots.dims.experts))
            factors = _build(name, *pieces[name], every)
            _check_shared(name, factors[name == "w2"], pieces[name][0])
        elif len(slots.local) < slots.dims.experts:
            _check_finite_elsewhere(*pieces[name], slots)
        out_a.append(a)
        out_b.append(b)
    if not slots.fused and not slots.dims.gated:
        out_a.append(out_a[0])  # vLLM expects three entries, but copies only two
        out_b.append(out_b[0])
    return out_a, out_b


def _pieces(parts: list[Part]) -> tuple[list[_Piece], list[_Piece]]:
    """Pieces of lora_a and of lora_b that fill all rows."""
    return [_Piece(p, p.a) for p in parts], [_Piece(p, p.b) for p in parts]


def _fuse(experts: Experts, slots: Slots) -> tuple[list[_Piece], list[_Piece]]:
    """Pieces of lora_a and lora_b of w13.

    They are the adapter's w13 if its rows are in the model's order. Else they are made of gate and
    up: with the same lora_a if both have the same, else next to each other in the rank, which is
    then the sum of both.
    """
    parts = experts.parts.get("w13", [])
    if all(part.interleaved == slots.dims.interleaved for part in parts) and parts:
        return _pieces(parts)
    halves = experts.split()
    gates, ups = halves.parts.get("w1", []), halves.parts.get("w3", [])
    inner = slots.dims.inner
    rows = (
        (slice(0, None, 2), slice(1, None, 2))
        if slots.dims.interleaved
        else (slice(0, inner), slice(inner, 2 * inner))
    )
    if len(gates) == len(ups) and all(
        gate.experts == up.experts and gate.rank == up.rank and same(gate.a, up.a)
        for gate, up in zip(gates, ups, strict=True)
    ):
        offset, a = 0, [_Piece(gate, gate.a) for gate in gates]
    else:
        offset = max((gate.rank for gate in gates), default=0)
        a = [_Piece(g, g.a) for g in gates] + [_Piece(u, u.a, offset) for u in ups]
    b = [_Piece(g, g.b, 0, rows[0]) for g in gates] + [_Piece(u, u.b, offset, rows[1]) for u in ups]
    return a, b


def _build(
    name: str, a: list[_Piece], b: list[_Piece], slots: Slots
) -> tuple[torch.Tensor, torch.Tensor]:
    """Staged lora_a and lora_b of one projection.

    If the rank is above the limit, halves of the rank that are zero are left out first.

    Raises:
        AdapterError: the rank is still above the limit, or a value is NaN or infinite.
    """
    out, inn = slots.dims.shape(name)
    local = len(slots.local)
    if not a:
        zero, rank = torch.zeros(1, 1, 1, dtype=slots.dtype), slots.rank_multiple
        return zero.expand(local, rank, inn), zero.expand(local, out, rank)
    rank = max(piece.offset + piece.part.rank for piece in a)
    if rank > slots.limit:
        if any(piece.offset or piece.rows for piece in a + b):
            widest = a[0]
        else:
            parts = [p.part.trimmed() if p.part.rank > slots.limit else p.part for p in a]
            a, b = _pieces(parts)
            rank = max(part.rank for part in parts)
            widest = max(a, key=lambda piece: piece.part.rank)
        if rank > slots.limit:
            raise AdapterError(_rank_message(widest, rank, slots))
    rank += -rank % slots.rank_multiple
    return (
        _buffer(a, (local, rank, inn), slots, is_a=True),
        _buffer(b, (local, out, rank), slots, is_a=False),
    )


def _rank_message(piece: _Piece, rank: int, slots: Slots) -> str:
    if piece.part.rank >= rank:
        return rank_text(piece.part.label, rank, slots.limit)
    return (
        f"{piece.part.label}: gate and up have different lora_A, but vLLM stores one lora_A for "
        f"both in this model, so they need rank {rank}, above max_lora_rank={slots.limit}. "
        f"Start the engine with --enable-mixed-moe-lora-format, or with --max-lora-rank {rank} or "
        "higher."
    )


def _buffer(
    pieces: list[_Piece], shape: tuple[int, int, int], slots: Slots, is_a: bool
) -> torch.Tensor:
    """Staged lora_a or lora_b of one projection: [local experts, rank, in] or [.., out, rank]."""
    local = slots.local
    one = pieces[0]
    axis = 1 if is_a else 2
    alone = len(pieces) == 1 and one.rows is None and one.part.rank == shape[axis]
    scale = 1.0 if is_a else one.part.scale
    # A single piece that fills the tensor is copied directly, without writing zeros first.
    if alone and len(one.stack) == 1 and _covers(one.part, local):
        row = _scaled(first(one.stack)[None].clone(), scale, slots.dtype)
        _check_finite(row, one, local)
        return row.expand(shape)
    if alone and _covers(one.part, local):
        result = _scaled(_select(one, local), scale, slots.dtype)
        _check_finite(result, one, local)
        return result
    result = torch.zeros(shape, dtype=slots.dtype)
    for piece in pieces:
        own = set(piece.part.experts)
        here = [i for i, number in enumerate(local) if number in own]
        if not here:
            continue
        factor = 1.0 if is_a else piece.part.scale
        values = _scaled(_select(piece, [local[i] for i in here]), factor, slots.dtype)
        _check_finite(values, piece, [local[i] for i in here])
        ranks = slice(piece.offset, piece.offset + piece.part.rank)
        target = result[:, ranks] if is_a else result[:, piece.rows or slice(None), ranks]
        target[here] = values
    return result


def _covers(part: Part, local: Sequence[int]) -> bool:
    """Whether a part has LoRA on all experts of this device."""
    return len(part.experts) >= len(local) and set(local) <= set(part.experts)


def _select(piece: _Piece, numbers: Sequence[int]) -> torch.Tensor:
    """A new tensor [len(numbers), ...] with the matrices of these experts, in this order."""
    stack = piece.stack
    if len(stack) == 1:
        # Clone, because `contiguous` would return the adapter's own tensor if there is one expert.
        whole = first(stack)[None].expand(len(numbers), *first(stack).shape)
        return whole.clone(memory_format=torch.contiguous_format)
    position = {number: i for i, number in enumerate(piece.part.experts)}
    index = [position[number] for number in numbers]
    out = empty((len(index), *first(stack).shape), first(stack).dtype)
    if not isinstance(stack, torch.Tensor):
        return torch.stack([stack[i] for i in index], out=out)
    if index == list(range(len(stack))):
        return out.copy_(stack)
    return torch.index_select(stack, 0, torch.tensor(index), out=out)


def _scaled(values: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Scale, then convert to ``dtype``, so that values are rounded once. ``values`` may change."""
    if scale != 1.0:
        values.mul_(scale)
    return values if values.dtype == dtype else empty(values.shape, dtype).copy_(values)


def _check_finite(values: torch.Tensor, piece: _Piece, numbers: Sequence[int]) -> None:
    low, high = torch.aminmax(values)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(values)).nonzero()[0][0])
    raise AdapterError(
        f"{_name(piece, numbers[bad])} has NaN or infinite numbers (expert {numbers[bad]}, as "
        f"{values.dtype}). The training run diverged or the file is damaged."
    )


def _name(piece: _Piece, expert: int) -> str:
    """The name of one expert's factor, made of the name of another tensor of the part."""
    side = "A" if piece.stack is piece.part.a else "B"
    name = re.sub(r"lora_[AB]\b", f"lora_{side}", piece.part.label)
    return re.sub(r"\.experts\.\d+\.", f".experts.{expert}.", name)


def _check_finite_elsewhere(a: list[_Piece], b: list[_Piece], slots: Slots) -> None:
    """Check the values of experts on other devices too.

    All devices must refuse an adapter if one does. Else they would go on with different adapters.
    """
    here, step = set(slots.local), max(1, len(slots.local))
    for piece, scale in [(p, 1.0) for p in a] + [(p, p.part.scale) for p in b]:
        others = [number for number in piece.part.experts if number not in here]
        if len(piece.stack) == 1:
            others = others[:1]
        for start in range(0, len(others), step):
            numbers = others[start : start + step]
            _check_finite(_scaled(_select(piece, numbers), scale, slots.dtype), piece, numbers)


def _check_shared(name: str, values: torch.Tensor, pieces: list[_Piece]) -> None:
    """Check that all experts have the same factor, as --enable-moe-shared-loras requires."""
    if pieces and values.stride(0) and not torch.equal(values, values[:1].expand_as(values)):
        side = "lora_B" if name == "w2" else "lora_A"
        raise AdapterError(
            f"{pieces[0].part.label}: experts have different {side}, but this engine stores one "
            "for all of them. Start it without --enable-moe-shared-loras."
        )
