"""vllm/model_executor/layers/fused_moe/cpu_fused_moe.py (up to 0.27): keeps weights unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _check_grouped_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_grouped_gemm(self: Any, layer: Any) -> tuple[bool, str]:
        if layer.moe_config.is_lora_enabled:
            from ..layers.cpu.torch_experts import replace_silu

            replace_silu()
            return False, "none"
        found: tuple[bool, str] = original(self, layer)
        return found

    return check_grouped_gemm


HOOKS = (
    Hook(
        feature="cpu-experts",
        target="vllm.model_executor.layers.fused_moe.cpu_fused_moe:CPUFusedMOE.check_grouped_gemm",
        make=_check_grouped_gemm,
        releases=">=0.24,<0.28",
        platforms=("cpu",),
        why="it decides to pack the experts' weights, but layers/cpu/torch_experts.py, which adds "
        "LoRA in these releases, needs unpacked weights. And in 0.24 these stop the engine at the "
        "first forward: for SiLU it makes a custom operator there, which is not allowed",
        upstream="",
        until="0.28, which does not have this file any more",
    ),
)
