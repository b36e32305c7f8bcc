"""Random MoE LoRA calls for the kernel tests, poisoned wherever nothing may be read or written."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import strategies as st

from vllm_moe_lora.kernels import reference
from vllm_moe_lora.kernels.triton import config

NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    """Sizes of one batch: ``hot`` experts are routed to, ``adapters`` of the ``slots`` occur."""

    seed: int
    tokens: int
    experts: int
    top_k: int
    slots: int
    adapters: int
    hot: int
    live: int  # tokens that may have an adapter


@st.composite
def shapes(draw, segments=None):
    """The whole grid; with ``segments``, so few live tokens that no more than these occur."""
    tokens = draw(st.integers(1, 200), "tokens")
    experts = draw(st.integers(4, 384), "experts")
    top_k = draw(st.integers(1, 8), "top_k")
    slots = draw(st.integers(1, 16), "slots")
    adapters = draw(st.integers(0, slots), "adapters")
    hot = draw(st.one_of(st.just(experts), st.integers(1, 4)), "hot")
    live = tokens
    if segments and hot * adapters > segments:
        live = min(tokens, max(1, segments // top_k))
    seed = draw(st.integers(0, 10**6), "seed")
    return Shape(seed, tokens, experts, top_k, slots, adapters, hot, live)


def routes(shape: Shape, g: torch.Generator):
    """token_slots [tokens] and topk_ids [tokens, top_k], int64; one choice in six is no slot."""
    names = torch.randperm(shape.slots, generator=g)[: shape.adapters]
    token_slots = torch.full((shape.tokens,), -1)
    if shape.adapters:
        token_slots = names[torch.randint(0, shape.adapters, (shape.tokens,), generator=g)]
        token_slots[torch.rand(shape.tokens, generator=g) < 1 / 6] = -1
        token_slots[torch.randperm(shape.tokens, generator=g)[shape.live :]] = -1
    pool = torch.randperm(shape.experts, generator=g)[: shape.hot]
    topk_ids = pool[torch.randint(0, pool.numel(), (shape.tokens, shape.top_k), generator=g)]
    return token_slots, topk_ids


@dataclass
class Case:
    """Arguments of `add_lora`, reference and kernels alike; ids are local."""

    y: torch.Tensor  # [tokens, top_k, out]
    x: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    ranks: torch.Tensor
    token_slots: torch.Tensor
    topk_ids: torch.Tensor
    weights: torch.Tensor | None

    def delta(self) -> torch.Tensor:
        """[tokens, top_k, out] fp32: what the reference adds."""
        delta = torch.zeros(self.y.shape)
        reference.add_lora(
            delta, self.x, self.lora_a, self.lora_b, self.ranks, self.token_slots, self.topk_ids,
            self.weights,
        )  # fmt: skip
        return delta

    def tolerance(self, delta: torch.Tensor) -> torch.Tensor:
        """[tokens, top_k, out]: how far y + delta may be off.

        z and y are rounded to their dtype once each; a sum of n fp32 products is off by at most
        n times 2^-24 of the sum of their magnitudes.
        """
        unit = torch.finfo(self.y.dtype).eps / 2
        off = unit * (self.y.float() + delta).abs()
        tokens, top_k = self.topk_ids.shape
        single = (self.x.shape[1] + self.lora_b[0].shape[3]) * 2.0**-24
        for token, k in [(t, k) for t in range(tokens) for k in range(top_k)]:
            slot, expert = int(self.token_slots[token]), int(self.topk_ids[token, k])
            if slot < 0 or expert < 0:
                continue
            x = self.x[token if self.x.shape[0] == tokens else token * top_k + k].float()
            weight = 1.0 if self.weights is None else float(self.weights[token, k])
            start = 0
            for a, b, ranks in zip(self.lora_a, self.lora_b, self.ranks, strict=True):
                rank, stop = int(ranks[slot, expert]), start + b.shape[2]
                down = a[slot, expert if a.shape[1] > 1 else 0, :rank].float()
                up = b[slot, expert if b.shape[1] > 1 else 0, :, :rank].float().abs()
                of_z = unit * (down @ x).abs() + single * (down.abs() @ x.abs())
                off[token, k, start:stop] += abs(weight) * (up @ of_z)
                start = stop
        return off


def make(
    shape,
    dtype,
    width,
    out,
    max_rank,
    slices=1,
    per_pair=False,
    weighted=False,
    shared=(False,) * 2,
) -> Case:
    """A case of ``shape``; NaN past every rank, in rows of y beside the ones meant, in base rows.

    ``shared``: whether all experts share A, and B.
    """
    g = torch.Generator().manual_seed(shape.seed)
    token_slots, topk_ids = routes(shape, g)
    rows = shape.tokens * (shape.top_k if per_pair else 1)
    ranks = torch.randint(0, max_rank + 1, (slices, shape.slots, shape.experts), generator=g)
    if any(shared):  # a factor stored once has one rank
        ranks = ranks[..., :1].expand(-1, -1, shape.experts).contiguous()
    a_experts, b_experts = (1 if one else shape.experts for one in shared)
    lora_a, lora_b = [], []
    for i in range(slices):
        # Only factors that are used are touched: 384 experts in 16 slots would be all the time.
        a = torch.empty((shape.slots, a_experts, max_rank, width), dtype=dtype)
        b = torch.empty((shape.slots, b_experts, out, max_rank), dtype=dtype)
        used = {
            (int(slot), int(expert))
            for slot, ids in zip(token_slots, topk_ids, strict=True)
            for expert in ids
            if slot >= 0
        }
        for slot, expert in sorted(used):
            rank = int(ranks[i, slot, expert])
            down, up = a[slot, min(expert, a_experts - 1)], b[slot, min(expert, b_experts - 1)]
            down.fill_(NAN)[:rank] = torch.randn(rank, width, generator=g) / width**0.5
            up.fill_(NAN)[:, :rank] = torch.randn(out, rank, generator=g)
        lora_a.append(a)
        lora_b.append(b)
    y = torch.full((shape.tokens, shape.top_k, slices * out + 8), NAN, dtype=dtype)
    y = y[..., : slices * out]
    y.copy_(torch.randn(y.shape, generator=g))
    x = torch.randn(rows, width, generator=g).to(dtype)
    base = token_slots < 0
    y[base] = NAN
    x[base.repeat_interleave(rows // shape.tokens)] = NAN
    weights = torch.rand(shape.tokens, shape.top_k, generator=g) + 0.1 if weighted else None
    return Case(y, x, lora_a, lora_b, ranks, token_slots, topk_ids, weights)


def examples(number: int) -> int:
    """How many of ``number`` drawn cases a run takes: half, or all with ci/test.sh --all."""
    return number if os.environ.get("MOE_LORA_ALL") == "1" else number // 2


@contextlib.contextmanager
def poisoned():
    """Every buffer that the kernels are given unset is NaN, or numbers far outside anything."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else 0x7F7F7F7F)

    with mock.patch.object(torch, "empty", filled):
        yield


@contextlib.contextmanager
def limits(ranked=config.RANKED_PAIRS, few=config.FEW_PAIRS):
    """Other limits between the ways a batch can go, so that small ones go every way."""
    with (
        mock.patch.object(config, "RANKED_PAIRS", ranked),
        mock.patch.object(config, "FEW_PAIRS", few),
    ):
        yield
