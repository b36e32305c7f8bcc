"""vllm/model_executor/layers/fused_moe/fused_moe.py, from 0.21 on experts/triton_moe.py"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe"


# w1, w2, topk_weights, topk_ids of one call.
Given = tuple[Any, Any, Any, Any]


def _consuming(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(experts: Any, tokens: Any, scale: Any, given: Given, expert_map: Any) -> Any:
        from ..layers.quantised.lora_context import consuming

        return consuming(experts, tokens, *given, expert_map), tokens, scale

    return _after(prepare, original)


def _quantising(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(experts: Any, tokens: Any, scale: Any, given: Given, expert_map: Any) -> Any:
        from ..layers.quantised.unquantised_tokens import quantised

        return quantised(experts, tokens, scale)

    return _after(prepare, original)


def _after(prepare: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with the experts, tokens and scales that ``prepare`` gives for one call."""

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
        a1q_scale: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        given = (w1, w2, topk_weights, topk_ids)
        experts, tokens, scale = prepare(self, hidden_states, a1q_scale, given, expert_map)
        how = (activation, global_num_experts, expert_map, scale)
        return original(experts, output, tokens, *given, *how, *rest, **more)

    return apply


def _tailed(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *args: Any, **more: Any) -> Any:
        if self._lora_context is None:
            return original(self, *args, **more)
        from ..layers.gpu import moe_kernels

        with moe_kernels.applying(self):
            return original(self, *args, **more)

    return apply


def _putting_off(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)

    def invoke_fused_moe_triton_kernel(*args: Any, **more: Any) -> None:
        from ..layers.gpu import base_product

        if base_product.wanted():
            given = {"B_bias": None, **dict(zip(names, args, strict=False)), **more}
            if base_product.put_off(lambda: original(*args, **more), given):
                return
        original(*args, **more)

    return invoke_fused_moe_triton_kernel


def _hooks(file: str, consuming: str, quantising: str) -> list[Hook]:
    return [
        Hook(
            feature="quantised-experts",
            target=f"{file}:TritonWNA16Experts.apply",
            make=_consuming,
            releases=consuming,
            why="it inherits that it takes LoRA and never looks at it: adapters on INT4 and INT8 "
            "experts that Marlin does not take are ignored without a word",
            upstream="",
            until="TritonWNA16Experts.apply reads _lora_context",
            layers=True,
        ),
        Hook(
            feature="quantised-experts",
            target=f"{file}:TritonExperts.apply",
            make=_quantising,
            releases=quantising,
            why="FP8 and INT8 tokens are multiplied with gate's and up's factors without their "
            "scale",
            upstream="https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/"
            "layers/fused_moe/experts/triton_moe.py",
            until="0.24, which keeps the tokens as they were",
            layers=True,
        ),
    ]


_TAIL: dict[str, Any] = {
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # as in hooks/lora_punica_gpu.py
    "layers": True,
    "why": "LoRA reads and writes all that the base's product wrote once more; with "
    "VLLM_MOE_LORA_KERNELS=tail it is a part of that product",
    "upstream": "",
    "until": "upstream's kernels are as fast",
}

HOOKS = (
    Hook(target=f"{_FILE}.experts.triton_moe:TritonExperts.apply", make=_tailed, **_TAIL),
    Hook(
        target=f"{_FILE}.fused_moe:invoke_fused_moe_triton_kernel",
        also=(f"{_FILE}.experts.triton_moe:invoke_fused_moe_triton_kernel",),
        make=_putting_off,
        **_TAIL,
    ),
    *_hooks(f"{_FILE}.fused_moe", ">=0.20,<0.21", ">=0.20,<0.21"),
    *_hooks(f"{_FILE}.experts.triton_moe", ">=0.21,<0.34", ">=0.21,<0.24"),
)
