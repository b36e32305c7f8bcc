"""Child side of trtllm_experts.py: layers whose experts are TRT-LLM's, and adapters on them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from unittest import mock

import parallel_cases
import torch
import trtllm_operators
from packaging.version import Version
from parallel_cases import FUSED, LLAMA, OSS, RAGGED, SHARED

FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def _module(name):
    return importlib.import_module(f"{FUSED_MOE}.{name}")


@dataclasses.dataclass
class Bf16(parallel_cases.Case):
    """Unquantised: the release's own choice, its conversion of weights, and its experts.

    Attributes:
        chosen: class of the experts, after loading.
        flags: whether a batch is said to have no adapter: when it has none, and when it has none
            and the tokens gathered from other ranks have.
    """

    since: str = "0.26"
    hidden: int = 64
    inner: int = 128
    chosen: str = ""
    flags: tuple = ()
    dtype = torch.bfloat16
    lora_dtype = torch.bfloat16

    def choose(self):
        self.flags = ()
        self.patches = contextlib.ExitStack()
        for one in self.machine():
            self.patches.enter_context(one)

    def machine(self):
        """Blackwell, as far as backends look."""
        from vllm.platforms import current_platform

        base = _module("experts.trtllm_lora_moe")._TrtLlmLoRAExpertsBase
        yield mock.patch.object(type(current_platform), "is_cpu", return_value=False)
        yield mock.patch.object(base, "_supports_current_device", return_value=True)

    def after(self):
        self.patches.close()

    def whole(self):
        layer = super().whole()
        for name in ("w1", "w3", "w2"):
            setattr(layer, name, getattr(layer, name).bfloat16().float())
        return layer

    def after_loading(self, world, whole):
        from vllm.lora.layers import LoRAMapping

        experts = world[0].wrapper._moe_kernel.fused_experts
        self.chosen = type(experts).__name__
        if not hasattr(experts, "_batch_has_no_lora"):
            return
        nobody = LoRAMapping((0, 0), (0, 0), is_prefill=True)
        world[0].worker._adapter_manager.set_adapter_mapping(nobody)
        context, flags = experts._lora_context, []
        for gathered in (None, torch.tensor([-1, -1, 0], dtype=torch.int32)):
            context.local_token_lora_mapping = gathered
            flags.append(experts._batch_has_no_lora(context))
        context.local_token_lora_mapping, self.flags = None, tuple(flags)


class GptOss(Bf16):
    """Experts that the bf16 class does not compute."""

    activation = staticmethod(parallel_cases.GptOss.activation)


@dataclasses.dataclass
class Mxfp4(Bf16):
    """Experts for MXFP4; the weights stay bf16, in the places that the kernel has for them.

    ``padded``: hidden, as the kernel wants it wider.
    """

    since: str = "0.33"
    padded: int = 0

    def __post_init__(self):
        if self.interleaved:
            self.more = {**self.more, "has_bias": True}
            self.activation = parallel_cases.GptOss.activation

    def machine(self):
        yield from super().machine()
        yield mock.patch.object(torch.accelerator, "current_device_index", return_value="cpu")
        method = _module("unquantized_fused_moe_method")
        backend = method.UnquantizedMoeBackend.FLASHINFER_TRTLLM
        chosen = backend, _module("experts.trtllm_lora_moe").TrtLlmMxfp4LoRAExperts
        yield mock.patch.object(method, "select_unquantized_moe_backend", return_value=chosen)
        yield mock.patch.object(
            method,
            "convert_to_unquantized_kernel_format",
            lambda *args, w13_weight, w2_weight, **more: (w13_weight, w2_weight),
        )
        kind = method.UnquantizedFusedMoEMethod
        yield mock.patch.object(kind, "get_fused_moe_quant_config", self._config)
        if self.padded:
            yield mock.patch.object(
                kind, "maybe_roundup_sizes", lambda own, hidden, inner, *args: (self.padded, inner)
            )

    def _config(self, layer):
        numbers = {}
        if self.interleaved:
            numbers = {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}
        biases = {"w1_bias": getattr(layer, "w13_bias", None)}
        biases["w2_bias"] = getattr(layer, "w2_bias", None)
        make = _module("config").mxfp4_w4a16_moe_quant_config
        return make(w1_scale=None, w2_scale=None, **biases, **numbers)

    def whole(self):
        layer = super().whole()
        if self.interleaved:
            g = torch.Generator().manual_seed(8)
            sizes = {"w1": self.inner, "w3": self.inner, "w2": self.hidden}
            layer.biases = {n: torch.randn(self.experts, s, generator=g) for n, s in sizes.items()}
        return layer

    def after_loading(self, world, whole):
        super().after_loading(world, whole)
        for one in world if self.padded else []:
            # vLLM's runner does this before it calls the method.
            one.apply = functools.partial(self._wider, one.apply)

    def _wider(self, apply, x, *given):
        return apply(torch.nn.functional.pad(x, (0, self.padded - x.shape[1])), *given)

    def products(self, wrappers, rank, slot):
        padding, found = super().products(wrappers, rank, slot)
        cut = slice(0, self.hidden)
        return padding, {n: p[:, cut] if n == "w2" else p[..., cut] for n, p in found.items()}

    def fill(self, routed, whole, rank):
        inner, owned = self.cut(rank), self.owned(rank)

        def put(target, up, gate=None):
            # Up before gate, in turn, then as the tiles want the rows.
            rows = up if gate is None else torch.stack([up, gate], 2).flatten(1, 2)
            wide = torch.zeros(target.shape)
            wide[:, : rows.shape[1]][..., : rows.shape[-1]] = rows
            target.data = wide[:, trtllm_operators.shuffled(wide[0], 128)].to(target.dtype)

        put(routed.w13_weight, whole.w3[owned][:, inner], whole.w1[owned][:, inner])
        put(routed.w2_weight, whole.w2[owned][:, :, inner])
        if whole.biases:
            for name in ("w13_bias", "w2_bias"):
                getattr(routed, name).data = getattr(routed, name).data.float()
            up, gate = (whole.biases[name][owned][:, inner] for name in ("w3", "w1"))
            put(routed.w13_bias, up, gate)
            # Ranks that share an expert would add its bias more than once.
            here = rank == 0 or self.expert_parallel
            put(routed.w2_bias, whole.biases["w2"][owned] * here)


EP2 = {"size": 2, "expert_parallel": True}
EP3 = {"size": 3, "expert_parallel": True, "experts": 10}
TP2 = {"size": 2, "inner": 256}
MIXED = {"fused": True, "lora": {"enable_mixed_moe_lora_format": True}}
# DeepSeek's router, the one of groups that these experts take.
GROUPS = {
    "use_grouped_topk": True,
    "num_expert_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "e_score_correction_bias": torch.zeros(8),
}
CASES = [
    Bf16("two slices"),
    Bf16("two slices, tp2", **TP2),
    Bf16("two slices, ep2", **EP2),
    Bf16("two slices, ep3 uneven", **EP3),
    Bf16("two slices, ep2 round robin", **EP2, placement="round_robin", more=GROUPS),
    Bf16("ranks of their own", **RAGGED),
    Bf16("mixed format", **MIXED),
    Bf16("shared factors", **SHARED),
    Bf16("Llama-4", **LLAMA),
    Bf16("one slice", **FUSED),
    Bf16("one slice, tp2", **TP2, **FUSED),
    Bf16("one slice, ep3 uneven", **EP3, **FUSED),
    GptOss("gpt-oss in bf16", **OSS),
    Mxfp4("MXFP4, two slices"),
    Mxfp4("MXFP4, one slice", **FUSED),
    Mxfp4("MXFP4, one slice, ep3 uneven", **EP3, **FUSED),
    Mxfp4("MXFP4, gpt-oss", **OSS),
    Mxfp4("MXFP4, gpt-oss, tp2", **TP2, **OSS),
    Mxfp4("MXFP4, gpt-oss, ep3 uneven", **EP3, **OSS),
    Mxfp4("MXFP4, gpt-oss, mixed format", **{**OSS, **MIXED, "on_disk": "per expert"}),
    Mxfp4("MXFP4, gpt-oss, wider", **OSS, hidden=48, padded=64),
]


def cases(release):
    return [case for case in CASES if Version(release) >= Version(case.since)]
