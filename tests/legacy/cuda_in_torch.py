"""What only CUDA and Triton run in vLLM 0.11.1's quantised MoE layers, in torch.

Each works from the very tensors that the op is handed: packed weights in their kernel's layout,
scales and zero points permuted for it, sorted token ids, an expert for each block. Marlin's layout
is the real one: upstream's own Python model of it (its `marlin_utils_test`, which upstream's tests
hold against the CUDA repacking) packs here in the repacking's place, and is inverted in the gemm.
Sums are in fp32, results in the dtype of the output, as in the kernels.
"""

from __future__ import annotations

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def install(monkeypatch):
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe import fused_marlin_moe, fused_moe
    from vllm.triton_utils import tl, triton

    for op in (
        topk_softmax,
        moe_align_block_size,
        moe_sum,
        moe_wna16_marlin_gemm,
        gptq_marlin_moe_repack,
        awq_marlin_moe_repack,
    ):
        monkeypatch.setattr(ops, op.__name__, op)
    monkeypatch.setattr(fused_moe, "fused_moe_kernel_gptq_awq", TritonKernel())
    monkeypatch.setattr(triton, "cdiv", lambda a, b: -(-a // b), raising=False)
    for name in ("float16", "bfloat16", "float32"):
        monkeypatch.setattr(tl, name, name, raising=False)
    for name in ("marlin_make_workspace_new", "maybe_warn_marlin_atomic_add"):
        monkeypatch.setattr(fused_marlin_moe, name, lambda *args: None)


def topk_softmax(topk_weights, topk_ids, token_expert_indices, gating_output, renormalize=False):
    weights, ids = gating_output.float().softmax(-1).topk(topk_ids.shape[1])
    topk_weights.copy_(weights / weights.sum(-1, keepdim=True) if renormalize else weights)
    topk_ids.copy_(ids)


def moe_align_block_size(topk_ids, num_experts, block_size, sorted_ids, expert_ids, count):
    _align(topk_ids.flatten(), num_experts, block_size, sorted_ids, expert_ids, count)


def _align(ids, num_experts, block_size, sorted_ids, expert_ids, count):
    """Pairs by expert, each expert padded to whole blocks; -1 in ``ids`` belongs to nobody."""
    sorted_ids.fill_(ids.numel())
    expert_ids.fill_(-1)
    start = 0
    for expert in range(num_experts):
        own = (ids == expert).nonzero().flatten()
        sorted_ids[start : start + own.numel()] = own
        blocks = -(-own.numel() // block_size)
        expert_ids[start // block_size : start // block_size + blocks] = expert
        start += blocks * block_size
    count.fill_(start)


def _blocks(sorted_ids, expert_ids, count, block_size, valid):
    for block in range(int(count) // block_size):
        ids = sorted_ids[block * block_size : (block + 1) * block_size].long()
        yield ids[ids < valid], int(expert_ids[block])


def _demand_apart(given, result):
    """A kernel that overwrites what other blocks of it are still to read is wrong."""
    if given.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():
        return
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (given, result)]
    (first, last), (start, stop) = ends
    assert last <= start or stop <= first, "an op's input and output share memory"


def moe_sum(input, output):
    _demand_apart(input, output)
    output.copy_(input.float().sum(1))


def _nibbles(packed):
    """[..., words] int32 -> [..., 8 words], lowest first."""
    return ((packed.long()[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def _spread(values, places):
    """The inverse of gathering: out[places] = values, in the shape of ``places``' source."""
    out = torch.empty_like(values)
    out.view(-1)[places.flatten()] = values.flatten()
    return out


def _weight_perm():
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test

    return marlin_utils_test.get_weight_perm(4)


def _to_marlin(q, size_k, size_n):
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test

    return marlin_utils_test.marlin_weights(q.int(), size_k, size_n, 4, _weight_perm())


def gptq_marlin_moe_repack(b_q_weight, perm, size_k, size_n, num_bits):
    assert num_bits == 4
    out = []
    for packed, order in zip(b_q_weight, perm, strict=True):
        q = _nibbles(packed.t()).t()  # eight rows in a word
        out.append(_to_marlin(q[order.long()] if order.numel() else q, size_k, size_n))
    return torch.stack(out)


def awq_marlin_moe_repack(b_q_weight, perm, size_k, size_n, num_bits):
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).argsort()
    qs = [_nibbles(one).unflatten(1, (-1, 8))[..., order].flatten(1) for one in b_q_weight]
    return torch.stack([_to_marlin(q, size_k, size_n) for q in qs])


def _from_marlin(packed, scales, zeros, g_idx, size_k, size_n):
    """[in, out] fp32 of one expert."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test

    places = torch.arange(size_k * size_n).view(size_k, size_n)
    places = marlin_utils_test.marlin_permute_weights(places, size_k, size_n, _weight_perm())
    q = _spread(_nibbles(packed), places).view(size_k, size_n)
    groups = scales.shape[0]
    group = size_k // groups if groups > 1 else -1
    places = torch.arange(scales.numel()).view(scales.shape)
    places = marlin_utils.marlin_permute_scales(places, size_k, size_n, group)
    scales = _spread(scales.float(), places)
    of = g_idx.long() if g_idx is not None and g_idx.numel() else None
    if of is None:
        of = torch.arange(size_k) // (size_k // groups)
    if zeros is None:
        zero = torch.full_like(scales, 8)
    else:
        places = torch.arange(scales.numel()).view(-1, 64)[:, marlin_utils.get_scale_perms()[0]]
        places = places.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]]
        zero = _spread(_nibbles(zeros), places).float()
    return (q.float() - zero[of]) * scales[of]


def moe_wna16_marlin_gemm(
    input,
    output,
    b_qweight,
    b_bias,
    b_scales,
    global_scale,
    b_qzeros,
    g_idx,
    perm,
    workspace,
    sorted_token_ids,
    expert_ids,
    num_tokens_past_padded,
    topk_weights,
    *,
    moe_block_size,
    top_k,
    mul_topk_weights,
    is_ep,
    b_q_type,
    size_m,
    size_n,
    size_k,
    is_k_full,
    use_atomic_add,
    use_fp32_reduce,
    is_zp_float,
):
    from vllm.scalar_type import scalar_types

    assert b_q_type == (scalar_types.uint4b8 if b_qzeros is None else scalar_types.uint4)
    assert b_bias is None
    assert global_scale is None
    assert not is_zp_float
    _demand_apart(input, output)
    given, result = input.view(size_m, size_k).float(), output.view(-1, size_n)
    values = torch.full(result.shape, float("nan"))
    args = (sorted_token_ids, expert_ids, num_tokens_past_padded, moe_block_size, size_m * top_k)
    for ids, expert in _blocks(*args):
        zeros = None if b_qzeros is None else b_qzeros[expert]
        order = None if perm is None or not perm[expert].numel() else perm[expert].long()
        own = None if order is None else g_idx[expert]
        w = _from_marlin(b_qweight[expert], b_scales[expert], zeros, own, size_k, size_n)
        x = given[ids // top_k]
        y = (x if order is None else x[:, order]) @ w
        values[ids] = y * topk_weights.flatten()[ids, None] if mul_topk_weights else y
    result.copy_(values)
    return output


class TritonKernel:
    """`fused_moe_kernel_gptq_awq[grid](...)`: two values in a byte along the input, low first."""

    def __getitem__(self, grid):
        return self

    def __call__(
        self,
        a,
        b,
        c,
        b_scale,
        b_zp,
        topk_weights,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        size_n,
        size_k,
        em,
        num_valid_tokens,
        *strides,
        group_size,
        MUL_ROUTED_WEIGHT,
        top_k,
        has_zp,
        use_int4_w4a16,
        BLOCK_SIZE_M,
        **more,
    ):
        assert use_int4_w4a16
        _demand_apart(a, c)
        result = c.view(-1, size_n)
        values = torch.full(result.shape, float("nan"))
        args = (sorted_token_ids, expert_ids, num_tokens_post_padded, BLOCK_SIZE_M)
        for ids, expert in _blocks(*args, num_valid_tokens):
            q = torch.stack([b[expert] & 15, b[expert] >> 4], -1).flatten(1).float()
            zero = torch.full_like(b_scale[expert], 8)
            if has_zp:
                zero = torch.stack([b_zp[expert] & 15, b_zp[expert] >> 4], 1).flatten(0, 1)
            of = torch.arange(size_k) // group_size
            w = (q - zero.float()[:, of]) * b_scale[expert].float()[:, of]
            y = a[ids // top_k].float() @ w.t()
            values[ids] = y * topk_weights.flatten()[ids, None] if MUL_ROUTED_WEIGHT else y
        result.copy_(values)


class PunicaInTorch(PunicaWrapperCPU):
    """The two MoE ops of `PunicaWrapperGPU`, with the signatures of its base class."""

    def moe_lora_align_block_size(
        self,
        topk_ids,
        num_tokens,
        block_size,
        num_experts,
        max_loras,
        adapter_enabled,
        expert_map=None,
        pad_sorted_ids=False,
    ):
        assert expert_map is None
        width = topk_ids.numel() + num_experts * (block_size - 1)
        found = torch.empty(max_loras, width, dtype=torch.int32)
        experts = torch.empty(max_loras, -(-width // block_size), dtype=torch.int32)
        counts = torch.empty(max_loras, dtype=torch.int32)
        slots = self.token_lora_indices[:num_tokens]
        for slot in range(max_loras):
            own = (slots == slot) & bool(adapter_enabled[slot])
            ids = topk_ids.masked_fill(~own[:, None], -1).flatten()
            _align(ids, num_experts, block_size, found[slot], experts[slot], counts[slot])
        return found.flatten(), experts.flatten(), counts

    def add_lora_fused_moe(
        self,
        y,
        x,
        lora_a_stacked,
        lora_b_stacked,
        topk_weights,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        max_lora_rank,
        top_k_num,
        shrink_config,
        expand_config,
        adapter_enabled,
        mul_routed_weight=False,
    ):
        flat = y.view(-1, y.shape[-1])
        each = flat.shape[0] // x.shape[0]  # rows of y for one of x: top_k before w13, 1 before w2
        assert each == (1 if mul_routed_weight else top_k_num)
        rows = y.shape[-1] // len(lora_a_stacked)
        for slot in range(adapter_enabled.numel() - 1):
            args = (sorted_token_ids[slot], expert_ids[slot], num_tokens_post_padded[slot])
            for ids, expert in _blocks(*args, shrink_config["BLOCK_SIZE_M"], flat.shape[0]):
                for i, (a, b) in enumerate(zip(lora_a_stacked, lora_b_stacked, strict=True)):
                    assert a.shape[-2] == max_lora_rank
                    down = x[ids // each].float() @ a[slot, expert].float().t()
                    delta = down @ b[slot, expert].float().t()
                    if mul_routed_weight:
                        delta = delta * topk_weights.flatten()[ids, None]
                    part = flat[:, i * rows : (i + 1) * rows]
                    part[ids] = (part[ids].float() + delta).to(flat.dtype)
