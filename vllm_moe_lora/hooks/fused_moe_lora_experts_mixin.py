"""vllm/model_executor/layers/fused_moe/experts/lora_experts_mixin.py: LoRA of gpt-oss' experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook
from . import fused_moe_gpt_oss_triton_kernels as gpt_oss_triton_kernels


def _apply_w13_interleaved(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w13_lora(self: Any, lora_context: Any, *, y: Any, **more: Any) -> Any:
        from ..layers.gpu import interleaved

        if not interleaved.needed(self, lora_context):
            return original(self, lora_context, y=y, **more)
        overwrite = not more.pop("add_inputs", True)
        return interleaved.add_interleaved(
            y, lambda delta: original(self, lora_context, y=delta, **more), overwrite
        )

    return apply_w13_lora


def _apply_w13_sorted(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w13_lora(self: Any, lora_context: Any, *, y: Any, **more: Any) -> Any:
        from ..layers.gpu import triton_kernels_experts

        return triton_kernels_experts.add_w13(
            lambda rows: original(self, lora_context, y=rows, **more), y, more
        )

    return apply_w13_lora


def _apply_w13_both(original: Callable[..., Any]) -> Callable[..., Any]:
    return _apply_w13_sorted(_apply_w13_interleaved(original))


def _apply_w2_sorted(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w2_lora(self: Any, lora_context: Any, *, x: Any, **more: Any) -> None:
        from ..layers.gpu import triton_kernels_experts

        triton_kernels_experts.add_w2(lambda rows: original(self, lora_context, x=rows, **more), x)

    return apply_w2_lora


_CLASS = "vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:LoRAExpertsMixin"
_INTERLEAVED: dict[str, Any] = {
    "feature": "gpu-experts",
    "target": f"{_CLASS}.apply_w13_lora",
    "why": "with --enable-mixed-moe-lora-format the LoRA of gate is added to the first half of "
    "w13's output and that of up to the second half, but in gpt-oss gate and up are interleaved",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/"
    "fused_moe/experts/lora_experts_mixin.py",
    "until": "0.32, which interleaves the LoRA of gate and up",
    "layers": True,
}
_SORTED_ROWS: dict[str, Any] = {
    **gpt_oss_triton_kernels.SORTED_ROWS,
    "target": f"{_CLASS}.apply_w13_lora",
}

HOOKS = (
    Hook(make=_apply_w13_interleaved, **_INTERLEAVED, releases=">=0.22,<0.31"),
    Hook(
        make=_apply_w13_both,
        **{**_INTERLEAVED, "why": f"{_INTERLEAVED['why']}; and {_SORTED_ROWS['why']}"},
        releases=">=0.31,<0.32",
    ),
    Hook(make=_apply_w13_sorted, **_SORTED_ROWS, releases=">=0.32,<0.34"),
    Hook(
        make=_apply_w2_sorted,
        **{**_SORTED_ROWS, "target": f"{_CLASS}.apply_w2_lora"},
        releases=">=0.31,<0.34",
    ),
)
