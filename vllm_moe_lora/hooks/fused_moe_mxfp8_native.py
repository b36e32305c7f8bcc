"""vllm/model_executor/layers/fused_moe/experts/mxfp8_native_moe.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe.experts.mxfp8_native_moe"


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    # The names are upstream's: its callers give all of them.
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
        with mxfp8.lora(self, *given, expert_map):
            return original(self, output, *given, *where, *rest, **more)

    return apply


def _product(original: Callable[..., Any]) -> Callable[..., Any]:
    def _grouped_gemm_mxfp8(*args: Any, **more: Any) -> Any:
        from ..layers.quantised import mxfp8

        return mxfp8.product(original(*args, **more))

    return _grouped_gemm_mxfp8


HOOKS = (
    Hook(
        feature="quantised-experts",
        target=f"{_FILE}:Mxfp8NativeTritonExperts.apply",
        make=_apply,
        releases=">=0.24,<0.34",
        why="it inherits that it takes LoRA and never looks at it: adapters on MXFP8 experts on "
        "ROCm are ignored without a word",
        upstream="",
        until="Mxfp8NativeTritonExperts.apply reads _lora_context",
        layers=True,
    ),
    Hook(
        feature="quantised-experts",
        target=f"{_FILE}:_grouped_gemm_mxfp8",
        make=_product,
        releases=">=0.24,<0.34",
        why="the two products of Mxfp8NativeTritonExperts.apply, where LoRA is added",
        upstream="",
        until="Mxfp8NativeTritonExperts.apply reads _lora_context",
        layers=True,
    ),
)
