"""vllm/lora/lora_weights.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_moe_lora.patching import Hook


def _pack_moe(original: Callable[..., Any]) -> Any:
    def pack_moe(
        cls: type[Any], loras: Any, module_name: str, is_non_gated_moe: bool = False
    ) -> Any:
        from vllm_moe_lora.layers.partial import fill

        # `original` is bound to its class, which has no subclass in vLLM.
        return original(fill(list(loras), is_non_gated_moe), module_name, is_non_gated_moe)

    return classmethod(pack_moe)


HOOKS = (
    Hook(
        feature="partial-experts",
        target="vllm.lora.lora_weights:PackedLoRALayerWeights.pack_moe",
        make=_pack_moe,
        releases=">=0.29,<0.34",
        why="an adapter on some experts, or on some of gate, up and down, dies with an "
        "AssertionError without text; different ranks are refused; 0.29 ignores rsLoRA's scale",
        upstream="https://github.com/vllm-project/vllm/pull/55548",
        until="upstream packs absent experts and ranks that differ",
    ),
)
