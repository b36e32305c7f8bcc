"""Child side: the worlds that `parallel_experts.py` simulates, and each rank's part by rule."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from unittest import mock

import int4
import one_method
import quantised_experts
import stage
import torch
from parallel_truth import Layer


@dataclasses.dataclass
class Case:
    """A world of ``size`` ranks, a layer of routed experts on it, and adapters.

    Attributes:
        expert_parallel: whole experts on each rank, else a part of each.
        eplb: vLLM moves experts as the load asks; redundant: copies beyond their number.
        fused, interleaved: as the model has gate and up.
        on_disk: "per expert" or "fused".
        on_input: router weights go on the input (Llama-4).
        adapter: options of `parallel_truth.Adapter`.
        lora: of `LoRAConfig`; more: of the layer.
    """

    name: str
    size: int = 1
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

    def choose(self):
        """Whatever has to be chosen for the process before the layer is made."""
        oracle = _first("oracle.unquantized")
        if oracle is not None:  # it asks what the machine is
            found = (oracle.UnquantizedMoeBackend.TRITON, _triton())
            stage.everywhere("select_unquantized_moe_backend", lambda *args, **more: found)

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
        """Of experts with copies: as vLLM begins, and `moved`, as EPLB may have it later."""
        order = list(range(self.experts)) + [i % self.experts for i in range(self.redundant)]
        if self.moved:
            order = order[3:] + order[:3]
        each = len(order) // self.size
        return order[rank * each : (rank + 1) * each]

    def routed(self, ids):
        """What the router makes of experts' numbers: places, where experts have copies."""
        if not self.eplb:
            return ids
        order = [expert for rank in range(self.size) for expert in self.placed(rank)]
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
            stacks = getattr(wrapper, f"{name}_stacked")
            return stacks[min(number, len(stacks) - 1)][slot].float()

        def up_a(number):
            parts = [stack(w, "w13_lora_a", number) for w in (wrappers if self.sharded else [own])]
            return torch.cat(parts, 1)

        gate, up = stack(own, "w13_lora_b"), stack(own, "w13_lora_b", 1)
        if len(own.w13_lora_b_stacked) == 1:
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
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    return module.UnquantizedFusedMoEMethod


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
        quantised_experts._choose(self.kind)

    def whole(self):
        layer = Layer(self.experts, self.hidden, self.inner)
        layer.int4 = int4.Weights(7, zeros=False, inner=self.inner)
        layer.w1, layer.w3 = layer.int4.dense("w13").chunk(2, 1)
        layer.w2 = layer.int4.dense("w2")
        return layer

    def quant_config(self):
        return one_method.config(self.kind, quantised_experts._method(self.kind))

    def fill(self, routed, whole, rank):
        int4.fill(routed, self.kind, whole.int4.part(self.owned(rank), self.cut(rank)))


class Wna16(Int4):
    """INT4 weights in Triton's experts."""

    kind = "moe_wna16"


class Moved(Case):
    """The same after EPLB has moved experts: their weights and the router, and nothing else."""

    def after_loading(self, world, whole):
        self.moved = True
        for one in world:
            self.fill(one.routed, whole, one.rank)


def stand_in():
    """Replace the operators that the cases need beside LoRA's."""
    for kind in (Int4.kind, Wna16.kind):
        with contextlib.suppress(LookupError):  # imports what is to be replaced
            quantised_experts._method(kind)
    int4.stand_in()


def cases(release):
    ep = {"expert_parallel": True}
    sharded = {"lora": {"fully_sharded_loras": True}}
    ragged = {"adapter": {"ragged": True}}
    fused = {"fused": True, "on_disk": "fused", "adapter": {"tied": True}}
    oss = {**fused, "interleaved": True, "more": {"activation": "swigluoai"}}
    groups = {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1}
    llama = {"top_k": 1, "on_input": True, "more": {"apply_router_weight_on_input": True}}
    shared = {"lora": {"enable_moe_shared_loras": True}, "adapter": {"shared": True}}
    mixed = {"lora": {"enable_mixed_moe_lora_format": True}, "fused": True, "interleaved": True}
    mixed |= {"more": {"activation": "swigluoai"}}
    marlin = {"experts": int4.EXPERTS, "hidden": int4.HIDDEN, "inner": 128}
    found = [
        Case("tp1"),
        Case("tp2", size=2),
        Case("tp4", size=4),
        Case("tp4-ragged", size=4, **ragged),
        Case("tp2-fused", size=2, **fused),
        GptOss("tp2-interleaved", size=2, **oss),
        Case("fs2", size=2, **sharded),
        Case("fs4", size=4, **sharded),
        Case("fs2-ragged", size=2, **sharded, **ragged),
        Case("fs2-fused", size=2, **sharded, **fused),
        GptOss("fs2-interleaved", size=2, **sharded, **oss),
        Case("fs4-rank", size=4, **sharded, rank=6),
        Case("fs4-some", size=4, **sharded, adapter={"some": True}),
        Case("ep2", size=2, **ep),
        Case("ep3-uneven", size=3, experts=10, **ep),
        Case("ep8-uneven", size=8, experts=60, **ep),
        Case("ep3-uneven-ragged", size=3, experts=10, **ep, **ragged),
        Case("ep2-fused", size=2, **ep, **fused),
        Case("ep3-uneven-fused", size=3, experts=10, **ep, **fused),
        GptOss("ep3-uneven-interleaved", size=3, experts=10, **ep, **oss),
        Case("ep2-round-robin", size=2, placement="round_robin", **ep, more=groups),
        Case("ep3-round-robin", size=3, experts=10, placement="round_robin", **ep, more=groups),
        Moved("ep2-moved", size=2, eplb=True, **ep),
        Case("ep2-redundant", size=2, eplb=True, redundant=2, **ep),
        Case("ep2-sharded", size=2, **ep, **sharded),
        Case("ep3-uneven-shared", size=3, experts=10, **ep, **shared),
        GptOss("ep3-uneven-mixed", size=3, experts=10, **ep, **mixed),
        Rounded("rounded", inner=24, **fused),
        Rounded("rounded-tp2", size=2, inner=48),
        Rounded("rounded-tp2-fused", size=2, inner=48, **fused),
        Case("llama4", **llama),
        Case("llama4-tp2", size=2, **llama),
        Case("llama4-ep3", size=3, experts=10, **ep, **llama),
        Int4("marlin", **marlin),
        Int4("marlin-tp2", size=2, **{**marlin, "inner": 256}),
        Int4("marlin-padded", **{**marlin, "inner": 96}),
        Int4("marlin-padded-tp2", size=2, **{**marlin, "inner": 192}),
        Int4("marlin-padded-fused", size=2, **{**marlin, "inner": 192}, **fused),
        Int4("marlin-ep3-uneven", size=3, **{**marlin, "inner": 96}, **ep),
        Wna16("wna16-ep3-uneven", size=3, **marlin, **ep),
        Wna16("wna16-llama4", **marlin, **llama),
        Int4("marlin-llama4", **marlin, **llama),
    ]
    return found
