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


HOOKS = (
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
