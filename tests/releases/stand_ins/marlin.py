"""Child side: Marlin's operators for INT4, FP8 and MXFP4 experts, in loops.

What puts weights, scales and biases into the order of the kernels leaves them as they are here.
Pairs of experts that are not here are left out, as Marlin leaves them out: their rows are not
written.
"""

from __future__ import annotations

import importlib

import fp8
import int4
import oai
import stage
import torch

AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the column of each nibble
BLOCK = 32  # of FP8 weights with a scale for each block
_WHERE = "vllm.model_executor.layers"


class Sizes:
    """Of layers here."""

    hidden, inner, layer = 64, 128, int4.Weights.layer


class Biased(Sizes):
    """As gpt-oss has them."""

    layer = oai.Weights.layer


def _fp8_blocks():
    from vllm.model_executor.layers.quantization import fp8 as module

    more = {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config = module.Fp8Config(is_checkpoint_fp8_serialized=True, **more)
    return lambda layer: module.Fp8MoEMethod(config, layer)


# Kind -> (sizes, what makes a method, its oracle, the name of the oracle's backends).
KINDS = {
    "fp8-marlin": (Sizes, fp8.method, "fp8", "Fp8MoeBackend"),
    "fp8-blocks-marlin": (Sizes, _fp8_blocks, "fp8", "Fp8MoeBackend"),
    "mxfp4-marlin": (Biased, oai.method, "mxfp4", "Mxfp4MoeBackend"),
}


def choose(kind):
    """Have the oracle choose Marlin; for the kind "fp8" Triton, which quantises the tokens, too."""
    *_, name, backends = KINDS.get(kind, KINDS["fp8-marlin"])
    oracle = importlib.import_module(f"{_WHERE}.fused_moe.oracle.{name}")
    experts = importlib.import_module(f"{_WHERE}.fused_moe.experts.marlin_moe").MarlinExperts
    backend = getattr(oracle, backends).MARLIN
    if kind == "fp8":
        experts = importlib.import_module(f"{_WHERE}.fused_moe.experts.triton_moe").TritonExperts
        backend = getattr(oracle, backends).TRITON
    found = (backend, experts)
    stage.everywhere(f"select_{name}_moe_backend", lambda *args, **more: found)


def _in_order(nibbles):
    """Undo AWQ's order along the last dimension."""
    return nibbles.unflatten(-1, (-1, 8))[..., AWQ_ORDER.argsort()].flatten(-2)


def _dense(given):
    """[experts, out, in] in fp32."""
    from vllm.scalar_type import scalar_types

    experts, k, n = len(given.b_qweight), given.size_k, given.size_n
    packed, scale = given.b_qweight.reshape(experts, -1), given.b_scales.float()
    assert (given.b_q_type == scalar_types.uint4) == (given.b_qzeros is not None)
    scale = scale.repeat_interleave(k // scale.shape[1], 1).transpose(1, 2)
    if given.b_q_type == scalar_types.float8_e4m3fn:
        words = packed.reshape(experts, k // 4, n).transpose(1, 2).contiguous()
        return words.view(fp8.FP8).float() * scale
    if given.b_q_type == scalar_types.float4_e2m1f:
        codes = int4.unpack(packed.reshape(experts, k // 8, n), 1)
        return oai._FP4[codes].transpose(1, 2) * scale
    q = int4.unpack(packed, 1).reshape(experts, k, n)
    zero = 8
    if given.b_qzeros is not None:
        zero = _in_order(int4.unpack(given.b_qzeros, 2)).repeat_interleave(int4.GROUP, 1)
    return (q - zero).transpose(1, 2) * scale


def _gemm(given):
    """`moe_wna16_marlin_gemm`"""
    output = given.output
    if output is None:
        output = given.input.new_full((given.size_m * given.top_k, given.size_n), torch.nan)
    result = output.view(-1, given.size_n)
    _product(given, given.input, _dense(given), given.b_bias, given.mul_topk_weights, result)
    return output


def _plain(given):
    """`invoke_fused_moe_triton_kernel`, of unquantised experts with a bias, too."""
    if given.use_fp8_w8a8:
        return fp8._triton(given)
    result = given.C.view(-1, given.C.shape[-1])
    _product(given, given.A, given.B.float(), given.B_bias, given.mul_routed_weight, result)
    return None


def _product(given, tokens, weights, bias, weighted, result):
    """Write each pair's row; ``weights`` [experts, out, in] in fp32."""
    for pair, expert in zip(
        given.sorted_token_ids.tolist(), given.expert_ids.tolist(), strict=True
    ):
        row = weights[expert] @ tokens[pair // given.top_k].float()
        if bias is not None:
            row = row + bias[expert].float()
        if weighted:
            row = row * given.topk_weights.flatten()[pair]
        result[pair] = row.to(result.dtype)


def _align(given):
    """`moe_align_block_size` with blocks of one, without pairs of experts that are not here."""
    order, experts, _ = stage.align(given)
    if given.expert_map is not None:
        assert given.ignore_invalid_experts
        experts = given.expert_map[experts.long()]
        order, experts = order[experts >= 0], experts[experts >= 0]
    return order, experts, torch.tensor([order.numel()])


def _sum(input, output, topk_ids=None, expert_map=None):
    if expert_map is not None:
        input = input.masked_fill((expert_map[topk_ids.long()] < 0)[..., None], 0)
    output.copy_(input.float().sum(1))


def _repack(given):
    """`gptq_marlin_repack`, of one expert: only the shape."""
    wide = given.size_n * given.num_bits // 2
    return given.b_q_weight.reshape(given.size_k // 16, wide)


def stand_in():
    """Replace the operators, also those of `int4` and `fp8` for experts in Triton."""
    from vllm import _custom_ops as ops

    utils = f"{_WHERE}.quantization.utils"
    for name in ("marlin_utils", "marlin_utils_fp4", "marlin_utils_fp8"):
        importlib.import_module(f"{utils}.{name}")
    aligned = importlib.import_module(f"{_WHERE}.fused_moe.moe_align_block_size")
    align = stage.bound(aligned.moe_align_block_size, _align)
    marlin = importlib.import_module(f"{_WHERE}.fused_moe.experts.marlin_moe")
    gemm = stage.bound(ops.moe_wna16_marlin_gemm, _gemm)
    fused_moe = importlib.import_module(f"{_WHERE}.fused_moe.fused_moe")
    name = "invoke_fused_moe_triton_kernel"
    real = getattr(fused_moe, name)
    fp8.stand_in()
    int4.stand_in()
    stage.everywhere(name, stage.bound(real, _plain))
    marlin.moe_align_block_size = align
    marlin.MarlinExperts._supports_current_device = staticmethod(lambda: True)
    ops.moe_wna16_marlin_gemm, ops.moe_sum = gemm, _sum
    ops.awq_marlin_moe_repack = lambda b, *args, **more: int4._marlin(_in_order(int4.unpack(b, 2)))
    ops.gptq_marlin_repack = stage.bound(ops.gptq_marlin_repack, _repack)
    for name in ("marlin_permute_scales", "marlin_permute_bias", "mxfp4_marlin_process_scales"):
        stage.everywhere(name, _first)
    stage.everywhere("fp8_fused_exponent_bias_into_scales", _first)


def _first(s=None, *args, scales=None, **more):
    """An argument that has its order already."""
    return scales if s is None else s
