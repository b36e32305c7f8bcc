"""LoRA on experts with the router weight on their input (Llama-4) instead of their output.

An expert f with the router weight s computes f(s * x) there, not s * f(x). vLLM multiplies the
tokens with s before the experts run. But its LoRA kernels do not know that: from 0.24 on they
multiply lora_a of gate and up with the tokens without s, and they multiply the LoRA of down with s
once more. And `MarlinExperts` multiply the output of w13 with s once more, even without an adapter.

Here the tokens are multiplied with s before all that, and the kernel gets router weights of 1. Then
every later multiplication is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def multiply(
    experts: Any, layer: Any, tokens: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the tokens with their router weights, for vLLM 0.20 and later.

    Args:
        experts: upstream's experts.
        layer: the module that has their weights.
        tokens: [tokens, hidden].
        topk_weights: [tokens, top_k].

    Returns:
        The tokens and the router weights for the kernel. They are the arguments if the model puts
        the weights on the output, if the experts have no LoRA context, or if top_k is not 1. (In
        the last case upstream refuses the call.)
    """
    if not layer.apply_router_weight_on_input or getattr(experts, "_lora_context", None) is None:
        return tokens, topk_weights
    return _multiply(tokens, topk_weights)


def _multiply(
    tokens: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if topk_weights.shape[1] != 1:
        return tokens, topk_weights
    return tokens * topk_weights.to(tokens.dtype), torch.ones_like(topk_weights)


class _SharedExperts:
    """The shared experts of a kernel (vLLM up to 0.16). They get the tokens without weights."""

    def __init__(self, experts: Any) -> None:
        self.experts, self.tokens = experts, None

    def __call__(self, tokens: Any, *args: Any, **more: Any) -> Any:
        return self.experts(tokens if self.tokens is None else self.tokens, *args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def install(layer: Any) -> None:
    """Make the kernel of a layer that LoRA wraps multiply first, for vLLM 0.11 to 0.19.

    There the LoRA layer adds LoRA by functions that it wraps around the methods of the kernel.

    Args:
        layer: the module that LoRA wraps; its kernel is changed.
    """
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
        # The kernel is a Module, and _SharedExperts is not. An instance attribute hides the
        # registered module of the same name from attribute access.
        object.__setattr__(kernel, "shared_experts", shared)
    entry = "forward" if hasattr(kernel, "forward") else "apply"
    setattr(kernel, entry, _multiplying(getattr(kernel, entry), shared))


def _multiplying(run: Callable[..., Any], shared: _SharedExperts | None) -> Callable[..., Any]:
    """Wrap ``run``, which runs a kernel, so that it gets multiplied tokens."""

    def multiplying(*, hidden_states: Any, topk_weights: Any, **more: Any) -> Any:
        tokens, weights = _multiply(hidden_states, topk_weights)
        if shared is not None:
            shared.tokens = hidden_states
        if "shared_experts_input" in more and more["shared_experts_input"] is None:
            more["shared_experts_input"] = hidden_states
        return run(hidden_states=tokens, topk_weights=weights, **more)

    return multiplying
