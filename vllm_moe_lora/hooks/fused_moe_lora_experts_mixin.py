"""vllm/model_executor/layers/fused_moe/experts/lora_experts_mixin.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook
from . import fused_moe_gpt_oss_triton_kernels as gpt_oss_triton_kernels


def _apply_w13_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w13_lora(self: Any, lora_context: Any, *, y: Any, **more: Any) -> Any:
        from ..layers.gpu import interleaved

        if not interleaved.wanted(self, lora_context):
            return original(self, lora_context, y=y, **more)
        fresh = not more.pop("add_inputs", True)
        return interleaved.added(
            y, lambda change: original(self, lora_context, y=change, **more), fresh
        )

    return apply_w13_lora


def _apply_w13_by_expert(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w13_lora(self: Any, lora_context: Any, *, y: Any, **more: Any) -> Any:
        from ..layers.gpu import triton_kernels_experts

        return triton_kernels_experts.add_w13(
            lambda rows: original(self, lora_context, y=rows, **more), y, more
        )

    return apply_w13_lora


def _apply_w13_both(original: Callable[..., Any]) -> Callable[..., Any]:
    return _apply_w13_by_expert(_apply_w13_lora(original))


def _apply_w2_by_expert(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w2_lora(self: Any, lora_context: Any, *, x: Any, **more: Any) -> None:
        from ..layers.gpu import triton_kernels_experts

        triton_kernels_experts.add_w2(lambda rows: original(self, lora_context, x=rows, **more), x)

    return apply_w2_lora


_CLASS = "vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:LoRAExpertsMixin"
_IN_TURN: dict[str, Any] = {
    "feature": "gpu-experts",
    "target": f"{_CLASS}.apply_w13_lora",
    "why": "with --enable-mixed-moe-lora-format gate's and up's changes are added to gpt-oss as "
    "if its gate and up lay one behind the other",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/"
    "fused_moe/experts/lora_experts_mixin.py",
    "until": "0.32, which adds them in turn",
    "layers": True,
}
_ROWS: dict[str, Any] = {**gpt_oss_triton_kernels.ROWS, "target": f"{_CLASS}.apply_w13_lora"}

HOOKS = (
    Hook(make=_apply_w13_lora, **_IN_TURN, releases=">=0.22,<0.31"),
    Hook(
        make=_apply_w13_both,
        **{**_IN_TURN, "why": f"{_IN_TURN['why']}; and {_ROWS['why']}"},
        releases=">=0.31,<0.32",
    ),
    Hook(make=_apply_w13_by_expert, **_ROWS, releases=">=0.32,<0.34"),
    Hook(
        make=_apply_w2_by_expert,
        **{**_ROWS, "target": f"{_CLASS}.apply_w2_lora"},
        releases=">=0.31,<0.34",
    ),
)
