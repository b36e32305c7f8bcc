"""Child side: the worlds that `parallel_experts.py` simulates, and each rank's part by rule."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from unittest import mock

import int4
import one_method
import quantised_experts
import stage
import torch
from packaging.version import Version
from parallel_truth import Layer


@dataclasses.dataclass
class Case:
    """A world of ``size`` ranks, a layer of routed experts on it, and adapters.

    Attributes:
        data_parallel: how many batches there are, each of size // data_parallel ranks.
        expert_parallel: whole experts on each rank, else a part of each.
        eplb: vLLM moves experts as the load asks; redundant: copies beyond their number.
        fused, interleaved: as the model has gate and up.
        since: the release that can be told to.
        on_disk: "per expert" or "fused".
        on_input: router weights go on the input (Llama-4).
        adapter: options of `parallel_truth.Adapter`.
        lora: of `LoRAConfig`; more: of the layer.
    """

    name: str
    since: str = "0.11"
    size: int = 1
    data_parallel: int = 1
    all2all: str = "allgather_reducescatter"
    expert_parallel: bool = False
    placement: str = "linear"
    experts: int = 8
    eplb: bool = False
    redundant: int = 0
    hidden: int = 32
    inner: int = 32
    top_k: int = 2
    rank: int = 4
    max_rank: int = 8
    fused: bool = False
    interleaved: bool = False
    on_disk: str = "per expert"
    on_input: bool = False
    adapter: dict = dataclasses.field(default_factory=dict)
    lora: dict = dataclasses.field(default_factory=dict)
    more: dict = dataclasses.field(default_factory=dict)
    activation = None
    dtype = torch.float32
    lora_dtype = torch.float32

    def choose(self):
        """Whatever has to be chosen for the process before the layer is made."""

    def after(self):
        """Undo it."""

    def after_loading(self, world, whole):
        """What happens to a world between adapters and requests."""

    def whole(self):
        return Layer(self.experts, self.hidden, self.inner)

    def quant_config(self):
        return None

    def owned(self, rank):
        """Numbers of a rank's experts: as even as can be, the first ranks get one more."""
        if not self.expert_parallel:
            return list(range(self.experts))
        if self.eplb:
            return self.placed(rank)
        if self.placement == "round_robin":
            return list(range(rank, self.experts, self.size))
        each, more = divmod(self.experts, self.size)
        start = sum(each + (r < more) for r in range(rank))
        return list(range(start, start + each + (rank < more)))

    moved = False

    def placed(self, rank):
        """A rank's part of `order`."""
        order = self.order()
        each = len(order) // self.size
        return order[rank * each : (rank + 1) * each]

    def order(self):
        """Experts by place: as vLLM begins, and `moved`, as EPLB may have it later."""
        order = list(range(self.experts)) + [i % self.experts for i in range(self.redundant)]
        return order[3:] + order[:3] if self.moved else order

    def routed(self, ids):
        """What the router makes of experts' numbers: places, where experts have copies."""
        if not self.eplb:
            return ids
        order = self.order()
        places = [[i for i, own in enumerate(order) if own == e] for e in range(self.experts)]
        found = [places[e][n % len(places[e])] for n, e in enumerate(ids.flatten().tolist())]
        return torch.tensor(found).reshape(ids.shape)

    def cut(self, rank, whole=None):
        """A rank's part of the inner dimension, or of ``whole``."""
        whole = self.inner if whole is None else whole
        if self.expert_parallel:
            return slice(0, whole)
        return slice(rank * (whole // self.size), (rank + 1) * (whole // self.size))

    @property
    def sharded(self):
        """Whether ranks share the work of an adapter, too (--fully-sharded-loras)."""
        return self.lora.get("fully_sharded_loras", False) and self.size > 1

    def cuts(self, rank):
        """Rows and columns of a projection's B @ A that are made on a rank."""
        inner, everything = self.cut(rank), slice(None)
        rows = {"w1": inner, "w3": inner, "w2": everything}
        if self.sharded:
            rows["w2"] = self.cut(rank, self.hidden)
        return rows, {"w1": everything, "w3": everything, "w2": inner}

    def fill(self, routed, whole, rank):
        inner, owned = self.cut(rank), self.owned(rank)
        gate, up = whole.w1[owned][:, inner], whole.w3[owned][:, inner]
        both = torch.stack([gate, up], 2).flatten(1, 2)
        if not self.interleaved:
            both = torch.cat([gate, up], 1)
        routed.w13_weight.data.copy_(both)
        routed.w2_weight.data.copy_(whole.w2[owned][:, :, inner])

    def products(self, wrappers, rank, slot):
        """The largest number in a slot's padding, and projection -> B @ A without padding."""
        own, inner = wrappers[rank], self.cut(rank).stop - self.cut(rank).start

        def stack(wrapper, name, number=0):
            early = name.replace("w13", ("w1", "w3")[number]) + "_stacked"
            if hasattr(wrapper, early) and not hasattr(wrapper, "w13_lora_a_stacked"):  # 0.11
                return getattr(wrapper, early)[slot].float()
            stacks = getattr(wrapper, f"{name}_stacked")
            return stacks[min(number, len(stacks) - 1)][slot].float()

        def up_a(number):
            parts = [stack(w, "w13_lora_a", number) for w in (wrappers if self.sharded else [own])]
            return torch.cat(parts, 1)

        gate, up = stack(own, "w13_lora_b"), stack(own, "w13_lora_b", 1)
        if len(getattr(own, "w13_lora_b_stacked", "12")) == 1:
            half = gate.shape[1] // 2
            gate, up = gate[:, :half], gate[:, half:]
            if self.interleaved:
                both = stack(own, "w13_lora_b")
                gate, up = both[:, ::2], both[:, 1::2]
        down_a = stack(own, "w2_lora_a")
        padding = (gate[:, inner:], up[:, inner:], down_a[..., inner:])
        return max(float(p.abs().sum()) for p in padding), {
            "w1": gate[:, :inner] @ up_a(0),
            "w3": up[:, :inner] @ up_a(1),
            "w2": stack(own, "w2_lora_b") @ down_a[..., :inner],
        }


def _first(*names):
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"vllm.model_executor.layers.fused_moe.{name}")
    return None


def _triton():
    return _first("experts.triton_moe", "fused_moe").TritonExperts


def _unquantised():
    return _first("unquantized_fused_moe_method", "layer").UnquantizedFusedMoEMethod


class Rounded(Case):
    """Unquantised weights that a backend pads, and says so."""

    multiple = 16

    def choose(self):
        super().choose()

        def rounded(method, hidden, inner, *args, **more):
            return hidden, -(-inner // self.multiple) * self.multiple

        self.patch = mock.patch.object(_unquantised(), "maybe_roundup_sizes", rounded)
        self.patch.start()

    def after(self):
        self.patch.stop()

    def fill(self, routed, whole, rank):
        inner = self.cut(rank)
        size = inner.stop - inner.start
        routed.w13_weight.data.zero_()
        routed.w2_weight.data.zero_()
        gate, up = routed.w13_weight.data.chunk(2, 1)
        gate[:, :size], up[:, :size] = whole.w1[:, inner], whole.w3[:, inner]
        routed.w2_weight.data[..., :size] = whole.w2[..., inner]


class GptOss(Case):
    """Gate and up in turn, its own activation."""

    @staticmethod
    def activation(gate, up, alpha=1.702, limit=7.0):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)


class Int4(Case):
    """INT4 weights in a kernel's own order, with its tiles' padding."""

    dtype = torch.float16
    kind = "gptq"

    def choose(self):
        quantised_experts.choose(self.kind)

    def whole(self):
        layer = Layer(self.experts, self.hidden, self.inner)
        layer.int4 = int4.Weights(7, zeros=False, inner=self.inner)
        layer.w1, layer.w3 = layer.int4.dense("w13").chunk(2, 1)
        layer.w2 = layer.int4.dense("w2")
        return layer

    def quant_config(self):
        return one_method.config(self.kind, quantised_experts.method_of(self.kind))

    def fill(self, routed, whole, rank):
        int4.fill(routed, self.kind, whole.int4.part(self.owned(rank), self.cut(rank)))


class Wna16(Int4):
    """INT4 weights in Triton's experts."""

    kind = "moe_wna16"


class Moved(Case):
    """The same after EPLB has moved experts: their weights, then the table of places.

    Attributes:
        at_once: all layers in one step, else layer by layer (vLLM's asynchronous EPLB).
    """

    at_once: bool = True

    def after_loading(self, world, whole):
        self.moved = True
        for one in world:
            self.fill(one.routed, whole, one.rank)
            one.commit_places(self.at_once)


class MovedByLayer(Moved):
    at_once = False


def stand_in():
    """Replace the operators that the cases need beside LoRA's."""
    for kind in (Int4.kind, Wna16.kind):
        with contextlib.suppress(LookupError):  # imports what is to be replaced
            quantised_experts.method_of(kind)
    int4.stand_in()
    _unquantised_as_on_a_gpu()


def _unquantised_as_on_a_gpu():
    oracle, method = _first("oracle.unquantized"), _unquantised()
    select = getattr(oracle, "select_unquantized_moe_backend", None)
    if select is not None and "tuple" in str(select.__annotations__["return"]):
        found = (oracle.UnquantizedMoeBackend.TRITON, _triton())
        stage.everywhere("select_unquantized_moe_backend", lambda *args, **more: found)
    else:  # up to 0.19
        sys.modules[method.__module__].TritonExperts = _triton()
        method.process_weights_after_loading = lambda self, layer: None
        method.is_monolithic = False


EP = {"expert_parallel": True, "since": "0.21"}
SHARDED = {"lora": {"fully_sharded_loras": True}}
RAGGED = {"adapter": {"ragged": True}}
SHARED = {"lora": {"enable_moe_shared_loras": True}, "adapter": {"shared": True}}
FUSED = {"fused": True, "on_disk": "fused", "adapter": {"tied": True}}
SWIGLU = {"interleaved": True, "more": {"activation": "swigluoai"}}
OSS = {**FUSED, **SWIGLU}
MIXED = {"fused": True, **SWIGLU, "lora": {"enable_mixed_moe_lora_format": True}}
GROUPS = {"more": {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1}}
LLAMA = {"top_k": 1, "on_input": True, "more": {"apply_router_weight_on_input": True}}
INT4 = {"experts": int4.EXPERTS, "hidden": int4.HIDDEN, "inner": 128}
UNEVEN = {**EP, "size": 3, "experts": 10}
ROUNDED = {"since": "0.19"}

CASES = [
    Case("tp1"),
    Case("tp2", size=2),
    Case("tp4", size=4),
    Case("tp4-ragged", size=4, **RAGGED),
    Case("tp2-fused", size=2, **FUSED),
    GptOss("tp2-interleaved", size=2, **OSS),
    Case("tp3-inner", size=3),
    Case("fs2", size=2, **SHARDED),
    Case("fs4", size=4, **SHARDED),
    Case("fs2-ragged", size=2, **SHARDED, **RAGGED),
    Case("fs2-fused", size=2, **SHARDED, **FUSED),
    GptOss("fs2-interleaved", size=2, **SHARDED, **OSS),
    Case("fs4-rank", size=4, **SHARDED, rank=6),
    Case("fs4-some", size=4, **SHARDED, adapter={"some": True}),
    Case("fs3-max-rank", size=3, inner=36, hidden=36, **SHARDED),
    Case("ep2", size=2, **EP),
    Case("ep3-uneven", **UNEVEN),
    Case("ep8-uneven", **{**UNEVEN, "size": 8, "experts": 60}),
    Case("ep3-uneven-ragged", **UNEVEN, **RAGGED),
    Case("ep2-fused", size=2, **EP, **FUSED),
    Case("ep3-uneven-fused", **UNEVEN, **FUSED),
    GptOss("ep3-uneven-interleaved", **UNEVEN, **OSS),
    Case("ep2-round-robin", size=2, **EP, placement="round_robin", **GROUPS),
    Case("ep3-round-robin", **UNEVEN, placement="round_robin", **GROUPS),
    Moved("ep2-moved", size=2, **EP, eplb=True),
    Case("ep2-redundant", size=2, **EP, eplb=True, redundant=2),
    MovedByLayer("ep2-redundant-moved", size=2, **EP, eplb=True, redundant=2),
    Moved("ep2-moved-fused", size=2, **EP, eplb=True, redundant=2, **FUSED),
    Case("ep2-sharded", size=2, **EP, **SHARDED),
    Case("ep3-uneven-shared", **{**UNEVEN, "since": "0.26"}, **SHARED),
    GptOss("ep3-uneven-mixed", **{**UNEVEN, "since": "0.22"}, **MIXED),
    Rounded("rounded-fused", **ROUNDED, inner=24, **FUSED),
    Rounded("rounded-tp2", **ROUNDED, size=2, inner=48),
    Rounded("rounded-tp2-fused", **ROUNDED, size=2, inner=48, **FUSED),
    Case("llama4", **LLAMA),
    Case("llama4-tp2", size=2, **LLAMA),
    Case("llama4-ep3-uneven", **UNEVEN, **LLAMA),
    Int4("marlin", **INT4),
    Int4("marlin-tp2", **{**INT4, "size": 2, "inner": 256}),
    Int4("marlin-padded", **{**INT4, "inner": 96}),
    Int4("marlin-padded-tp2", **{**INT4, "size": 2, "inner": 192}),
    Int4("marlin-padded-tp2-fused", **{**INT4, "size": 2, "inner": 192}, **FUSED),
    Int4("marlin-padded-ep3-uneven", **EP, size=3, **{**INT4, "inner": 96}),
    Int4("marlin-llama4", **INT4, **LLAMA),
    Wna16("wna16-ep3-uneven", **EP, size=3, **INT4),
    Wna16("wna16-llama4", **INT4, **LLAMA),
]


def cases(release):
    """Those that ``release`` has a name for.

    0.11 has no fused factors and no options of LoRA; its Marlin wants CUDA, see tests/legacy.
    """
    found = [case for case in CASES if Version(release) >= Version(case.since)]
    if Version(release) >= Version("0.12"):
        return found
    return [c for c in found if not (c.fused or c.lora or type(c) is Int4)]
