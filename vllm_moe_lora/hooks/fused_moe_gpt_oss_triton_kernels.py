"""vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py"""

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


def _apply_on_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    # The names are upstream's, which its caller gives.
    def apply(self: Any, *, topk_ids: Any, expert_map: Any, **more: Any) -> Any:
        from ..layers.gpu import triton_kernels_experts

        with triton_kernels_experts.on_rank(self, topk_ids, expert_map):
            return original(self, topk_ids=topk_ids, expert_map=expert_map, **more)

    return apply


def _moe_sum(original: Callable[..., Any]) -> Callable[..., Any]:
    def moe_sum(self: Any, input: Any, output: Any) -> None:
        from ..layers.gpu import triton_kernels_experts

        original(self, triton_kernels_experts.cleared(input), output)

    return moe_sum


_CLASS = (
    "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe:"
    "UnfusedOAITritonExperts"
)
# Also of the two methods that `apply` calls, hooks/fused_moe_lora_experts_mixin.py.
ROWS: dict[str, Any] = {
    "feature": "gpu-experts",
    "why": "with 3.8 of the package triton_kernels, rows of MXFP4 experts lie by expert and get "
    "the changes of other tokens",
    "upstream": "https://github.com/vllm-project/vllm/pull/30585",
    "until": "upstream puts rows in order there as it does with older triton_kernels",
    "layers": True,
}

_RANKS: dict[str, Any] = {
    "feature": "parallel-experts",
    "releases": ">=0.21,<0.25",
    "why": "rows of another rank's experts, which triton_kernels do not write, are summed",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.25.0/vllm/model_executor/layers/"
    "fused_moe/experts/gpt_oss_triton_kernels_moe.py",
    "until": "0.25, which leaves them out",
    "layers": True,
}

HOOKS = (
    Hook(target=f"{_CLASS}.apply", make=_apply, releases=">=0.31,<0.34", **ROWS),
    Hook(target=f"{_CLASS}.apply", make=_apply_on_rank, **_RANKS),
    Hook(target=f"{_CLASS}.moe_sum", make=_moe_sum, **_RANKS),
)
