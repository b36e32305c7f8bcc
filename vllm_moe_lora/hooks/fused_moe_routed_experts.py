"""vllm/model_executor/layers/fused_moe/routed_experts.py, up to 0.23 layer.py"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe"


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(
        self: Any, layer_name: str, params_dtype: Any, moe_config: Any, *args: Any, **more: Any
    ) -> None:
        from ..layers import without_lora

        def build() -> None:
            original(self, layer_name, params_dtype, moe_config, *args, **more)

        without_lora.build_experts(layer_name, build, moe_config)

    return __init__


def _init_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **more: Any) -> None:
        from ..layers import without_lora

        without_lora.build_experts(more.get("prefix", ""), lambda: original(self, *args, **more))

    # Who looks for the arguments of this release finds them.
    __init__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return __init__


_COMMON: dict[str, Any] = {
    "feature": "untargeted-experts",
    "why": "LoRA anywhere moves the routed experts of every layer to a backend that takes LoRA, "
    "slower for all requests, or ends the start where there is none: also where "
    "lora_target_modules leaves experts out",
    "upstream": "",
    "until": "upstream asks for each layer whether LoRA may target it",
    "layers": True,
}

HOOKS = (
    Hook(
        target=f"{_FILE}.routed_experts:RoutedExperts.__init__",
        make=_init,
        releases=">=0.24,<0.34",
        **_COMMON,
    ),
    Hook(
        target=f"{_FILE}.layer:FusedMoE.__init__",
        make=_init_whole,
        releases=">=0.11.1,<0.24",
        **_COMMON,
    ),
)
