"""vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py: weights loaded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _setup_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    def _setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        lora = self.moe.is_lora_enabled or getattr(self.moe, "moe_lora_left_out", False)
        if again and lora:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return _setup_kernel


HOOKS = (
    Hook(
        feature="cpu-experts",
        target="vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
        "UnquantizedFusedMoEMethod._setup_kernel",
        make=_setup_kernel,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="the CPU's experts are packed only when they are loaded for the first time. Weights "
        "that are loaded later, by reload_weights or a trainer, stay unpacked, and the operator "
        "takes them for packed ones: all answers are wrong, with and without LoRA",
        upstream="",
        until="upstream packs the CPU's experts each time their weights were loaded",
    ),
)
