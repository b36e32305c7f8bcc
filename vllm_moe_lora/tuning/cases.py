"""Random layers and batches of a model's shapes, on which the kernels are checked and timed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vllm_moe_lora.records import LayerShape

# Kinds of batches: no token has an adapter; all have the same one; each has one of all, some tokens
# none; half of the tokens have the same adapter, and half of the pairs a tenth of the experts.
KINDS = ("none", "one", "all", "skewed")

# vLLM captures CUDA graphs of these numbers of tokens by default; larger batches run eagerly.
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
LARGER = (1024, 2048, 4096, 8192)


@dataclass
class Layer:
    """The LoRA buffers of one layer, filled with random adapters.

    Slot s has the rank max_rank >> (s % 2), and no factor on expert s % experts if there are
    several experts.

    Attributes:
        shape: the sizes.
        a13, b13, a2, b2: vLLM's slot buffers, see `FusedMoEWithLoRA`.
        ranks: [slots, experts] int, the rank in use.
        enabled: [slots + 1] int32, 1 for each slot, as vLLM's `adapter_enabled`.
        w13, w2: the base weights [experts, out, in]; None if the base GEMMs are left out.
    """

    shape: LayerShape
    a13: tuple[torch.Tensor, ...]
    b13: tuple[torch.Tensor, ...]
    a2: tuple[torch.Tensor, ...]
    b2: tuple[torch.Tensor, ...]
    ranks: torch.Tensor
    enabled: torch.Tensor
    w13: torch.Tensor | None = None
    w2: torch.Tensor | None = None

    def as_vllm(self) -> Any:
        """Return the buffers under the names that they have in vLLM's `FusedMoEWithLoRA`."""
        return SimpleNamespace(
            w13_lora_a_stacked=self.a13,
            w13_lora_b_stacked=self.b13,
            w2_lora_a_stacked=self.a2,
            w2_lora_b_stacked=self.b2,
            local_num_experts=self.shape.experts,
            moe_config=SimpleNamespace(experts_per_token=self.shape.top_k),
            fully_sharded=False,
            adapter_enabled=self.enabled,
        )


@dataclass
class Batch:
    """One batch of a layer.

    Attributes:
        x: [tokens, hidden].
        act: [tokens * top_k, inner], what the activation would return.
        ids: [tokens, top_k] int32, distinct experts for each token.
        weights: [tokens, top_k] float32.
        slots: [tokens] int32, -1 for a token without an adapter.
    """

    x: torch.Tensor
    act: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.x.shape[0]


def layer(shape: LayerShape, device: str, base: bool = False, seed: int = 0) -> Layer:
    """Make a layer.

    Args:
        shape: its sizes.
        device: where its tensors are.
        base: whether it has base weights.
        seed: of the random numbers.
    """
    make, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, shape.dtype)

    def normal(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=make, dtype=dtype, device=device).mul_(scale)

    def stacks(number: int, rows: int, columns: int, scale: float) -> tuple[torch.Tensor, ...]:
        size = (shape.slots, shape.experts, rows, columns)
        return tuple(normal(*size, scale=scale) for _ in range(number))

    out = shape.inner * shape.fused // shape.slices
    ranks = torch.full((shape.slots, shape.experts), shape.rank)
    for slot in range(shape.slots):
        ranks[slot] = max(1, shape.rank >> (slot % 2))
        if shape.experts > 1:
            ranks[slot, slot % shape.experts] = 0
    made = Layer(
        shape,
        stacks(shape.slices, shape.rank, shape.hidden, shape.hidden**-0.5),
        stacks(shape.slices, out, shape.rank, 1.0),
        stacks(1, shape.rank, shape.inner, shape.inner**-0.5),
        stacks(1, shape.hidden, shape.rank, 1.0),
        ranks,
        torch.ones(shape.slots + 1, dtype=torch.int32, device=device),
    )
    unused = torch.arange(shape.rank) >= ranks[..., None]  # [slots, experts, rank]
    unused = unused.to(device)
    for a in (*made.a13, *made.a2):
        a.masked_fill_(unused[..., None], 0.0)
    for b in (*made.b13, *made.b2):
        b.masked_fill_(unused[:, :, None, :], 0.0)
    if base:
        columns = shape.hidden, shape.inner
        rows = shape.fused * shape.inner, shape.hidden
        made.w13, made.w2 = (
            normal(shape.experts, row, column, scale=column**-0.5)
            for row, column in zip(rows, columns, strict=True)
        )
    return made


def batch(shape: LayerShape, tokens: int, kind: str, device: str, seed: int = 0) -> Batch:
    """Make a batch.

    Args:
        shape: of the layer.
        tokens: its size.
        kind: one of `KINDS`.
        device: where its tensors are.
        seed: of the random numbers.
    """
    make, dtype = torch.Generator().manual_seed(seed), getattr(torch, shape.dtype)
    odds, slot_odds = torch.ones(shape.experts), torch.ones(shape.slots)
    if kind == "skewed":
        odds[: max(1, shape.experts // 10)] = 9.0
        slot_odds[0] = max(1, shape.slots - 1)
    ids = torch.multinomial(odds.expand(tokens, -1), shape.top_k, generator=make)
    slots = torch.multinomial(slot_odds, tokens, replacement=True, generator=make)
    if kind == "none":
        slots.fill_(-1)
    elif kind == "one":
        slots.fill_(shape.slots - 1)
    elif kind == "all":
        slots[3::4] = -1
    weights = torch.rand(tokens, shape.top_k, generator=make) + 0.5

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=make).to(device, dtype)

    x, act = normal(tokens, shape.hidden), normal(tokens * shape.top_k, shape.inner)
    return Batch(x, act, ids.int().to(device), weights.to(device), slots.int().to(device))
