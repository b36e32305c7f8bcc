"""Child side: INT4 experts as each format stores them, and the operators that read them back."""

from __future__ import annotations

import copy
import os
import types

import stage
import torch

EXPERTS, GROUP = 4, 32
HIDDEN = INNER = int(os.environ.get("MOE_LORA_SIZE", "64"))  # a GPU's kernels want more
GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
AWQ = {"bits": 4, "group_size": GROUP, "zero_point": True, "lm_head": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, "group_size": GROUP}}
    },
}


def pack(values, dim, dtype=torch.int32):
    """Nibbles along ``dim``, lowest first, into ``dtype``."""
    width = torch.iinfo(dtype).bits // 4
    parts = values.long().unflatten(dim, (-1, width)).movedim(dim + 1, -1)
    whole = (parts << (4 * torch.arange(width))).sum(-1)
    if dtype is torch.int32:
        whole = torch.where(whole >= 2**31, whole - 2**32, whole)
    return whole.to(dtype)


def unpack(packed, dim):
    """The reverse of `pack`, to int64."""
    width = packed.element_size() * 2
    parts = packed.long().unsqueeze(-1) >> (4 * torch.arange(width)) & 15
    return parts.movedim(-1, dim + 1).flatten(dim, dim + 1)


def silu(gate, up):
    return torch.nn.functional.silu(gate) * up


