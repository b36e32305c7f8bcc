"""vllm/model_executor/layers/fused_moe/routed_experts.py: experts that no adapter may target.

Up to 0.23 the file is layer.py.
"""

from __future__ import annotations

import functools
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


def _weight_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    # Upstream marks the function, and inspects its parameters.
    @functools.wraps(original, assigned=("__name__",))
    def weight_loader(self: Any, param: Any, *args: Any, **more: Any) -> Any:
        kernel = getattr(self.quant_method, "moe_kernel", None)
        prepare = getattr(getattr(kernel, "fused_experts", None), "before_load", None)
        if prepare is not None:
            prepare(param)
        return original(self, param, *args, **more)

    return weight_loader


def _load_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_weights(self: Any, weights: Any) -> Any:
        from ..rl.base_weights import checkpoint_name

        self.lora_base_layer_prefix = ""
        return original(self, ((checkpoint_name(name), tensor) for name, tensor in weights))

    return load_weights


HOOKS = (
    Hook(
        feature="base-weights",
        target=f"{_FILE}.routed_experts:RoutedExperts.load_weights",
        make=_load_weights,
        releases=">=0.30,<0.34",
        why="with LoRA, experts are loaded only from names with base_layer, as PEFT has them. With "
        "the checkpoint's own names reload_weights leaves the old experts in place, silently",
        upstream="",
        until="upstream loads experts from either name",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_FILE}.routed_experts:RoutedExperts.weight_loader",
        make=_weight_loader,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="a trainer that calls load_weights on the live model writes plain weights into packed "
        "ones, which may also have columns with the factors of adapters",
        upstream="",
        until="upstream's CPU experts support LoRA, and unpack their weights before they are "
        "loaded again",
    ),
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
