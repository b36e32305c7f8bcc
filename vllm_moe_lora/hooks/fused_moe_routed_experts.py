"""vllm/model_executor/layers/fused_moe/routed_experts.py: experts that no adapter may target.

Up to 0.23 the file is layer.py.
"""

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


def _init_up_to_0_23(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **more: Any) -> None:
        from ..layers import without_lora

        without_lora.build_experts(more.get("prefix", ""), lambda: original(self, *args, **more))

    # Other code inspects the parameters, which differ between releases.
    __init__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return __init__


_COMMON: dict[str, Any] = {
    "feature": "untargeted-experts",
    "why": "with LoRA the routed experts of every layer get a backend that supports LoRA, even if "
    "lora_target_modules leaves them out: that backend may be slower for all requests, and if "
    "there is none the start fails",
    "upstream": "",
    "until": "upstream enables LoRA for each layer only if an adapter may target it",
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
        make=_init_up_to_0_23,
        releases=">=0.11.1,<0.24",
        **_COMMON,
    ),
)
