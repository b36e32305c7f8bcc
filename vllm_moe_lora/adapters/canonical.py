"""The one form that every layout becomes: factors of the routed experts of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

# n matrices of one shape: a tensor [n, rows, columns] (any strides), or one by one. n == 1 with
# more than one expert is a factor that the experts share.
Stack: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"


@dataclass(frozen=True)
class Dims:
    """Sizes of a model's routed experts.

    Attributes:
        experts: of one layer, over all ranks.
        hidden: columns of w1 and w3, rows of w2.
        inner: rows of w1 and of w3, columns of w2.
        gated: there is a w3; without it w1 is the one matrix that leads up.
        interleaved: rows of fused gate_up alternate (gpt-oss) instead of gate first, then up.
    """

    experts: int
    hidden: int
    inner: int
    gated: bool = True
    interleaved: bool = False

    def shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of "w1", "w2", "w3" or "w13"."""
        if projection == "w2":
            return self.hidden, self.inner
        return (2 if projection == "w13" else 1) * self.inner, self.hidden


@dataclass
class Part:
    """LoRA of one projection, of experts that have one rank and one scale.

    Attributes:
        experts: their numbers, in the order of the stacks.
        a: [n or 1, rank, in].
        b: [n or 1, out, rank].
        scale: on b @ a.
        label: a tensor's name, for messages.
        interleaved: (w13 only) rows of b alternate between gate and up.
    """

    experts: Sequence[int]
    a: Stack
    b: Stack
    scale: float
    label: str
    interleaved: bool = False

    @property
    def rank(self) -> int:
        return int(first(self.a).shape[0])

    def half(self, which: int) -> Part:
        """Gate (0) or up (1) of a fused part; both keep the shared ``a``."""

        def cut(b: torch.Tensor) -> torch.Tensor:
            rows = b.shape[-2] // 2
            if self.interleaved:
                return b[..., which::2, :]
            return b.narrow(-2, which * rows, rows)

        b = self.b
        halves = cut(b) if isinstance(b, torch.Tensor) else tuple(cut(one) for one in b)
        return replace(self, b=halves, interleaved=False)

    def trimmed(self) -> Part:
        """Without the half of the rank whose columns of b are zero.

        PEFT writes gate and up of different ``a`` as one factor of twice the rank whose b is
        block-diagonal; a half of it then has half of the columns empty.
        """
        rank = self.rank
        if rank % 2:
            return self
        b = stacked(self.b)
        low, high = b[..., : rank // 2], b[..., rank // 2 :]
        if not high.any():
            keep = slice(0, rank // 2)
        elif not low.any():
            keep = slice(rank // 2, rank)
        else:
            return self
        return replace(self, a=stacked(self.a)[:, keep], b=b[..., keep])


@dataclass
class Experts:
    """LoRA of the routed experts of one layer.

    Attributes:
        prefix: the layer's experts, as the adapter calls them.
        layout: the name of the family it was read from.
        parts: "w1", "w2", "w3" or "w13" -> its parts. What is absent is not there.
    """

    prefix: str
    layout: str
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Part]]:
        for projection, parts in self.parts.items():
            for part in parts:
                yield projection, part

    def split(self) -> Experts:
        """With w13 taken apart into w1 and w3."""
        parts = {name: list(found) for name, found in self.parts.items() if name != "w13"}
        for part in self.parts.get("w13", ()):
            for which, name in enumerate(("w1", "w3")):
                parts.setdefault(name, []).append(part.half(which))
        return Experts(self.prefix, self.layout, parts)


def first(stack: Stack) -> torch.Tensor:
    """One matrix of a stack."""
    return stack[0]


def pick(stack: Stack, index: int) -> torch.Tensor:
    """The matrix at a place of a stack; the one that is shared where there is only one."""
    return stack[0 if len(stack) == 1 else index]


def stacked(stack: Stack) -> torch.Tensor:
    """As one tensor; copies where the matrices lie apart."""
    return stack if isinstance(stack, torch.Tensor) else torch.stack(stack)


def same(one: Stack, other: Stack) -> bool:
    """Whether two stacks hold the same numbers."""
    if len(one) != len(other) or first(one).shape != first(other).shape:
        return False
    return all(
        (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y)
        for x, y in zip(one, other, strict=True)
    )


def gather(matrices: Sequence[torch.Tensor]) -> tuple[Stack, list[int]]:
    """Matrices of one shape as a stack, without a copy where their storage allows.

    A safetensors file keeps the experts of one projection at equal distances, in the order of
    their names ("0", "1", "10", "11", ...): seen as one strided tensor, a single copy moves all.

    Returns:
        The stack, and for each of its places the index into ``matrices``.
    """
    one = matrices[0]
    order = list(range(len(matrices)))
    if len(matrices) > 1 and all(_alike(one, m) for m in matrices):
        offsets = [m.storage_offset() for m in matrices]
        order.sort(key=offsets.__getitem__)
        start, step = offsets[order[0]], offsets[order[1]] - offsets[order[0]]
        if step >= one.numel() and all(
            offsets[i] == start + place * step for place, i in enumerate(order)
        ):
            shape, stride = (len(matrices), *one.shape), (step, *one.stride())
            return one.as_strided(shape, stride, start), order
    return tuple(matrices[i] for i in order), order


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def describe(experts: Experts) -> dict[str, Any]:
    """Facts for tables: ranks, experts, bytes."""
    parts = [part for _, part in experts]
    return {
        "layout": experts.layout,
        "experts": len({number for part in parts for number in part.experts}),
        "projections": sorted(experts.parts),
        "ranks": sorted({part.rank for part in parts}),
        "scales": sorted({part.scale for part in parts}),
        "bytes": sum(_size(part.a) + _size(part.b) for part in parts),
    }


def _size(stack: Stack) -> int:
    return sum(matrix.numel() * matrix.element_size() for matrix in stack)
