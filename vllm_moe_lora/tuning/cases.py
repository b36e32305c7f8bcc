"""Random layers and batches of a model's shapes, on which the kernels are checked and timed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from vllm_moe_lora.records import LayerShape

# Kinds of batches: no token has an adapter; all have the same one; each has one of all, some tokens
# none; half of the tokens have the same adapter, and half of the pairs a tenth of the experts.
KINDS = ("none", "one", "all", "skewed")

# vLLM captures CUDA graphs of these numbers of tokens by default; larger batches run eagerly.
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
LARGER = (1024, 2048, 4096, 8192)


class Dense(Protocol):
    """Base weights of all experts: a tensor [experts, out, in], or what gives them one by one."""

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Return [out, in]."""


@dataclass
class Layer:
    """The LoRA buffers of one layer, filled with random adapters.

    Slot s has the rank max_rank >> (s % 2), and no factor on expert s % experts if there are
    several experts (shared factors are not left out).

    Attributes:
        shape: the sizes.
        a13, b13, a2, b2: vLLM's slot buffers, see `FusedMoEWithLoRA`.
        ranks: [slots, experts] int, the rank in use.
        enabled: [slots + 1] int32, 1 for each slot, as vLLM's `adapter_enabled`.
        w13, w2: the base weights [experts, out, in]; None if the base GEMMs are left out.
        bias13, bias2: [experts, out], of the base; None without one.
        expert_map: [experts of the model] int32, the expert here, or -1; None if all are here.
    """

    shape: LayerShape
    a13: tuple[torch.Tensor, ...]
    b13: tuple[torch.Tensor, ...]
    a2: tuple[torch.Tensor, ...]
    b2: tuple[torch.Tensor, ...]
    ranks: torch.Tensor
    enabled: torch.Tensor
    w13: Dense | None = None
    w2: Dense | None = None
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None

    def here(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the numbers that experts of the model have on this device; -1 for none."""
        return ids if self.expert_map is None else self.expert_map[ids.long()]

    def as_vllm(self) -> Any:
        """Return the buffers under the names that they have in vLLM's `FusedMoEWithLoRA`."""
        return SimpleNamespace(
            w13_lora_a_stacked=self.a13,
            w13_lora_b_stacked=self.b13,
            w2_lora_a_stacked=self.a2,
            w2_lora_b_stacked=self.b2,
            local_num_experts=self.shape.experts,
            moe_config=SimpleNamespace(
                experts_per_token=self.shape.top_k, num_experts=self.shape.total
            ),
            fully_sharded=False,
            adapter_enabled=self.enabled,
        )


@dataclass
class Batch:
    """One batch of a layer.

    Attributes:
        x: [tokens, hidden].
        act: [tokens * top_k, inner], what the activation would return.
        ids: [tokens, top_k] int32, distinct experts of the model for each token.
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


# vLLM's four tuples of LoRA buffers: lora_a and lora_b of w13, lora_a and lora_b of w2.
Stacks = tuple[
    tuple[torch.Tensor, ...],
    tuple[torch.Tensor, ...],
    tuple[torch.Tensor, ...],
    tuple[torch.Tensor, ...],
]


def layer(shape: LayerShape, device: str, base: bool = False, seed: int = 0) -> Layer:
    """Make a layer. The experts that are here are spread evenly over those of the model.

    Args:
        shape: its sizes.
        device: where its tensors are.
        base: whether it has base weights.
        seed: of the random numbers.
    """
    dtype = getattr(torch, shape.dtype)

    def empty(number: int, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
        size = (shape.slots, experts, rows, columns)
        return tuple(torch.empty(size, dtype=dtype, device=device) for _ in range(number))

    out, shared = shape.inner * shape.fused // shape.slices, 1 if shape.shared else shape.experts
    stacks = (
        empty(shape.slices, shared, shape.rank, shape.hidden),
        empty(shape.slices, shape.experts, out, shape.rank),
        empty(1, shape.experts, shape.rank, shape.inner),
        empty(1, shared, shape.hidden, shape.rank),
    )
    made = filled(shape, stacks, torch.ones(shape.slots + 1, dtype=torch.int32), seed)
    made.enabled = made.enabled.to(device)
    if base:
        make = torch.Generator(device).manual_seed(seed + 1)
        sizes = ((shape.fused * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        made.w13, made.w2 = (
            torch.randn(shape.experts, *size, generator=make, dtype=dtype, device=device).mul_(
                size[1] ** -0.5
            )
            for size in sizes
        )
    if shape.absent:
        numbers = torch.arange(shape.experts, dtype=torch.int32, device=device)
        made.expert_map = torch.full((shape.total,), -1, dtype=torch.int32, device=device)
        made.expert_map[numbers.long() * shape.total // shape.experts] = numbers
    return made


def filled(shape: LayerShape, stacks: Stacks, enabled: torch.Tensor, seed: int = 0) -> Layer:
    """Fill LoRA buffers with random adapters; returns them as a layer without base weights.

    Args:
        shape: the sizes.
        stacks: of the layer, overwritten.
        enabled: see `Layer`.
        seed: of the random numbers.
    """
    device = stacks[0][0].device
    make = torch.Generator(device).manual_seed(seed)
    scales = (shape.hidden**-0.5, 1.0, shape.inner**-0.5, 1.0)
    ranks = torch.full((shape.slots, shape.experts), shape.rank)
    for slot in range(shape.slots):
        ranks[slot] = max(1, shape.rank >> (slot % 2))
        if shape.experts > 1:
            ranks[slot, slot % shape.experts] = 0
    unused = torch.arange(shape.rank) >= ranks[..., None]  # [slots, experts, rank]
    for index, (tensors, scale) in enumerate(zip(stacks, scales, strict=True)):
        for one in tensors:
            one.normal_(generator=make).mul_(scale)
            # Shared factors have the ranks of the expert that has the most.
            mask = unused if one.shape[1] == shape.experts else unused.all(1, keepdim=True)
            mask = mask.to(device)
            one.masked_fill_(mask[:, :, None, :] if index % 2 else mask[..., None], 0.0)
    return Layer(shape, *stacks, ranks, enabled)


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
    odds, slot_odds = torch.ones(shape.total), torch.ones(shape.slots)
    if kind == "skewed":
        odds[: max(1, shape.total // 10)] = 9.0
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
