"""Child side: FP8 experts with one scale an expert, tokens quantised as they come."""

from __future__ import annotations

import importlib

import int4
import stage
import torch
from int4 import EXPERTS, HIDDEN, INNER

FP8 = torch.float8_e4m3fn


class Weights:
    """Two projections' FP8 weights: ``q`` [experts, out, in] and a scale for each expert."""

    hidden, inner, layer, act = HIDDEN, INNER, int4.Weights.layer, staticmethod(int4.silu)

    def __init__(self, seed):
        make = torch.Generator().manual_seed(seed)
        self.q, self.scale = {}, {}
        for name, k, n in (("w13", HIDDEN, 2 * INNER), ("w2", INNER, HIDDEN)):
            self.q[name] = (100 * torch.randn(EXPERTS, n, k, generator=make)).to(FP8)
            self.scale[name] = 0.0005 + 0.001 * torch.rand(EXPERTS, generator=make)

    def dense(self, name):
        """[experts, out, in] in fp32."""
        return self.q[name].float() * self.scale[name][:, None, None]


def fill(layer, weights):
    for name in ("w13", "w2"):
        getattr(layer, f"{name}_weight").data.copy_(weights.q[name])
        scale = getattr(layer, f"{name}_weight_scale").data
        scale.copy_(
            weights.scale[name][:, None].expand(EXPERTS, 2)
            if name == "w13"
            else (weights.scale[name])
        )


def method():
    """Makes `Fp8MoEMethod` for a layer."""
    from vllm.model_executor.layers.quantization import fp8

    config = fp8.Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic")
    return lambda layer: fp8.Fp8MoEMethod(config, layer)


def _quant(given):
    """`scaled_fp8_quant`"""
    value = given.input.float()
    if given.scale is None:
        dim = -1 if given.use_per_token_if_dynamic else None
        top = value.abs().amax(dim, keepdim=True) if dim else value.abs().max().reshape(1)
        given.scale = (top / torch.finfo(FP8).max).float()
    return (value / given.scale).clamp(-448, 448).to(FP8), given.scale


def _triton(given):
    """`invoke_fused_moe_triton_kernel`"""
    assert given.use_fp8_w8a8
    assert given.A.dtype == given.B.dtype == FP8
    given.mul = given.mul_routed_weight
    tokens = given.A.float() * given.A_scale
    weights = given.B.float() * given.B_scale.reshape(EXPERTS, 1, 1)
    stage.product(given, tokens, weights, given.C, given.C.shape[-1])


def stand_in():
    """Replace the operators of FP8 experts, and the question which kernel this GPU has."""
    from vllm import _custom_ops as ops

    where = "vllm.model_executor.layers.fused_moe"
    fused_moe = importlib.import_module(f"{where}.fused_moe")
    oracle = importlib.import_module(f"{where}.oracle.fp8")
    try:
        triton = importlib.import_module(f"{where}.experts.triton_moe").TritonExperts
    except ImportError:
        triton = fused_moe.TritonExperts
    ops.scaled_fp8_quant = stage.bound(ops.scaled_fp8_quant, _quant)
    found = (oracle.Fp8MoeBackend.TRITON, triton)
    stage.everywhere("select_fp8_moe_backend", lambda *args, **more: found)
    for name, function in (
        ("invoke_fused_moe_triton_kernel", _triton),
        ("_prepare_expert_assignment", stage.align),
    ):
        real = getattr(fused_moe, name, None)
        if real is not None:
            stage.everywhere(name, stage.bound(real, function), real)
