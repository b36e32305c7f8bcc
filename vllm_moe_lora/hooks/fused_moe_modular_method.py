"""vllm/model_executor/layers/fused_moe/fused_moe_modular_method.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, layer: Any, x: Any, topk_weights: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu import router_weights_on_input

        experts = self.moe_kernel.fused_experts
        tokens, weights = router_weights_on_input.moved(experts, layer, x, topk_weights)
        if tokens is not x and more.get("shared_experts_input", x) is None:
            more["shared_experts_input"] = x
        return original(self, layer, tokens, weights, *args, **more)

    return apply


HOOKS = (
    Hook(
        feature="gpu-experts",
        target="vllm.model_executor.layers.fused_moe.fused_moe_modular_method:"
        "FusedMoEModularMethod.apply",
        make=_apply,
        releases=">=0.20,<0.34",
        why="where router weights go on the experts' input (Llama-4), gate's and up's factors get "
        "tokens without them, and down's change is multiplied by them once more",
        upstream="",
        until="upstream's LoRA kernels are told of apply_router_weight_on_input",
        layers=True,
    ),
)
