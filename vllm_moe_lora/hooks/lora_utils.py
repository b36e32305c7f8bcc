"""vllm/lora/utils.py: does not wrap experts that were built without LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _supported(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_supported_lora_modules(model: Any) -> list[str]:
        from ..fitting.moe_layers import suffixes_without_lora

        without = suffixes_without_lora(model)
        return [suffix for suffix in original(model) if suffix not in without]

    return get_supported_lora_modules


HOOKS = (
    Hook(
        feature="untargeted-experts",
        target="vllm.lora.utils:get_supported_lora_modules",
        make=_supported,
        releases=">=0.11.1,<0.34",
        # The module that imports it by name: the first in 0.11 and 0.12, the second later.
        also=(
            "vllm.lora.models:get_supported_lora_modules",
            "vllm.lora.model_manager:get_supported_lora_modules",
        ),
        why="experts that were built without LoRA, because no adapter targets them, must not be "
        "wrapped in a LoRA layer",
        upstream="",
        until="upstream enables LoRA for each layer only if an adapter may target it",
        layers=True,
    ),
)
