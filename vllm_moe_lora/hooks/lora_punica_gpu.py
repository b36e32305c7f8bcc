"""vllm/lora/punica_wrapper/punica_gpu.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_CLASS = "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU"


def _add_lora_w13(original: Callable[..., Any]) -> Callable[..., Any]:
    # The names are upstream's, which its callers give in part.
    def add_lora_w13(
        self: Any,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        topk_ids: Any,
        topk_weights: Any,
        expert_map: Any,
        w1: Any,
        w2: Any,
        num_tokens: int,
        *rest: Any,
        add_inputs: bool = True,
        token_lora_mapping: Any = None,
        **more: Any,
    ) -> Any:
        from ..layers.gpu import base_product
        from ..layers.gpu.moe_kernels import add_w13

        factors, routes = (lora_a_stacked, lora_b_stacked), (topk_ids, topk_weights, expert_map)
        given = (self, y, x, *factors, *routes)
        handed = add_w13(*given, num_tokens, add_inputs, token_lora_mapping)
        if handed is not None:
            return handed
        base_product.flush()
        more |= {"add_inputs": add_inputs, "token_lora_mapping": token_lora_mapping}
        return original(*given, w1, w2, num_tokens, *rest, **more)

    return add_lora_w13


def _add_lora_w2(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_w2(
        self: Any,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        topk_weights: Any,
        sorted_token_ids_lora: Any,
        *rest: Any,
        add_inputs: bool = True,
        **more: Any,
    ) -> None:
        from ..layers.gpu import base_product
        from ..layers.gpu.moe_kernels import Handed, add_w2

        if isinstance(sorted_token_ids_lora, Handed):
            return add_w2(sorted_token_ids_lora, y, x, topk_weights, add_inputs)
        base_product.flush()
        given = (self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora)
        return original(*given, *rest, add_inputs=add_inputs, **more)

    return add_lora_w2


_COMMON: dict[str, Any] = {
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # ROCm calls itself that, too
    "layers": True,
    "why": "upstream loads weights two bytes at a time, launches a grid for every adapter slot, "
    "and reads and writes y once more; which kernels run is VLLM_MOE_LORA_KERNELS",
    "upstream": "https://github.com/vllm-project/vllm/pull/32317",
    "until": "upstream's kernels are as fast",
}

HOOKS = (
    Hook(target=f"{_CLASS}.add_lora_w13", make=_add_lora_w13, **_COMMON),
    Hook(target=f"{_CLASS}.add_lora_w2", make=_add_lora_w2, **_COMMON),
)
