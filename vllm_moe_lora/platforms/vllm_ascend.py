"""vllm-ascend, which brings Huawei's NPUs to vLLM: LoRA on experts beside shared experts.

Its LoRA layer for routed experts adds what an adapter has where it computes them, and refuses a
model with shared experts. Those have LoRA layers of vLLM's own, around the linear layers by which
vllm-ascend reaches them. Only the refusal is in the way, and a name by which vLLM looks for them.
vllm-ascend's release for vLLM 0.30 does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

CHECK = "vllm_ascend.lora.fused_moe:_assert_ascend_moe_lora_supported"
INIT = "vllm_ascend.lora.fused_moe:AscendFusedMoEWithLoRA.__init__"
FEATURE = "ascend-shared-experts"
UPSTREAM = "https://github.com/vllm-project/vllm-ascend/pull/13365"


class _Routed:
    """A layer of experts as if it had no shared experts."""

    _shared_experts = None

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _supported(original: Callable[..., None]) -> Callable[..., None]:
    def _assert_ascend_moe_lora_supported(base_layer: Any) -> None:
        """Raise if LoRA on these experts would fail, or would be left out without a word.

        Raises:
            AssertionError: vllm-ascend's own words, of which those on shared experts are left out.
            ValueError: the experts are quantised, or the shared ones run beside them.
        """
        original(_Routed(base_layer))
        name = getattr(base_layer, "layer_name", "an MoE layer")
        # Only the method for unquantised experts passes LoRA on.
        kind = type(base_layer.quant_method).__name__
        if kind != "AscendUnquantizedFusedMoEMethod":
            raise ValueError(
                f"{name}: vllm-ascend runs these experts by {kind}, which leaves LoRA out. Use an "
                "unquantised checkpoint, or an adapter merged into the weights "
                "(vllm-moe-lora convert --merge-into)."
            )
        if getattr(base_layer, "multistream_overlap_shared_expert", False):
            raise ValueError(
                f"{name}: LoRA on shared experts that run on a stream of their own is not known to "
                "be right. Set multistream_overlap_shared_expert to false in --additional-config."
            )

    return _assert_ascend_moe_lora_supported


def _init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, base_layer: Any) -> None:
        original(self, base_layer)
        shared = getattr(base_layer, "_shared_experts", None)
        if shared is not None:
            # vLLM's manager looks up `experts._shared_experts.gate_up_proj` when it wraps that.
            self._shared_experts = shared

    return __init__


HOOKS = (
    Hook(
        feature=FEATURE,
        target=CHECK,
        make=_supported,
        releases="==0.23.0",
        why="vllm-ascend refuses LoRA on a model with shared experts, as Qwen1.5-MoE, although "
        "its layers and vLLM's compute it; and leaves LoRA out of quantised experts",
        upstream=UPSTREAM,
        until="vLLM 0.23 is no longer supported",
    ),
    Hook(
        feature=FEATURE,
        target=INIT,
        make=_init,
        releases="==0.23.0",
        why="vLLM's manager finds shared experts below the routed ones, where the LoRA layer of "
        "vllm-ascend hides them",
        upstream=UPSTREAM,
        until="vLLM 0.23 is no longer supported",
    ),
)

# Target -> digest of its source -> the releases of vllm-ascend that have it.
SAME = ("0.23.0rc1", "0.23.0", "0.23.0.post1")
HASHES = {CHECK: {"81c7517f726fe207": SAME}, INIT: {"cd80dfd194e4fea3": SAME}}
