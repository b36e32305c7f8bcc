"""vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers import by_expert

        with by_expert.applying(original):
            return original(self, *args, **more)

    return apply


# Also of the two methods that `apply` calls, hooks/fused_moe_lora_experts_mixin.py.
ROWS: dict[str, Any] = {
    "feature": "lora-numbers",
    "why": "with 3.8 of the package triton_kernels, rows of MXFP4 experts lie by expert and get "
    "the changes of other tokens",
    "upstream": "https://github.com/vllm-project/vllm/pull/30585",
    "until": "upstream puts rows in order there as it does with older triton_kernels",
    "layers": True,
}

HOOKS = (
    Hook(
        target="vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe:"
        "UnfusedOAITritonExperts.apply",
        make=_apply,
        releases=">=0.31,<0.34",
        **ROWS,
    ),
)
