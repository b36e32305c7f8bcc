"""vllm/lora/punica_wrapper/punica_gpu.py: our MoE kernels, and upstream's for groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_CLASS = "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU"


def _add_lora_w13(original: Callable[..., Any]) -> Callable[..., Any]:
    # The parameters have upstream's names, because callers pass some of them by name.
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
        result = add_w13(*given, num_tokens, add_inputs, token_lora_mapping)
        if result is not None:
            return result
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
        from ..layers.gpu.moe_kernels import RoutedBatch, add_w2

        if isinstance(sorted_token_ids_lora, RoutedBatch):  # from our add_w13
            return add_w2(sorted_token_ids_lora, y, x, topk_weights, add_inputs)
        base_product.flush()
        given = (self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora)
        return original(*given, *rest, add_inputs=add_inputs, **more)

    return add_lora_w2


def _align(original: Callable[..., Any]) -> Callable[..., Any]:
    def moe_lora_align_block_size(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu.data_parallel import all_slots

        with all_slots(self):
            return original(self, *args, **more)

    return moe_lora_align_block_size


def _add_lora_fused_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora_fused_moe(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu.data_parallel import all_slots

        with all_slots(self):
            return original(self, *args, **more)

    return add_lora_fused_moe


_GROUP: dict[str, Any] = {
    "feature": "data-parallel-gpu",
    "releases": ">=0.30,<0.34",
    "platforms": ("cuda",),
    "layers": True,
    "why": "with data parallelism, experts also get tokens whose adapters no request of their own "
    "rank has; upstream launches no kernel for those",
    "upstream": "",
    "until": "upstream looks for the adapters of the tokens that the experts got",
}
_COMMON: dict[str, Any] = {
    "feature": "moe-kernels",
    "releases": ">=0.28,<0.34",
    "platforms": ("cuda",),  # the device type of ROCm is "cuda", too
    "layers": True,
    "why": "upstream's kernels load the factors two bytes at a time, launch programs for every "
    "adapter slot, and read and write y once more. VLLM_MOE_LORA_KERNELS says which kernels run",
    "upstream": "https://github.com/vllm-project/vllm/pull/32317",
    "until": "upstream's kernels are as fast as ours",
}

HOOKS = (
    Hook(target=f"{_CLASS}.add_lora_w13", make=_add_lora_w13, **_COMMON),
    Hook(target=f"{_CLASS}.add_lora_w2", make=_add_lora_w2, **_COMMON),
    Hook(target=f"{_CLASS}.moe_lora_align_block_size", make=_align, **_GROUP),
    Hook(target=f"{_CLASS}.add_lora_fused_moe", make=_add_lora_fused_moe, **_GROUP),
)
