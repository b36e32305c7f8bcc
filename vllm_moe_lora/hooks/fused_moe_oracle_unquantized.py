"""vllm/model_executor/layers/fused_moe/oracle/unquantized.py: which backend runs experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.unquantized"


def _select(original: Callable[..., Any]) -> Callable[..., Any]:
    """From 0.30 on: select the backend as without LoRA, and a subclass with LoRA support."""

    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return original(moe_config)
        from ..layers.cpu.subclasses import select_with_lora

        return select_with_lora(original, moe_config, moe_config)

    return select_unquantized_moe_backend


def _select_monolithic(original: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 0.27: select the backend as without LoRA. layers/cpu/torch_experts.py adds LoRA."""

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
    "why": "with LoRA it selects the Triton experts on every platform, but there is no Triton on a "
    "CPU: the first forward pass fails with: module 'triton.language' has no attribute 'bfloat16'",
    "upstream": "https://github.com/vllm-project/vllm/pull/21229",
    "until": "upstream's CPU experts support LoRA",
}

HOOKS = (
    # The CPU experts of 0.28 and 0.29 are monolithic, and there is no LoRA for them here.
    Hook(make=_select, releases=">=0.30,<0.34", **_COMMON),
    Hook(make=_select_monolithic, releases=">=0.24,<0.28", **_COMMON),
    Hook(
        feature="gpu-experts",
        target=f"{_ORACLE}:_trtllm_bf16_lora_supported",
        make=_trtllm_supported,
        releases=">=0.26,<0.28",
        why="with LoRA all bf16 experts on Blackwell run a kernel for SwiGLU without bias, even "
        "those with another activation (gpt-oss), so requests without an adapter get wrong "
        "answers, too",
        upstream="https://github.com/vllm-project/vllm/blob/v0.28.0/vllm/model_executor/layers/"
        "fused_moe/oracle/unquantized.py",
        until="0.28, which asks the experts class whether it supports the activation",
        layers=True,
    ),
)