class Weights:
    """Two projections' INT4 weights: ``q`` [experts, in, out], scales and zeros per group.

    With 8 ``bits`` INT8 weights, without zeros.
    """

    hidden = HIDDEN
    layer = types.MappingProxyType({})
    act = staticmethod(silu)

    def __init__(self, seed, zeros, inner=INNER, bits=4):
        self.inner, self.bits = inner, bits
        make = torch.Generator().manual_seed(seed)
        self.q, self.scale, self.zero = {}, {}, {}
        for name, k, n in (("w13", HIDDEN, 2 * inner), ("w2", inner, HIDDEN)):
            shape = (EXPERTS, k // GROUP, n)
            self.q[name] = torch.randint(0, 2**bits, (EXPERTS, k, n), generator=make)
            scale = 0.02 + 0.02 * torch.rand(shape, generator=make)
            self.scale[name] = (scale * 2 ** (4 - bits)).half().float()
            self.zero[name] = torch.randint(3, 13, shape, generator=make) if zeros else None

    def dense(self, name):
        """[experts, out, in] in fp32."""
        return dequantise(self.q[name], self.scale[name], self.zero[name], self.bits)

    def part(self, experts, inner):
        """These experts, and of the inner dimension this slice of whole groups."""
        found = copy.copy(self)
        found.inner = inner.stop - inner.start
        groups = slice(inner.start // GROUP, inner.stop // GROUP)
        for name in ("q", "scale", "zero"):
            both = dict(getattr(self, name))
            for which, value in both.items():
                if value is None:
                    continue
                value = value[experts]
                if which == "w13":
                    value = value.unflatten(2, (2, -1))[..., inner].flatten(2)
                else:
                    value = value[:, inner if name == "q" else groups]
                both[which] = value
            setattr(found, name, both)
        return found


def dequantise(q, scale, zero, bits=4):
    """[experts, out, in] in fp32 from q [experts, in, out], scale and zero [experts, groups, out];
    the middle where there are no zeros."""
    zero = 2 ** (bits - 1) if zero is None else zero.repeat_interleave(GROUP, dim=1)
    return ((q - zero) * scale.float().repeat_interleave(GROUP, dim=1)).transpose(1, 2)


def fill(layer, kind, weights):
    """Write ``weights`` into the parameters of ``layer`` as a checkpoint of ``kind`` has them."""
    for name in ("w13", "w2"):
        q, scale, zero = weights.q[name], weights.scale[name], weights.zero[name]
        if kind == "awq":
            found = {"qweight": pack(q, 2), "scales": scale, "qzeros": pack(zero, 2)}
        elif kind.startswith("moe_wna16"):
            bytes_ = q.transpose(1, 2).to(torch.uint8)
            found = {"qweight": pack(bytes_, 2, torch.uint8) if weights.bits == 4 else bytes_}
            found["scales"] = scale.transpose(1, 2)
            if zero is not None:
                found["qzeros"] = pack(zero.transpose(1, 2), 1, torch.uint8)
        elif kind.startswith("ct"):
            found = {"weight_packed": pack(q, 1), "weight_scale": scale}
        else:
            found = {"qweight": pack(q, 1), "scales": scale}
        for suffix, value in found.items():
            parameter = getattr(layer, f"{name}_{suffix}").data
            # compressed-tensors' parameters lie the other way from 0.31 on.
            other_way = parameter.shape != value.shape
            parameter.copy_(value.transpose(1, 2) if other_way else value)


def _marlin(q):
    """As Marlin's repacked weights are shaped, though not ordered: [experts, in / 16, out * 2]."""
    experts, k, n = q.shape
    return pack(q.reshape(experts, -1), 1).reshape(experts, k // 16, n * 2)


def _gemm(given):
    """`moe_wna16_marlin_gemm`"""
    from vllm.scalar_type import scalar_types

    experts, k, n = len(given.b_qweight), given.size_k, given.size_n
    q = unpack(given.b_qweight.reshape(experts, -1), 1).reshape(experts, k, n)
    types_ = {scalar_types.uint4b8: False, scalar_types.uint4: True}
    has_zeros = types_[given.b_q_type]
    assert has_zeros == (given.b_qzeros is not None)
    zero = unpack(given.b_qzeros, 2) if has_zeros else None
    output = given.output
    if output is None:
        output = given.input.new_empty(given.size_m * given.top_k, n)
    given.mul = given.mul_topk_weights
    return stage.product(given, given.input, dequantise(q, given.b_scales, zero), output, n)


def _triton(given):
    """`invoke_fused_moe_wna16_triton_kernel`, up to 0.13 `invoke_fused_moe_kernel`"""
    assert given.use_int4_w4a16 != given.use_int8_w8a16
    bits = 4 if given.use_int4_w4a16 else 8
    q = (unpack(given.B, 2) if bits == 4 else given.B.long()).transpose(1, 2)
    zero = None if given.B_zp is None else unpack(given.B_zp, 1).transpose(1, 2)
    given.mul = given.mul_routed_weight
    weights = dequantise(q, given.B_scale.transpose(1, 2), zero, bits)
    stage.product(given, given.A, weights, given.C, given.C.shape[-1])


def stand_in():
    """Replace the operators of INT4 experts, wherever the release has them."""
    import importlib

    from vllm import _custom_ops as ops

    # By name: the package gives a function under the module's name.
    fused_moe, moe_align_block_size = (
        importlib.import_module(f"vllm.model_executor.layers.fused_moe.{name}")
        for name in ("fused_moe", "moe_align_block_size")
    )
    ops.gptq_marlin_moe_repack = lambda b, *args, **more: _marlin(unpack(b, 1))
    ops.awq_marlin_moe_repack = lambda b, *args, **more: _marlin(unpack(b, 2))
    ops.moe_wna16_marlin_gemm = stage.bound(ops.moe_wna16_marlin_gemm, _gemm)
    stage.everywhere("marlin_moe_permute_scales", lambda s, *args, **more: s)
    stage.everywhere("moe_awq_to_marlin_zero_points", lambda zeros, *args, **more: zeros)
    for name in ("marlin_make_workspace_new", "verify_marlin_supported"):
        stage.everywhere(name, lambda *args, **more: None)
    stage.everywhere("check_moe_marlin_supports_config", lambda *args, **more: True)
    for name, module, function in (
        ("invoke_fused_moe_wna16_triton_kernel", fused_moe, _triton),
        ("invoke_fused_moe_kernel", fused_moe, _triton),
        ("moe_align_block_size", moe_align_block_size, stage.align),
    ):
        real = getattr(module, name, None)
        if real is not None:
            stage.everywhere(name, stage.bound(real, function), real)
