"""The canonical form: LoRA on the routed experts of one MoE layer of one adapter.

Every layout that a trainer writes is turned into this form, and everything else in the package
works on it. For each projection, gate (w1), up (w3), down (w2) or fused gate_up (w13), it holds

    a  [experts or 1, rank, in]    lora_A
    b  [experts or 1, out, rank]   lora_B

A first dimension of 1 means that all experts share the matrix. The dtype is that of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

# n matrices of the same shape: one tensor [n, rows, columns] with any strides, or a tuple of n
# matrices. If n is 1 and there are several experts, all of them share the one matrix.
Stack: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"


@dataclass(frozen=True)
class Dims:
    """Sizes of a model's routed experts.

    Attributes:
        experts: number of routed experts in one layer, over all devices.
        hidden: the model's hidden size: columns of w1 and w3, rows of w2.
        inner: intermediate size of one expert: rows of w1 and of w3, columns of w2.
        gated: an expert has gate (w1) and up (w3). If false there is only one matrix up, called w1.
        interleaved: the rows of fused gate_up alternate between gate and up (gpt-oss). If false,
            all rows of gate come first, then all rows of up.
    """

    experts: int
    hidden: int
    inner: int
    gated: bool = True
    interleaved: bool = False

    def shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of one expert's weight for "w1", "w2", "w3" or "w13"."""
        if projection == "w2":
            return self.hidden, self.inner
        return (2 if projection == "w13" else 1) * self.inner, self.hidden


@dataclass
class Part:
    """LoRA on one projection, for experts that have the same rank and the same scale.

    Attributes:
        experts: numbers of these n experts, in the order of the stacks.
        a: lora_A, [n or 1, rank, in].
        b: lora_B, [n or 1, out, rank].
        scale: what b @ a is multiplied by (alpha / rank or alpha / sqrt(rank)).
        label: name of one of the tensors, for messages.
        interleaved: only for w13: the rows of b alternate between gate and up.
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
        """The gate half (``which`` 0) or the up half (1) of a w13 part; both keep ``a``."""

        def cut(b: torch.Tensor) -> torch.Tensor:
            rows = b.shape[-2] // 2
            if self.interleaved:
                return b[..., which::2, :]
            return b.narrow(-2, which * rows, rows)

        b = self.b
        halves = cut(b) if isinstance(b, torch.Tensor) else tuple(cut(one) for one in b)
        return replace(self, b=halves, interleaved=False)

    def trimmed(self) -> Part:
        """The part without one half of its rank, if the columns of b are zero in that half.

        If gate and up have different lora_A, PEFT writes them as one factor of twice the rank with
        a block-diagonal lora_B. `half` of such a part has zeros in half of its columns. The part
        itself is returned if neither half is zero.
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
    """LoRA on the routed experts of one MoE layer of one adapter, in the canonical form.

    Attributes:
        prefix: what the adapter calls the layer's experts, as in "model.layers.0.mlp.experts".
        layout: name of the layout it was read from, for messages and tables.
        parts: "w1", "w2", "w3" or "w13" -> its parts, which cover different experts. A projection
            or an expert without LoRA is left out.
    """

    prefix: str
    layout: str
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Part]]:
        for projection, parts in self.parts.items():
            for part in parts:
                yield projection, part

    def split(self) -> Experts:
        """The same LoRA with each w13 part split into w1 (gate) and w3 (up)."""
        parts = {name: list(found) for name, found in self.parts.items() if name != "w13"}
        for part in self.parts.get("w13", ()):
            for which, name in enumerate(("w1", "w3")):
                parts.setdefault(name, []).append(part.half(which))
        return Experts(self.prefix, self.layout, parts)


def first(stack: Stack) -> torch.Tensor:
    """The first matrix of a stack. All of them have its shape."""
    return stack[0]


def pick(stack: Stack, index: int) -> torch.Tensor:
    """The matrix at position ``index``, or the only one if all experts share it."""
    return stack[0 if len(stack) == 1 else index]


def stacked(stack: Stack) -> torch.Tensor:
    """The stack as one tensor [n, rows, columns]; a tuple of matrices is copied."""
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
    """Make a stack of matrices of the same shape without copying them.

    A safetensors file stores the experts of one projection at equal distances, ordered by name
    ("0", "1", "10", "11", ...). One strided tensor can then view all of them, and a single copy
    moves them all. If the matrices are not at equal distances, the stack is a tuple.

    Returns:
        The stack, and for each position in it the index into ``matrices``.
    """
    one = matrices[0]
    order = list(range(len(matrices)))
    if len(matrices) > 1 and all(_in_same_storage(one, m) for m in matrices):
        offsets = [m.storage_offset() for m in matrices]
        order.sort(key=offsets.__getitem__)
        start, step = offsets[order[0]], offsets[order[1]] - offsets[order[0]]
        if step >= one.numel() and all(
            offsets[i] == start + position * step for position, i in enumerate(order)
        ):
            shape, stride = (len(matrices), *one.shape), (step, *one.stride())
            return one.as_strided(shape, stride, start), order
    return tuple(matrices[i] for i in order), order


def _in_same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def describe(experts: Experts) -> dict[str, Any]:
    """One row of the table that `vllm-moe-lora inspect` prints: layout, ranks, bytes, ..."""
    parts = [part for _, part in experts]
    return {
        "layout": experts.layout,
        "experts": len({number for part in parts for number in part.experts}),
        "projections": sorted(experts.parts),
        "ranks": sorted({part.rank for part in parts}),
        "scales": sorted({part.scale for part in parts}),
        "bytes": sum(_bytes(part.a) + _bytes(part.b) for part in parts),
    }


def _bytes(stack: Stack) -> int:
    return sum(matrix.numel() * matrix.element_size() for matrix in stack)
