"""Child side: the GPU's operators under experts with LoRA, in loops.

Replaced are kernels and nothing above: what is sorted, gathered and given to them is the release's
own Python. A kernel that is given stacks narrower than what it writes into reads and writes where
the real one would.
"""

from __future__ import annotations

import importlib

import int4
import stage
import torch

FUSED = "vllm.model_executor.layers.fused_moe"
NAN = float("nan")


def stand_in():
    """Replace them wherever the release has them; call after vLLM's LoRA layers are imported."""
    fused_moe = importlib.import_module(f"{FUSED}.fused_moe")
    align = importlib.import_module(f"{FUSED}.moe_align_block_size")
    for name, module, function in (
        ("moe_align_block_size", align, _align),
        ("invoke_fused_moe_triton_kernel", fused_moe, _gemm),
        ("invoke_fused_moe_kernel", fused_moe, _gemm),
    ):
        real = getattr(module, name, None)
        if real is not None:
            stage.everywhere(name, stage.bound(real, function), real)
    op = importlib.import_module("vllm.lora.ops.triton_ops.fused_moe_lora_op")
    for name, function in (
        ("_fused_moe_lora_shrink", _shrink),
        ("_fused_moe_lora_expand", _expand),
        ("_run_fused_moe_lora_one_shot", _in_one),
        ("_run_fused_moe_lora_small_batch", _in_one),
    ):
        if hasattr(op, name):
            setattr(op, name, stage.bound(getattr(op, name), function))
    for name in ("supports_tma", "supports_pdl"):
        stage.everywhere(name, lambda *args, **more: False)
    stage.everywhere("fused_moe_lora", op._fused_moe_lora)
    # There is no memory to pin, and a placeholder for Triton without its arithmetic.
    here = lambda data, dtype, *args, **more: torch.tensor(data, dtype=dtype)  # noqa: E731
    stage.everywhere("async_tensor_h2d", here)
    import vllm.triton_utils as triton_utils

    triton_utils.triton.cdiv = lambda a, b: -(-a // b)
    from vllm import _custom_ops as ops

    ops.moe_lora_align_block_size = stage.bound(ops.moe_lora_align_block_size, _lora_align)
    ops.moe_sum = stage.bound(ops.moe_sum, _sum)


def _align(given):
    """`moe_align_block_size` with blocks of one: pairs by their global expert, experts local."""
    flat = given.topk_ids.flatten()
    order = flat.argsort(stable=True).to(torch.int32)
    experts = flat[order.long()]
    if given.expert_map is not None:
        experts = given.expert_map[experts.long()]
        if getattr(given, "ignore_invalid_experts", False):
            order, experts = order[experts >= 0], experts[experts >= 0]
    return order, experts.to(torch.int32), torch.tensor([order.numel()])


def _gemm(given):
    """The grouped GEMM; pairs of other ranks' experts are written as zeros."""
    if given.use_int4_w4a16:  # up to 0.13 it has no kernel of its own
        int4._triton(given)
        return
    pairs, experts = given.sorted_token_ids, given.expert_ids
    if pairs is None:
        pairs = torch.arange(experts.numel())
    result = given.C.view(-1, given.C.shape[-1])
    for pair, expert in zip(pairs.tolist(), experts.tolist(), strict=True):
        if expert < 0:
            result[pair] = 0
            continue
        row = given.A[pair // given.top_k].float() @ given.B[expert].float().T
        if given.mul_routed_weight:
            row = row * given.topk_weights.flatten()[pair]
        bias = getattr(given, "B_bias", None)
        result[pair] = (row if bias is None else row + bias[expert]).to(result.dtype)


def _sum(given):
    """`moe_sum`, which leaves out pairs of other ranks' experts since 0.27."""
    rows = given.input.float()
    if getattr(given, "expert_map", None) is not None:
        here = given.expert_map[given.topk_ids.long()] >= 0
        rows = torch.where(here[..., None], rows, 0.0)
    given.output.copy_(rows.sum(1))


def _lora_align(given):
    """Pairs of each slot by expert, in blocks; pairs of other ranks' experts have none."""
    ids, block, nothing = given.topk_ids, given.block_size, given.topk_ids.numel()
    sorted_ids = given.sorted_token_ids.view(given.max_loras, -1)
    experts_ids = given.experts_ids.view(given.max_loras, -1)
    sorted_ids.fill_(nothing)
    experts_ids.fill_(-1)
    given.num_tokens_post_pad.zero_()
    expert_map = getattr(given, "expert_map", None)
    for slot in given.lora_ids.tolist():
        if slot < 0 or not given.adapter_enabled[slot]:
            continue
        at = 0
        for expert in range(given.num_experts):
            local = expert if expert_map is None else int(expert_map[expert])
            mine = (ids == expert) & (given.token_lora_mapping[: len(ids)] == slot)[:, None]
            pairs = mine.flatten().nonzero().flatten()
            if local < 0 or not len(pairs):
                continue
            blocks = -(-len(pairs) // block)
            sorted_ids[slot, at : at + len(pairs)] = pairs.to(sorted_ids.dtype)
            experts_ids[slot, at // block : at // block + blocks] = local
            at += blocks * block
        given.num_tokens_post_pad[slot] = at


def _pairs(given):
    """(slot, pair, local expert) of all that a kernel of LoRA works on."""
    count = given.topk_weights.numel()
    if given.sorted_token_ids is None:
        for pair, expert in enumerate(given.expert_ids.tolist()):
            slot = int(given.token_lora_mapping[pair // given.top_k_num])
            if slot >= 0 and given.adapter_enabled[slot]:
                yield slot, pair, expert
        return
    for slot in given.lora_ids.tolist():
        if slot < 0 or not given.adapter_enabled[slot]:
            continue
        row = given.sorted_token_ids[slot]
        block = row.numel() // given.expert_ids.shape[1]
        for at in range(int(given.num_tokens_post_padded[slot])):
            expert, pair = int(given.expert_ids[slot, at // block]), int(row[at])
            if expert >= 0 and pair < count:
                yield slot, pair, expert


def _matrix(stack, slot, expert, rows, columns):
    """What a kernel reads that was told of so many rows and columns, by the stack's strides."""
    one = stack[slot, expert]
    if rows <= one.shape[0] and columns <= one.shape[1]:
        return one[:rows, :columns].float()
    start = one.storage_offset()
    flat = stack.as_strided((stack.untyped_storage().nbytes() // stack.element_size(),), (1,), 0)
    at = start + torch.arange(rows)[:, None] * one.stride(0) + torch.arange(columns)
    beyond = at >= len(flat)
    return torch.where(beyond, NAN, flat[at.clamp(max=len(flat) - 1)].float())


def _shrink(given):
    cache, tokens = given.a_intermediate_cache1, given.qcurr_hidden_states
    factor = 1 if given.mul_routed_weight else given.top_k_num
    for number, stack in enumerate(given.lora_a_stacked):
        rows = cache[number].view(-1, cache.shape[-1])
        for slot, pair, expert in _pairs(given):
            a = _matrix(stack, slot, expert, given.N, tokens.shape[1])
            rows[pair, : given.N] = (a @ tokens[pair // factor].float()).to(rows.dtype)


def _expand(given):
    cache, width = given.a_intermediate_cache1, given.w1_output_dim_size
    out = given.output.view(-1, given.output.shape[-1])
    for number, stack in enumerate(given.lora_b_stacked):
        rows = cache[number].view(-1, cache.shape[-1])
        start = getattr(given, "offset", 0) + number * width
        for slot, pair, expert in _pairs(given):
            b = _matrix(stack, slot, expert, width, given.max_lora_rank)
            delta = b @ rows[pair, : given.max_lora_rank].float()
            if given.mul_routed_weight:
                delta = delta * given.topk_weights.flatten()[pair]
            target = out[pair, start : start + width]
            assert len(target) == width, "written past the row"
            target.copy_((target.float() + delta).to(out.dtype))


def _in_one(given):
    """Shrink and expand without anything between them, as from 0.22 on for most ranks."""
    factor = 1 if given.mul_routed_weight else given.top_k_num
    tokens, out = given.qcurr_hidden_states, given.output.view(-1, given.output.shape[-1])
    stacks = zip(given.lora_a_stacked, given.lora_b_stacked, strict=True)
    for a in ("sorted_token_ids", "num_tokens_post_padded", "lora_ids"):
        if not hasattr(given, a):
            setattr(given, a, None)
    for number, (a, b) in enumerate(stacks):
        rank, width = a.shape[2], b.shape[2]
        for slot, pair, expert in _pairs(given):
            down = _matrix(a, slot, expert, rank, tokens.shape[1])
            up = _matrix(b, slot, expert, width, rank)
            delta = up @ (down @ tokens[pair // factor].float())
            if given.mul_routed_weight:
                delta = delta * given.topk_weights.flatten()[pair]
            target = out[pair, number * width : (number + 1) * width]
            assert len(target) == width, "written past the row"
            target.copy_((target.float() + delta).to(out.dtype))
