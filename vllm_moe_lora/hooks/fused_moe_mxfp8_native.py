"""vllm/model_executor/layers/fused_moe/experts/mxfp8_native_moe.py: LoRA on MXFP8 on ROCm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe.experts.mxfp8_native_moe"


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    # The parameters have upstream's names, because callers pass them by name.
    def apply(
        self: Any,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        from ..layers.quantised import mxfp8

        given = (hidden_states, w1, w2, topk_weights, topk_ids)
        where = (activation, global_num_experts, expert_map)
        with mxfp8.adding_lora(self, *given, expert_map):
            return original(self, output, *given, *where, *rest, **more)

    return apply


def _grouped_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    def _grouped_gemm_mxfp8(*args: Any, **more: Any) -> Any:
        from ..layers.quantised import mxfp8

        return mxfp8.add_lora(original(*args, **more))

    return _grouped_gemm_mxfp8


HOOKS = (
    Hook(
        feature="quantised-experts",
        target=f"{_FILE}:Mxfp8NativeTritonExperts.apply",
        make=_apply,
        releases=">=0.24,<0.34",
        why="the class inherits supports_lora() == True but its apply does not add LoRA: on ROCm "
        "an adapter is silently ignored on MXFP8 experts",
        upstream="",
        until="Mxfp8NativeTritonExperts.apply reads _lora_context",
        layers=True,
    ),
    Hook(
        feature="quantised-experts",
        target=f"{_FILE}:_grouped_gemm_mxfp8",
        make=_grouped_gemm,
        releases=">=0.24,<0.34",
        why="Mxfp8NativeTritonExperts.apply calls this function for both of its GEMMs, and LoRA "
        "must be added to the result of each",
        upstream="",
        until="Mxfp8NativeTritonExperts.apply reads _lora_context",
        layers=True,
    ),
)
