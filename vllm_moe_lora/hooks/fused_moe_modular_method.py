"""vllm/model_executor/layers/fused_moe/fused_moe_modular_method.py: router weights on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, layer: Any, x: Any, topk_weights: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu import router_weights_on_input

        experts = self.moe_kernel.fused_experts
        tokens, weights = router_weights_on_input.multiply(experts, layer, x, topk_weights)
        if tokens is not x and more.get("shared_experts_input", x) is None:
            more["shared_experts_input"] = x  # shared experts get the tokens without weights
        return original(self, layer, tokens, weights, *args, **more)

    return apply


def _process_weights_after_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        from ..rl.base_weights import process_again

        process_again(self, layer)

    return process_weights_after_loading


HOOKS = (
    Hook(
        feature="base-weights",
        target="vllm.model_executor.layers.fused_moe.fused_moe_modular_method:"
        "FusedMoEModularMethod.process_weights_after_loading",
        make=_process_weights_after_loading,
        releases=">=0.30,<0.33",
        why="with LoRA, weights of experts that are loaded again stay as the checkpoint has them, "
        "and are not brought into the form that the kernel takes",
        upstream="https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/"
        "fused_moe/fused_moe_modular_method.py",
        until="0.33, which processes them",
    ),
    Hook(
        feature="gpu-experts",
        target="vllm.model_executor.layers.fused_moe.fused_moe_modular_method:"
        "FusedMoEModularMethod.apply",
        make=_apply,
        releases=">=0.20,<0.34",
        why="if the router weights are applied on the experts' input (Llama-4), the LoRA of gate "
        "and up is computed without them, and the LoRA of down is multiplied with them twice",
        upstream="",
        until="upstream's LoRA kernels support apply_router_weight_on_input",
        layers=True,
    ),
)
