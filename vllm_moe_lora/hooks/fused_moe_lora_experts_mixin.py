"""vllm/model_executor/layers/fused_moe/experts/lora_experts_mixin.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _apply_w13_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_w13_lora(self: Any, lora_context: Any, *, y: Any, **more: Any) -> Any:
        from ..layers import interleaved

        if not interleaved.wanted(self, lora_context):
            return original(self, lora_context, y=y, **more)
        fresh = not more.pop("add_inputs", True)
        return interleaved.added(
            y, lambda change: original(self, lora_context, y=change, **more), fresh
        )

    return apply_w13_lora


HOOKS = (
    Hook(
        feature="lora-numbers",
        target="vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:"
        "LoRAExpertsMixin.apply_w13_lora",
        make=_apply_w13_lora,
        releases=">=0.22,<0.32",
        why="with --enable-mixed-moe-lora-format gate's and up's changes are added to gpt-oss as "
        "if its gate and up lay one behind the other",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/"
        "fused_moe/experts/lora_experts_mixin.py",
        until="0.32, which adds them in turn",
        layers=True,
    ),
)
