"""vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py: order of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu import triton_kernels_experts

        with triton_kernels_experts.applying(original):
            return original(self, *args, **more)

    return apply


def _apply_expert_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    # Upstream calls it with keyword arguments only.
    def apply(self: Any, *, topk_ids: Any, expert_map: Any, **more: Any) -> Any:
        from ..layers.gpu import triton_kernels_experts

        with triton_kernels_experts.expert_parallel(self, topk_ids, expert_map):
            return original(self, topk_ids=topk_ids, expert_map=expert_map, **more)

    return apply


def _moe_sum(original: Callable[..., Any]) -> Callable[..., Any]:
    def moe_sum(self: Any, input: Any, output: Any) -> None:
        from ..layers.gpu import triton_kernels_experts

        original(self, triton_kernels_experts.clear_remote(input), output)

    return moe_sum


_CLASS = (
    "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe:"
    "UnfusedOAITritonExperts"
)
# hooks/fused_moe_lora_experts_mixin.py uses it too, for the two methods that `apply` calls.
SORTED_ROWS: dict[str, Any] = {
    "feature": "gpu-experts",
    "why": "with version 3.8 of the package triton_kernels, the rows of MXFP4 experts are sorted "
    "by expert, but LoRA is added as if they were in token order, so a token gets the LoRA of "
    "another one",
    "upstream": "https://github.com/vllm-project/vllm/pull/30585",
    "until": "upstream brings the rows into token order, as it does with older triton_kernels",
    "layers": True,
}

_REMOTE_ROWS: dict[str, Any] = {
    "feature": "parallel-experts",
    "releases": ">=0.21,<0.25",
    "why": "with LoRA and expert parallelism, the rows of experts on other devices are summed, "
    "although triton_kernels leave them uninitialised",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.25.0/vllm/model_executor/layers/"
    "fused_moe/experts/gpt_oss_triton_kernels_moe.py",
    "until": "0.25, which does not sum them",
    "layers": True,
}

HOOKS = (
    Hook(target=f"{_CLASS}.apply", make=_apply, releases=">=0.31,<0.34", **SORTED_ROWS),
    Hook(target=f"{_CLASS}.apply", make=_apply_expert_parallel, **_REMOTE_ROWS),
    Hook(target=f"{_CLASS}.moe_sum", make=_moe_sum, **_REMOTE_ROWS),
)
