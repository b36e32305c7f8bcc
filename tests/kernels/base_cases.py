"""Random calls of the base's grouped product with LoRA, for interpreter and GPU alike."""

from __future__ import annotations

from dataclasses import dataclass

import lora_cases as cases
import torch

from vllm_moe_lora.kernels.triton.factors import Factors, active_segments
from vllm_moe_lora.kernels.triton.grouped import Lora, Order, grouped_product
from vllm_moe_lora.kernels.triton.route import route

SPARE = 3  # blocks that an order has room for beyond those in use


def ordered(topk_ids, experts, block_m):
    """`Order` as `moe_align_block_size` makes it; absent experts' pairs (-1) in blocks of -1."""
    pairs, ids, blocks = topk_ids.numel(), [], []
    flat = topk_ids.flatten().tolist()
    for expert in (-1, *range(experts)):
        own = [pair for pair, one in enumerate(flat) if one == expert]
        own += [pairs] * (-len(own) % block_m)
        ids += own
        blocks += [expert] * (len(own) // block_m)
    used = len(ids)
    ids += [0x7F7F7F7F] * (SPARE * block_m)
    blocks += [0x7F7F7F7F] * SPARE
    return Order(*(torch.tensor(one, dtype=torch.int32) for one in (ids, blocks, [used])), block_m)


def few(case, block_m):
    """`Order` as vLLM makes it of few pairs: not at all."""
    used = torch.tensor([case.topk_ids.numel() * block_m], dtype=torch.int32)
    return Order(None, case.topk_ids.flatten(), used, block_m)


@dataclass
class Base:
    """A case of lora_cases with a base: weight [experts, slices * out, in]."""

    case: cases.Case
    weight: torch.Tensor
    slices: int
    experts: int

    def base(self):
        """[tokens, top_k, out] fp32: what there is without LoRA, and how far a sum may be off."""
        tokens, top_k = self.case.topk_ids.shape
        out = torch.zeros(tokens, top_k, self.weight.shape[1])
        off = torch.zeros_like(out)
        x, weight = self.case.x.float(), self.weight.float()
        for token in range(tokens):
            for k in range(top_k):
                expert = int(self.case.topk_ids[token, k])
                if expert < 0:
                    continue
                row = x[token if len(x) == tokens else token * top_k + k]
                by = 1.0 if self.case.weights is None else float(self.case.weights[token, k])
                out[token, k] = by * (weight[expert] @ row)
                off[token, k] = by * (weight[expert].abs() @ row.abs()) * row.numel() * 2.0**-24
        return out, off

    def run(self, block_m, lora=True, token_slots=None, device="cpu", is_sorted=True):
        """y [tokens, top_k, out] after the kernel, NaN where it wrote nothing."""
        case, tokens, top_k = self.case, *self.case.topk_ids.shape
        y = torch.full((tokens * top_k, self.weight.shape[1] + 8), cases.NAN, dtype=case.y.dtype)
        y = y.to(device)[:, : self.weight.shape[1]]
        slots = (case.token_slots if token_slots is None else token_slots).to(device)
        given = None
        if lora:
            a, b = (
                [one.to(device) if isinstance(one, torch.Tensor) else one for one in stack]
                for stack in (case.lora_a, case.lora_b)
            )
            factors = Factors(a, b, self.experts)
            for slot in range(factors.num_slots):
                factors.set_ranks(slot, case.ranks[:, slot])
            routing = route(
                case.topk_ids.to(device), slots, factors.num_slots, self.experts, y.dtype,
                active=active_segments(factors),
            )  # fmt: skip
            given = Lora(factors, routing, slots)
        order = ordered(case.topk_ids, self.experts, block_m) if is_sorted else few(case, block_m)
        moved = (order.sorted_ids, order.expert_ids, order.num_padded)
        grouped_product(
            y,
            case.x.to(device),
            self.weight.to(device),
            Order(*(one if one is None else one.to(device) for one in moved), block_m),
            top_k,
            None if case.weights is None else case.weights.to(device),
            given,
            self.slices,
        )
        return y.view(tokens, top_k, -1)


def make(shape, dtype, width, out, max_rank, slices=1, per_pair=False, weighted=False,
         shared=(False,) * 2):  # fmt: skip
    case = cases.make(shape, dtype, width, out, max_rank, slices, per_pair, weighted, shared)
    g = torch.Generator().manual_seed(shape.seed + 1)
    case.x.copy_(torch.randn(case.x.shape, generator=g))  # base tokens have a base
    absent = torch.rand(case.topk_ids.shape, generator=g) < 0.1
    case.topk_ids[absent] = -1
    weight = torch.randn(shape.experts, slices * out, width, generator=g) / width**0.5
    return Base(case, weight.to(dtype), slices, shape.experts)
