"""Child side: MXFP4 experts of gpt-oss, and a stand-in for the package `triton_kernels` in loops.

The package has had three generations, named by the releases they came with. "3.5.1" and "3.6" have
`matmul_ogs`, whose rows go in by `gather_indx` and out by `scatter_indx`; "3.8" has `matmul`, which
only gathers. In all of them the rows of one expert lie together, and `gammas` are in that order.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import sys
import types

import stage
import torch
from int4 import EXPERTS

BLOCK = 32
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class Weights:
    """``q`` [experts, out, in / 2] of two numbers a byte, ``scale`` [experts, out, in / 32] as
    exponents with a bias of 127, ``bias`` [experts, out]; gate's and up's rows in turn."""

    hidden = inner = 256
    layer = types.MappingProxyType({"activation": "swigluoai", "has_bias": True})

    def __init__(self, seed):
        make = torch.Generator().manual_seed(seed)
        self.q, self.scale, self.bias = {}, {}, {}
        for name, k, n in (
            ("w13", self.hidden, 2 * self.inner),
            ("w2", self.inner, self.hidden),
        ):
            shape = (EXPERTS, n, k // 2)
            self.q[name] = torch.randint(0, 256, shape, generator=make).to(torch.uint8)
            shape = (EXPERTS, n, k // BLOCK)
            self.scale[name] = torch.randint(120, 123, shape, generator=make).to(torch.uint8)
            self.bias[name] = torch.randn(EXPERTS, n, generator=make).to(torch.bfloat16)

    def dense(self, name):
        """[experts, out, in] in fp32."""
        return dequantise(self.q[name], self.scale[name])


def dequantise(q, scale):
    pairs = torch.stack([_FP4[(q & 15).long()], _FP4[(q >> 4).long()]], dim=-1).flatten(-2)
    return pairs * torch.exp2(scale.float() - 127).repeat_interleave(BLOCK, dim=-1)


def fill(layer, weights):
    for name in ("w13", "w2"):
        getattr(layer, f"{name}_weight").data.copy_(weights.q[name])
        getattr(layer, f"{name}_weight_scale").data.copy_(weights.scale[name])
        getattr(layer, f"{name}_bias").data.copy_(weights.bias[name])


def method():
    """Makes gpt-oss' MXFP4 method for a layer."""
    module = importlib.import_module("vllm.model_executor.layers.quantization.mxfp4")
    kind = getattr(module, "GptOssMxfp4MoEMethod", None) or module.Mxfp4MoEMethod
    return lambda layer: kind(layer.moe_config)


@dataclasses.dataclass
class RoutingData:
    """As much of it as vLLM and `matmul_ogs` read."""

    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: object = None


@dataclasses.dataclass
class Indx:
    """`GatherIndx` and `ScatterIndx`: source and destination of every row, -1 for none."""

    src_indx: torch.Tensor
    dst_indx: torch.Tensor


@dataclasses.dataclass
class Bitmatrix:
    data: torch.Tensor
    dtype: object = None
    shape: object = None
    shape_max: object = None
    scratchpad: object = None


def _sorted(ids, experts):
    """Pairs by expert: (rows of each expert, pair of each row, row of each pair), -1 for none."""
    flat = ids.flatten().long()
    by_expert = torch.where(flat < 0, experts, flat).argsort(stable=True)
    count = int((flat >= 0).sum())
    pair_of, row_of = torch.full_like(flat, -1), torch.full_like(flat, -1)
    pair_of[:count] = by_expert[:count]
    row_of[by_expert[:count]] = torch.arange(count)
    return torch.bincount(flat[flat >= 0], minlength=experts).int(), pair_of.int(), row_of.int()


def routing_from_bitmatrix(bitmatrix, expt_scal, expt_indx, n_expts_tot, n_expts_act):
    hist, pair_of, row_of = _sorted(expt_indx, n_expts_tot)
    scales = expt_scal.flatten()[pair_of.long()]
    data = RoutingData(scales, hist, n_expts_tot, n_expts_act)
    return data, Indx(pair_of, row_of), Indx(row_of, pair_of)


class SparseMatrix:
    def __init__(self, indx, vals, mask):
        self.indx, self.vals = indx, vals
        hist, pair_of, row_of = _sorted(indx, EXPERTS)
        names = {"col_sum": hist, "col_sorted_indx": pair_of, "row_sorted_indx": row_of}
        self.mask_metadata = types.SimpleNamespace(**names)


def make_ragged_tensor_metadata(sizes, rows):
    return types.SimpleNamespace(block_sizes=sizes, slice_sizes=sizes, rows=rows)


def _products(sizes, x, rows, w, bias, gammas):
    """[rows, out] in fp32. ``rows``: which of ``x`` each is made of; ``sizes``: of each expert."""
    out, low = torch.zeros(len(rows), w.shape[-1]), 0
    for expert, size in enumerate(sizes.tolist()):
        here = slice(low, low + size)
        part = x[rows[here].long()].float() @ w[expert].float()
        if bias is not None:
            part = part + bias[expert]
        if gammas is not None:
            part = part * gammas[here, None].float()
        out[here], low = part, low + size
    return out


