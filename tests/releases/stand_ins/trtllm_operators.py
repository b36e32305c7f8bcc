"""Child side of trtllm_experts.py: FlashInfer's TRT-LLM operators for Blackwell, in loops.

After FlashInfer's documentation and its tests' reference: FC1's rows are up's, then gate's, and so
are the delta's; rows of one expert lie together, padded with whatever was there; -1 for the pairs
of other ranks' experts.
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types

import torch

TILE = 8
calls = []  # whether there was a delta, of each call


ActivationType = enum.IntEnum(
    "ActivationType", "Gelu Relu Silu Swiglu Geglu SwigluBias Relu2 SwigluStep", start=0
)


def shuffled(weight, tile):
    """Rows as the kernel's tiles of 128 want them: each 32 as 8 columns of 4. new[i] = old[this]"""
    assert tile == 128
    return torch.arange(weight.shape[0]).view(-1, 8, 4).transpose(1, 2).flatten()


def shuffled_and_in_turn(weight, tile):
    """The same of rows of which first and second half come in turn."""
    first, second = torch.arange(weight.shape[0]).chunk(2)
    return torch.stack([first, second], 1).flatten()[shuffled(weight, tile)]


def _permute(function):
    def indices(cache, weight, epilogue_tile_m, num_elts_per_sf=None, is_gated_act_gemm=True):
        assert num_elts_per_sf is None
        if not is_gated_act_gemm:
            return shuffled(weight, epilogue_tile_m)
        return function(weight, epilogue_tile_m)

    return indices


def _rows(weight, order):
    """[experts, in / 64, out, 64] as [experts, out, in], rows as before ``order``."""
    plain = weight.permute(0, 2, 1, 3).flatten(2)
    return plain[:, order(plain[0], 128).argsort()].float()


def _routes(topk_ids):
    if isinstance(topk_ids, tuple):
        return topk_ids
    bits = (topk_ids & 0xFFFF).to(torch.int32).to(torch.int16)
    return topk_ids >> 16, bits.view(torch.bfloat16)


