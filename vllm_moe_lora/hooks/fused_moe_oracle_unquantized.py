"""vllm/model_executor/layers/fused_moe/oracle/unquantized.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.unquantized"


def _select(original: Callable[..., Any]) -> Callable[..., Any]:
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        from ..layers.cpu.subclasses import lora_choice

        # The choice upstream makes without LoRA, in its LoRA-capable form.
        return lora_choice(original, moe_config, moe_config)

    return select_unquantized_moe_backend


def _select_plain(original: Callable[..., Any]) -> Callable[..., Any]:
    def select_unquantized_moe_backend(moe_config: Any, *args: Any, **more: Any) -> Any:
        from ..layers.without_lora import lora_off

        with lora_off(moe_config):
            return original(moe_config, *args, **more)

    return select_unquantized_moe_backend


def _trtllm_supported(original: Callable[..., Any]) -> Callable[..., Any]:
    def _trtllm_bf16_lora_supported(moe_config: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.experts import trtllm_lora_moe

        experts = trtllm_lora_moe.TrtLlmBf16LoRAExperts
        return experts._supports_activation(moe_config.activation) and original(moe_config)

    return _trtllm_bf16_lora_supported


_COMMON: dict[str, Any] = {
    "feature": "cpu-experts",
    "target": f"{_ORACLE}:select_unquantized_moe_backend",
    "also": (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
        "select_unquantized_moe_backend",
    ),
    "platforms": ("cpu",),
    "why": "with LoRA it returns the Triton experts on every platform; a CPU has no Triton, so "
    "the first token dies with: module 'triton.language' has no attribute 'bfloat16'",
    "upstream": "https://github.com/vllm-project/vllm/pull/21229",
    "until": "upstream's CPU experts support LoRA",
}

HOOKS = (
    # Up to 0.29 the CPU's experts route for themselves (monolithic), which LoRA layers refuse.
    Hook(make=_select, releases=">=0.30,<0.34", **_COMMON),
    Hook(make=_select_plain, releases=">=0.24,<0.28", **_COMMON),
    Hook(
        feature="gpu-experts",
        target=f"{_ORACLE}:_trtllm_bf16_lora_supported",
        make=_trtllm_supported,
        releases=">=0.26,<0.28",
        why="with LoRA all bf16 experts on Blackwell are computed as SwiGLU without a bias, "
        "gpt-oss's too, also for base requests",
        upstream="https://github.com/vllm-project/vllm/blob/v0.28.0/vllm/model_executor/layers/"
        "fused_moe/oracle/unquantized.py",
        until="0.28, which asks the experts for what they support",
        layers=True,
    ),
)
