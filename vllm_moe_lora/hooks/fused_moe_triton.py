"""vllm/model_executor/layers/fused_moe/fused_moe.py: the Triton experts.

From 0.21 on the experts classes are in experts/triton_moe.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe"


# w1, w2, topk_weights and topk_ids of one call.
Given = tuple[Any, Any, Any, Any]


def _apply_adding_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(experts: Any, tokens: Any, scale: Any, given: Given, expert_map: Any) -> Any:
        from ..layers.quantised.lora_context import adding_lora

        return adding_lora(experts, tokens, *given, expert_map), tokens, scale

    return _prepared(prepare, original)


def _apply_quantising(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(experts: Any, tokens: Any, scale: Any, given: Given, expert_map: Any) -> Any:
        from ..layers.quantised.unquantised_tokens import quantise

        return quantise(experts, tokens, scale)

    return _prepared(prepare, original)


def _prepared(prepare: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``original`` with the experts, tokens and scales that ``prepare`` returns."""

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
        a1q_scale: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        given = (w1, w2, topk_weights, topk_ids)
        experts, tokens, scale = prepare(self, hidden_states, a1q_scale, given, expert_map)
        how = (activation, global_num_experts, expert_map, scale)
        return original(experts, output, tokens, *given, *how, *rest, **more)

    return apply


def _apply_deferring(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *args: Any, **more: Any) -> Any:
        if self._lora_context is None:
            return original(self, *args, **more)
        from ..layers.gpu import moe_kernels

        with moe_kernels.deferring(self):
            return original(self, *args, **more)

    return apply


def _deferrable(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)

    def invoke_fused_moe_triton_kernel(*args: Any, **more: Any) -> None:
        from ..layers.gpu import base_product

        if base_product.is_deferring():
            given = {"B_bias": None, **dict(zip(names, args, strict=False)), **more}
            if base_product.defer(lambda: original(*args, **more), given):
                return
        original(*args, **more)

    return invoke_fused_moe_triton_kernel


def _hooks(file: str, adding_lora: str, quantising: str) -> list[Hook]:
    """Return the hooks for quantised experts.

    Args:
        file: the module of the experts classes.
        adding_lora, quantising: the releases of the two hooks.
    """
    return [
        Hook(
            feature="quantised-experts",
            target=f"{file}:TritonWNA16Experts.apply",
            make=_apply_adding_lora,
            releases=adding_lora,
            why="the class inherits supports_lora() == True but its apply does not add LoRA: an "
            "adapter is silently ignored on INT4 and INT8 experts that Marlin does not support",
            upstream="",
            until="TritonWNA16Experts.apply reads _lora_context",
            layers=True,
        ),
        Hook(
            feature="quantised-experts",
            target=f"{file}:TritonExperts.apply",
            make=_apply_quantising,
            releases=quantising,
            why="with FP8 and INT8 weights, lora_a of gate and up is multiplied with the quantised "
            "tokens without their scale",
            upstream="https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/"
            "layers/fused_moe/experts/triton_moe.py",
            until="0.24, which keeps the unquantised tokens for LoRA",
            layers=True,
        ),
    ]


_TAIL: dict[str, Any] = {
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # as in hooks/lora_punica_gpu.py
    "layers": True,
    "why": "after the base GEMM, LoRA reads and writes the whole output once more; with "
    "VLLM_MOE_LORA_KERNELS=tail one kernel computes both",
    "upstream": "",
    "until": "upstream's kernels are as fast as ours",
}

HOOKS = (
    Hook(target=f"{_FILE}.experts.triton_moe:TritonExperts.apply", make=_apply_deferring, **_TAIL),
    Hook(
        target=f"{_FILE}.fused_moe:invoke_fused_moe_triton_kernel",
        also=(f"{_FILE}.experts.triton_moe:invoke_fused_moe_triton_kernel",),
        make=_deferrable,
        **_TAIL,
    ),
    *_hooks(f"{_FILE}.fused_moe", ">=0.20,<0.21", ">=0.20,<0.21"),
    *_hooks(f"{_FILE}.experts.triton_moe", ">=0.21,<0.34", ">=0.21,<0.24"),
)