def matmul_ogs(
    x,
    w,
    bias,
    routing_data=None,
    gather_indx=None,
    scatter_indx=None,
    precision_config=None,
    betas=None,
    gammas=None,
    out_alpha=None,
    y=None,
    fused_activation=None,
    epilogue=None,
):
    assert fused_activation is None
    assert betas is None
    sizes, act = routing_data.expt_hist, routing_data.n_expts_act
    rows = torch.arange(len(x))
    if gather_indx is not None:
        rows = torch.div(gather_indx.src_indx, act, rounding_mode="floor")
    out = _products(sizes, x, rows, w, bias, gammas)
    count = int(sizes.sum())
    if scatter_indx is None:
        y[0, :count] = out[:count].to(y.dtype)
        return y
    assert act == 1, "experts with LoRA sum by themselves"
    # The other rows stay what they were.
    y[0, scatter_indx.dst_indx[:count].long()] = out[:count].to(y.dtype)
    return y


def matmul(
    a,
    b,
    bias,
    a_ragged_metadata=None,
    b_ragged_metadata=None,
    gather_indx=None,
    scatter_indx=None,
    precision_config=None,
    betas=None,
    gammas=None,
    out_alpha=None,
    c=None,
    fused_activation=None,
    epilogue=None,
):
    assert fused_activation is scatter_indx is c is b_ragged_metadata is None
    rows = torch.arange(len(a)) if gather_indx is None else gather_indx
    return _products(a_ragged_metadata.slice_sizes, a, rows, b, bias, gammas).to(a.dtype)


def package(generation):
    """Put the package into `sys.modules`. Called before vLLM is imported."""
    nothing = dict.fromkeys(("FnSpecs", "FusedActivation"), types.SimpleNamespace)
    nothing |= dict.fromkeys(("FlexCtx", "PrecisionConfig"), types.SimpleNamespace)
    modules = {"": {}, ".swiglu": {"swiglu_fn": None}, ".topk": {"topk": None}}
    if generation == "3.8":
        modules[".matmul"] = {"matmul": matmul, **nothing}
        modules[".matmul_details"] = {}
        modules[".matmul_details.opt_flags"] = {"update_opt_flags_constraints": None}
        modules[".tensor"] = {"make_ragged_tensor_metadata": make_ragged_tensor_metadata}
        # It is asked for on every platform, and looks at the machine.
        rocm = types.ModuleType("vllm.platforms.rocm")
        rocm.on_gfx950 = lambda: False
        sys.modules[rocm.__name__] = rocm
    else:
        given = {"GatherIndx": Indx, "ScatterIndx": Indx, "RoutingData": RoutingData}
        modules[".matmul_ogs"] = {"matmul_ogs": matmul_ogs, **given, **nothing}
        modules[".tensor"] = {"Bitmatrix": Bitmatrix, "BIT": None}
        if generation == "3.6":
            modules[".tensor"]["make_ragged_tensor_metadata"] = make_ragged_tensor_metadata
            modules[".tensor"]["SparseMatrix"] = SparseMatrix
        else:
            names = {"routing_from_bitmatrix": routing_from_bitmatrix, "routing": None}
            modules[".routing"] = {**given, **names}
    for name, held in modules.items():
        made = types.ModuleType(f"triton_kernels{name}")
        made.__spec__ = importlib.machinery.ModuleSpec(made.__name__, None, is_package=True)
        made.__path__, made.__file__ = [], "tests/releases/stand_ins/oai.py"
        vars(made).update(held)
        sys.modules[made.__name__] = made
        parent, _, child = made.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)


class _NoKernel:
    """`pack_bitmatrix`: what it packs, the stand-ins take from the ids."""

    def __getitem__(self, grid):
        return lambda *args, **more: None


def remap_topk_to_local(topk_ids, expert_map):
    ids = topk_ids.long()
    return torch.where(ids >= 0, expert_map.long()[ids.clamp(min=0)], -1)


def masked_moe_sum(intermediate, topk_ids, output):
    output.copy_(torch.where((topk_ids >= 0)[..., None], intermediate.float(), 0).sum(1))


def swizzle(quant_tensor, scale, num_warps=8, **more):
    """`_swizzle_mxfp4`: [experts, in, out] as the product takes it, in bf16."""
    return dequantise(quant_tensor, scale).transpose(1, 2).to(torch.bfloat16), None, scale


def experts():
    """The module of the experts, wherever a release has it."""
    name = "gpt_oss_triton_kernels_moe"
    try:
        return importlib.import_module(f"{_FUSED_MOE}.experts.{name}")
    except ImportError:
        return importlib.import_module(f"{_FUSED_MOE}.{name}")


def stand_in():
    """Replace the operators, and the questions about the GPU; vLLM is imported by now."""
    module = experts()
    method()
    stage.everywhere("_swizzle_mxfp4", swizzle)
    module.pack_bitmatrix = _NoKernel()
    if not hasattr(module.triton, "cdiv"):  # what stands there without Triton
        module.triton.cdiv = lambda a, b: -(-a // b)
    for name, loop in (
        ("remap_topk_to_local", remap_topk_to_local),
        ("masked_moe_sum", masked_moe_sum),
    ):
        if real := getattr(module, name, None):
            stage.everywhere(name, loop, real)
    kind = module.UnfusedOAITritonExperts
    kind._supports_current_device = staticmethod(lambda: True)
    try:
        oracle = importlib.import_module(f"{_FUSED_MOE}.oracle.mxfp4")
    except ImportError:
        backend = sys.modules["vllm.model_executor.layers.quantization.mxfp4"].Mxfp4Backend.TRITON
        stage.everywhere("get_mxfp4_backend", lambda *args: backend)
        return
    found = (oracle.Mxfp4MoeBackend.TRITON_UNFUSED, kind)
    for name in ("select_mxfp4_moe_backend", "select_gpt_oss_mxfp4_moe_backend"):  # 0.20's
        stage.everywhere(name, lambda *args, **more: found)
