"""Child side: MXFP8 experts (a scale of two's power for 32 weights), tokens quantised alike."""

from __future__ import annotations

import importlib
import sys
import types

import stage
import torch
from int4 import EXPERTS

FP8, BLOCK = torch.float8_e4m3fn, 32
ALPHA, BETA, LIMIT = 1.3, 0.8, 2.0  # none is what anything falls back to
_used = []  # by the kernel; up to 0.27 this method does not pass alpha and beta on
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class Weights:
    """Two projections' FP8 weights: ``q`` [experts, out, in], ``scale`` [experts, out, in / 32]
    as exponents with a bias of 127."""

    hidden = inner = 128
    layer = types.MappingProxyType(
        {
            "activation": "swigluoai_uninterleave",
            "swiglu_alpha": ALPHA,
            "swiglu_beta": BETA,
            "swiglu_limit": LIMIT,
        }
    )

    def __init__(self, seed):
        make = torch.Generator().manual_seed(seed)
        self.q, self.scale = {}, {}
        for name, k, n in (
            ("w13", self.hidden, 2 * self.inner),
            ("w2", self.inner, self.hidden),
        ):
            self.q[name] = (100 * torch.randn(EXPERTS, n, k, generator=make)).to(FP8)
            shape = (EXPERTS, n, k // BLOCK)
            self.scale[name] = torch.randint(116, 119, shape, generator=make).to(torch.uint8)

    def dense(self, name):
        """[experts, out, in] in fp32."""
        return dequantise(self.q[name], self.scale[name])

    @staticmethod
    def act(gate, up):
        alpha, beta, limit = _used[-1]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)


def dequantise(q, scale):
    return q.float() * torch.exp2(scale.float() - 127).repeat_interleave(BLOCK, dim=-1)


def fill(layer, weights):
    for name in ("w13", "w2"):
        getattr(layer, f"{name}_weight").data.copy_(weights.q[name])
        getattr(layer, f"{name}_weight_scale").data.copy_(weights.scale[name])


def method():
    """Makes compressed-tensors' MXFP8 method for a layer."""
    where = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    module = importlib.import_module(f"{where}.compressed_tensors_moe_w8a8_mxfp8")
    return lambda layer: module.CompressedTensorsW8A8Mxfp8MoEMethod(layer.moe_config)


class _Kernel:
    """`_mxfp8_grouped_gemm_kernel` in loops."""

    def __init__(self, real):
        self.real = real

    def __getitem__(self, grid):
        launch = stage.bound(self.real, _gemm)
        return lambda *args, num_warps, num_stages, **more: launch(*args, **more)


def _gemm(given):
    tokens = dequantise(given.a_ptr, given.a_scale_ptr)
    weights = dequantise(given.b_ptr, given.b_scale_ptr)
    call = types.SimpleNamespace(
        sorted_token_ids=given.sorted_token_ids_ptr,
        expert_ids=given.expert_ids_ptr,
        top_k=given.A_DIV,
        mul=given.MUL_WEIGHT,
        topk_weights=given.topk_weights_ptr,
    )
    stage.product(call, tokens, weights, given.c_ptr, given.N)


def _swiglu(gate_up, alpha, beta, limit, block_m=64):
    """`swiglu_oai_quantize_mxfp8`"""
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils

    assert limit == LIMIT
    assert (alpha, beta) in ((ALPHA, BETA), (1.702, 1.0))
    _used.append((alpha, beta, limit))
    return mxfp8_utils._mxfp8_e4m3_quantize_torch(Weights.act(*gate_up.float().chunk(2, -1)))


def stand_in():
    """Replace the operators of native MXFP8 experts, and the question which kernel there is."""
    native = importlib.import_module(f"{_FUSED_MOE}.experts.mxfp8_native_moe")
    oracle = importlib.import_module(f"{_FUSED_MOE}.oracle.mxfp8")
    kernel = native._mxfp8_grouped_gemm_kernel
    native._mxfp8_grouped_gemm_kernel = _Kernel(getattr(kernel, "fn", kernel))
    quantize = sys.modules[native.mxfp8_e4m3_quantize.__module__]._mxfp8_e4m3_quantize_torch
    native.mxfp8_e4m3_quantize = quantize
    name = "vllm.models.minimax_m3.amd.ops"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].swiglu_oai_quantize_mxfp8 = _swiglu
    kinds = oracle.Fp8MoeBackend
    kind = getattr(kinds, "TRITON_MXFP8", None) or kinds.NATIVE_MXFP8
    found = (kind, native.Mxfp8NativeTritonExperts)
    stage.everywhere("select_mxfp8_moe_backend", lambda *args, **more: found)
