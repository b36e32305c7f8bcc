"""Canonical experts -> the tensors that a LoRA layer of vLLM copies into a slot.

One copy moves a tensor from the file (or the trainer's memory) to where it stays: in the order of
the experts, in the slots' dtype, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters.canonical import Dims, Experts, Part, Stack, first, same
from ..adapters.errors import AdapterError, rank_text
from .memory import empty


@dataclass(frozen=True)
class Slots:
    """What one layer's wrapper takes.

    Attributes:
        local: numbers of the experts on this rank, in the order of its buffers.
        fused: gate and up share one lora_a (vLLM's 3-D wrapper).
        dims: of the model's experts.
        dtype: of the buffers.
        limit: max_lora_rank.
        shared: w13's lora_a and w2's lora_b are one for all experts (--enable-moe-shared-loras).
        multiple: ranks are filled up with zeros to a multiple of it (--fully-sharded-loras cuts
            them into as many pieces as there are devices).
    """

    local: Sequence[int]
    fused: bool
    dims: Dims
    dtype: torch.dtype
    limit: int
    shared: bool = False
    multiple: int = 1


@dataclass
class _Piece:
    """Some rows and ranks of a buffer, for some experts."""

    part: Part
    stack: Stack
    offset: int = 0  # in the rank
    rows: slice | None = None  # of lora_b


def stage(experts: Experts, slots: Slots) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors for `set_lora`: [w1, w2, w3] or, for fused slots, [w13, w2].

    Args:
        experts: of one layer.
        slots: of its wrapper.

    Returns:
        lora_a ([local experts, rank, in] each) and lora_b ([local experts, out, rank]), scale
        folded into lora_b. What the adapter leaves out is a zero of the smallest rank, without
        memory.

    Raises:
        AdapterError: the rank is above the limit, a number is not finite, or factors differ where
            the engine stores one for all experts.
    """
    if slots.fused:
        names = ["w13", "w2"]
        pieces = {"w13": _fused(experts, slots), "w2": _plain(experts.parts.get("w2", []))}
    else:
        names = ["w1", "w2", "w3"] if slots.dims.gated else ["w1", "w2"]
        whole = experts.split()
        pieces = {name: _plain(whole.parts.get(name, [])) for name in names}
    out_a, out_b = [], []
    for name in names:
        a, b = _filled(name, *pieces[name], slots)
        if slots.shared:
            every = replace(slots, local=range(slots.dims.experts))
            factors = _filled(name, *pieces[name], every)
            _demand_shared(name, factors[name == "w2"], pieces[name][0])
        elif len(slots.local) < slots.dims.experts:
            _demand_finite_elsewhere(*pieces[name], slots)
        out_a.append(a)
        out_b.append(b)
    if not slots.fused and not slots.dims.gated:
        out_a.append(out_a[0])  # upstream's list has three; it copies two
        out_b.append(out_b[0])
    return out_a, out_b


def _plain(parts: list[Part]) -> tuple[list[_Piece], list[_Piece]]:
    return [_Piece(p, p.a) for p in parts], [_Piece(p, p.b) for p in parts]


def _fused(experts: Experts, slots: Slots) -> tuple[list[_Piece], list[_Piece]]:
    """Gate and up in one factor: as they are, over a shared lora_a, or side by side in the rank."""
    parts = experts.parts.get("w13", [])
    if all(part.interleaved == slots.dims.interleaved for part in parts) and parts:
        return _plain(parts)
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


def _filled(
    name: str, a: list[_Piece], b: list[_Piece], slots: Slots
) -> tuple[torch.Tensor, torch.Tensor]:
    out, inn = slots.dims.shape(name)
    local = len(slots.local)
    if not a:
        zero, rank = torch.zeros(1, 1, 1, dtype=slots.dtype), slots.multiple
        return zero.expand(local, rank, inn), zero.expand(local, out, rank)
    rank = max(piece.offset + piece.part.rank for piece in a)
    if rank > slots.limit:
        if any(piece.offset or piece.rows for piece in a + b):
            widest = a[0]
        else:
            parts = [p.part.trimmed() if p.part.rank > slots.limit else p.part for p in a]
            a, b = _plain(parts)
            rank = max(part.rank for part in parts)
            widest = max(a, key=lambda piece: piece.part.rank)
        if rank > slots.limit:
            raise AdapterError(_too_wide(widest, rank, slots))
    rank += -rank % slots.multiple
    return (
        _buffer(a, (local, rank, inn), slots, is_a=True),
        _buffer(b, (local, out, rank), slots, is_a=False),
    )


def _too_wide(piece: _Piece, rank: int, slots: Slots) -> str:
    if piece.part.rank >= rank:
        return rank_text(piece.part.label, rank, slots.limit)
    return (
        f"{piece.part.label}: gate and up have different lora_A, and vLLM stores this model's "
        f"gate_up as one, so together they have rank {rank}, above max_lora_rank={slots.limit}. "
        f"Start the engine with --enable-mixed-moe-lora-format, or with --max-lora-rank {rank} or "
        "higher."
    )


def _buffer(
    pieces: list[_Piece], shape: tuple[int, int, int], slots: Slots, is_a: bool
) -> torch.Tensor:
    local = slots.local
    one = pieces[0]
    axis = 1 if is_a else 2
    alone = len(pieces) == 1 and one.rows is None and one.part.rank == shape[axis]
    scale = 1.0 if is_a else one.part.scale
    if alone and len(one.stack) == 1 and _covers(one.part, local):
        row = _scaled(first(one.stack)[None].clone(), scale, slots.dtype)
        _demand_finite(row, one, local)
        return row.expand(shape)
    if alone and _covers(one.part, local):
        result = _scaled(_select(one, local), scale, slots.dtype)
        _demand_finite(result, one, local)
        return result
    result = torch.zeros(shape, dtype=slots.dtype)
    for piece in pieces:
        own = set(piece.part.experts)
        here = [i for i, number in enumerate(local) if number in own]
        if not here:
            continue
        factor = 1.0 if is_a else piece.part.scale
        values = _scaled(_select(piece, [local[i] for i in here]), factor, slots.dtype)
        _demand_finite(values, piece, [local[i] for i in here])
        ranks = slice(piece.offset, piece.offset + piece.part.rank)
        target = result[:, ranks] if is_a else result[:, piece.rows or slice(None), ranks]
        target[here] = values
    return result


def _covers(part: Part, local: Sequence[int]) -> bool:
    return len(part.experts) >= len(local) and set(local) <= set(part.experts)


def _select(piece: _Piece, numbers: Sequence[int]) -> torch.Tensor:
    """A new tensor with the matrices of ``numbers``, in their order."""
    stack = piece.stack
    if len(stack) == 1:
        # A clone: of one number, what is contiguous would be the adapter's own tensor.
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
    """In ``dtype``; scaled before rounding to it. ``values`` is ours to change."""
    if scale != 1.0:
        values.mul_(scale)
    return values if values.dtype == dtype else empty(values.shape, dtype).copy_(values)


def _demand_finite(values: torch.Tensor, piece: _Piece, numbers: Sequence[int]) -> None:
    low, high = torch.aminmax(values)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(values)).nonzero()[0][0])
    raise AdapterError(
        f"{piece.part.label}: NaN or infinite numbers (expert {numbers[bad]}, as {values.dtype}). "
        "The training run diverged or the file is damaged."
    )


def _demand_finite_elsewhere(a: list[_Piece], b: list[_Piece], slots: Slots) -> None:
    """Refuse what another rank will refuse, or ranks would go on with different adapters."""
    here, step = set(slots.local), max(1, len(slots.local))
    for piece, scale in [(p, 1.0) for p in a] + [(p, p.part.scale) for p in b]:
        others = [number for number in piece.part.experts if number not in here]
        if len(piece.stack) == 1:
            others = others[:1]
        for start in range(0, len(others), step):
            numbers = others[start : start + step]
            _demand_finite(_scaled(_select(piece, numbers), scale, slots.dtype), piece, numbers)


def _demand_shared(name: str, values: torch.Tensor, pieces: list[_Piece]) -> None:
    if pieces and values.stride(0) and not torch.equal(values, values[:1].expand_as(values)):
        side = "lora_B" if name == "w2" else "lora_A"
        raise AdapterError(
            f"{pieces[0].part.label}: experts have different {side}, but this engine stores one "
            "for all of them. Start it without --enable-moe-shared-loras."
        )
