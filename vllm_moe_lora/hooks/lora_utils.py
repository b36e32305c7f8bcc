"""vllm/lora/utils.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _supported(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_supported_lora_modules(model: Any) -> list[str]:
        from ..fitting.moe_layers import words_without_lora

        lean = words_without_lora(model)
        return [word for word in original(model) if word not in lean]

    return get_supported_lora_modules


_COMMON: dict[str, Any] = {
    "feature": "untargeted-experts",
    "target": "vllm.lora.utils:get_supported_lora_modules",
    "make": _supported,
    "why": "experts that were built without LoRA, because no adapter targets them, must not be "
    "wrapped",
    "upstream": "",
    "until": "upstream asks for each layer whether LoRA may target it",
    "layers": True,
}

HOOKS = (
    Hook(
        releases=">=0.13,<0.34",
        also=("vllm.lora.model_manager:get_supported_lora_modules",),
        **_COMMON,
    ),
    Hook(
        releases=">=0.11.1,<0.13",
        also=("vllm.lora.models:get_supported_lora_modules",),
        **_COMMON,
    ),
)