def _run(given, w13, w2, b13, b2, activation):
    """One call; ``w13`` [experts, 2 * inner, hidden] has up's rows first."""
    ids, weights = _routes(given["topk_ids"])
    x, delta = given["hidden_states"], given["gemm1_lora_delta"]
    tokens, top_k = ids.shape
    assert (x.dtype, top_k) == (torch.bfloat16, given["top_k"])
    inner, first, count = (
        given[name] for name in ("intermediate_size", "local_expert_offset", "local_num_experts")
    )
    assert w13.shape == (count, 2 * inner, x.shape[1]), "weights of another layer"
    assert w2.shape == (count, x.shape[1], inner)
    calls.append(delta is not None)
    if delta is not None:
        assert delta.shape == (tokens, top_k, 2 * inner)
        assert (delta.is_contiguous(), delta.dtype) == (True, torch.bfloat16)
    local = ids.long() - first
    local = torch.where((local >= 0) & (local < count), local, -1).flatten()
    place, at = torch.full((tokens * top_k,), -1, dtype=torch.int32), 0
    for expert in range(count):
        pairs = (local == expert).nonzero().flatten()
        place[pairs] = torch.arange(at, at + len(pairs), dtype=torch.int32)
        at += -(-len(pairs) // TILE) * TILE
    nothing = torch.tensor(float("nan"), dtype=torch.bfloat16)
    act, out = nothing.repeat(at, inner), nothing.repeat(at, x.shape[1])
    for pair, expert in enumerate(local.tolist()):
        if expert < 0:
            continue
        token, k = divmod(pair, top_k)
        row = w13[expert] @ x[token].float() + (0 if b13 is None else b13[expert].float())
        if delta is not None:
            row = row + delta[token, k].float()
        up, gate = row.chunk(2)
        act[place[pair]] = activation(gate, up, expert).to(torch.bfloat16)
        row = w2[expert] @ act[place[pair]].float() + (0 if b2 is None else b2[expert].float())
        out[place[pair]] = row.to(torch.bfloat16)
    if delta is not None or not given["do_finalize"]:
        assert (given["do_finalize"], given["output"]) == (False, None)
        return [out, weights, place, act]
    here = torch.where((place >= 0)[:, None], out[place.long()].float(), 0.0)
    here = here.view(tokens, top_k, -1) * weights.float()[..., None]
    return given["output"].copy_(here.sum(1)[:, : given["output"].shape[1]])


def _bf16(
    topk_ids, hidden_states, gemm1_weights, gemm2_weights, num_experts, top_k, n_group, topk_group,
    intermediate_size, local_expert_offset, local_num_experts, routed_scaling_factor=None,
    routing_method_type=0, do_finalize=True, gemm1_lora_delta=None, output=None,
):  # fmt: skip
    """`trtllm_bf16_routed_moe`."""
    w13 = _rows(gemm1_weights, shuffled_and_in_turn)
    w2 = _rows(gemm2_weights, shuffled)

    def activation(gate, up, expert):
        return torch.nn.functional.silu(gate) * up

    return _run(locals(), w13, w2, None, None, activation)


def _fp4(
    topk_ids, routing_bias, hidden_states, hidden_states_scale, gemm1_weights,
    gemm1_weights_scale, gemm1_bias, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights,
    gemm2_weights_scale, gemm2_bias, output1_scale_scalar, output1_scale_gate_scalar,
    output2_scale_scalar, num_experts, top_k, n_group, topk_group, intermediate_size,
    local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type=0,
    do_finalize=True, enable_pdl=None, activation_type=3, output=None, tune_max_num_tokens=8192,
    gemm1_lora_delta=None,
):  # fmt: skip
    """`trtllm_fp4_block_scale_routed_moe`, of weights that are not packed: [experts, out, in]."""
    assert gemm1_lora_delta is None or gemm1_bias is None, "they cannot both be provided"
    assert activation_type == ActivationType.Swiglu

    def rows(weight):  # up and gate in turn, shuffled
        plain = weight[:, shuffled(weight[0], 128).argsort()].float()
        return torch.cat([plain[:, ::2], plain[:, 1::2]], 1)

    def activation(gate, up, expert):
        if gemm1_clamp_limit is not None:
            limit = gemm1_clamp_limit[expert]
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        alpha = 1.0 if gemm1_alpha is None else gemm1_alpha[expert]
        beta = 0.0 if gemm1_beta is None else gemm1_beta[expert]
        return gate * torch.sigmoid(alpha * gate) * (up + beta)

    w2 = gemm2_weights[:, shuffled(gemm2_weights[0], 128).argsort()].float()
    b13 = None if gemm1_bias is None else rows(gemm1_bias)
    b2 = gemm2_bias
    if b2 is not None:
        b2 = b2[:, shuffled(b2[0], 128).argsort()]
    return _run(locals(), rows(gemm1_weights), w2, b13, b2, activation)


def _pack(topk_ids, topk_weights, block_size=1024):
    """vLLM's `trtllm_moe_pack_topk_ids_weights`: the number, and the weight's bits in bf16."""
    bits = topk_weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (topk_ids.to(torch.int32) << 16) | bits


def stand_in():
    """A `flashinfer` of these. Returns the release's module of the experts."""
    made = {}
    for name in ("flashinfer", "flashinfer.fused_moe", "flashinfer.fused_moe.core"):
        made[name] = sys.modules[name] = types.ModuleType(name)
        made[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        made[name].__path__ = []
    top, fused_moe, core = made.values()
    top.fused_moe, fused_moe.core = fused_moe, core
    fused_moe.trtllm_bf16_routed_moe = _bf16
    top.trtllm_fp4_block_scale_routed_moe = _fp4
    core.ActivationType = ActivationType
    core._maybe_get_cached_w3_w1_permute_indices = _permute(shuffled_and_in_turn)
    core.get_w2_permute_indices_with_cache = _permute(shuffled)
    return _module()


def _module():
    """vLLM's, whose two small kernels run in Triton's interpreter."""
    import triton
    import vllm.triton_utils as utils
    from vllm.model_executor.layers.fused_moe import utils as packing

    if hasattr(packing, "trtllm_moe_pack_topk_ids_weights"):
        packing.trtllm_moe_pack_topk_ids_weights = _pack
    held = utils.triton, utils.tl
    utils.triton, utils.tl = triton, triton.language
    try:
        from vllm.model_executor.layers.fused_moe.experts import trtllm_lora_moe
    finally:
        utils.triton, utils.tl = held
    return trtllm_lora_moe
