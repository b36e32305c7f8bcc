"""Router weights that go on an expert's input (Llama-4), not on its output.

An expert e of weight s answers f(s * x) there. Upstream multiplies the tokens when it prepares
them, but (0.24 on) gives gate's and up's factors the tokens as they were, and multiplies down's
change by s on top. Marlin's experts multiply gate and up by s once more even without an adapter.
Multiplied before all that, with weights of one behind, all of it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def moved(
    experts: Any, layer: Any, tokens: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights for one call of a kernel whose ``experts`` apply LoRA (from 0.20 on).

    Args:
        layer: the module that holds the experts' weights.
        tokens: [tokens, hidden].
        topk_weights: [tokens, top_k]; with more than one a token upstream refuses the call.

    Returns:
        The same where the weights go on the output, or where there is no LoRA.
    """
    if not layer.apply_router_weight_on_input or getattr(experts, "_lora_context", None) is None:
        return tokens, topk_weights
    return _moved(tokens, topk_weights)


def _moved(tokens: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if topk_weights.shape[1] != 1:
        return tokens, topk_weights
    return tokens * topk_weights.to(tokens.dtype), torch.ones_like(topk_weights)


class _SharedExperts:
    """Shared experts that a kernel owns (up to 0.16): they get the tokens as they were."""

    def __init__(self, experts: Any) -> None:
        self.experts, self.tokens = experts, None

    def __call__(self, tokens: Any, *args: Any, **more: Any) -> Any:
        return self.experts(tokens if self.tokens is None else self.tokens, *args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def install(layer: Any) -> None:
    """Have a wrapped ``layer`` multiply first (up to 0.19, where factors are added by closures)."""
    if not getattr(layer, "apply_router_weight_on_input", False):
        return
    method = layer.quant_method
    kernel = next(
        found
        for name in ("moe_kernel", "moe_mk", "fused_experts")
        if (found := getattr(method, name, None)) is not None
    )
    shared = None
    if getattr(kernel, "shared_experts", None) is not None:
        shared = _SharedExperts(kernel.shared_experts)
        # Beside the registered module, which attribute access then does not reach.
        object.__setattr__(kernel, "shared_experts", shared)
    entry = "forward" if hasattr(kernel, "forward") else "apply"
    setattr(kernel, entry, _weighted(getattr(kernel, entry), shared))


def _weighted(run: Callable[..., Any], shared: _SharedExperts | None) -> Callable[..., Any]:
    def weighted(*, hidden_states: Any, topk_weights: Any, **more: Any) -> Any:
        tokens, weights = _moved(hidden_states, topk_weights)
        if shared is not None:
            shared.tokens = hidden_states
        if "shared_experts_input" in more and more["shared_experts_input"] is None:
            more["shared_experts_input"] = hidden_states
        return run(hidden_states=tokens, topk_weights=weights, **more)

    return weighted
