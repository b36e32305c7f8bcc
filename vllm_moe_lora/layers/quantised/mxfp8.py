"""LoRA in the native MXFP8 experts of ROCm (`Mxfp8NativeTritonExperts`, 0.24 to 0.33).

Their `apply` is one function with two grouped products in it, and an activation between them that
quantises at once. The products are where factors are added: to the first one's output, and to the
second one's, which is weighted, from an activation computed again as it was before it was
quantised. Base tokens keep their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .lora_context import PLACES, of_batch


@dataclass
class _Call:
    """One call of `apply`: its experts, what `apply_w13_lora` wants, and what was found so far."""

    experts: Any
    x: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    common: dict[str, Any]
    gate_up: torch.Tensor | None = None
    found: dict[str, Any] = field(default_factory=dict)


_calls: ContextVar[_Call | None] = ContextVar("moe_lora_mxfp8", default=None)


@contextmanager
def lora(
    experts: Any,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> Iterator[None]:
    """While this lasts, `product` adds the factors of the context that ``experts`` have.

    Args:
        hidden_states: [tokens, hidden], not quantised.
        topk_weights, topk_ids: [tokens, top_k].
    """
    call = None
    if experts._lora_context is not None:
        common = of_batch(w1, w2, topk_weights)
        call = _Call(experts, hidden_states, topk_ids, expert_map, common)
    token = _calls.set(call)
    try:
        yield
    finally:
        _calls.reset(token)


def product(output: torch.Tensor) -> torch.Tensor:
    """What a grouped product gave, with the factors of the call that it is part of.

    Args:
        output: [tokens * top_k, 2 * inner] the first time in a call; then [tokens * top_k, hidden]
            fp32, times the router's weights. Changed in place.
    """
    call = _calls.get()
    if call is None:
        return output
    experts, context = call.experts, call.experts._lora_context
    y = output.view(*call.topk_ids.shape, -1)
    if call.gate_up is None:
        where = {"topk_ids": call.topk_ids, "expert_map": call.expert_map}
        found = experts.apply_w13_lora(context, y=y, x=call.x, **where, **call.common)
        call.found = dict(zip(PLACES, found, strict=True))
        call.gate_up = output
        return output
    # In the activations' dtype: the operators add to what they read from.
    delta = torch.zeros_like(y, dtype=call.x.dtype)
    x = swiglu_oai(call.gate_up, *_constants(experts))
    experts.apply_w2_lora(context, y=delta, x=x, **call.found, **call.common)
    y += delta
    return output


def swiglu_oai(
    gate_up: torch.Tensor, alpha: float, beta: float, limit: float | None
) -> torch.Tensor:
    """gate * sigmoid(alpha * gate) * (up + beta), gate first: [rows, 2 * inner] -> [rows, inner].

    As vllm/models/minimax_m3/amd/ops/swiglu_oai.py (0.33), which quantises what it returns.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + beta)).to(gate_up.dtype)


def _constants(experts: Any) -> tuple[float, float, float | None]:
    """alpha, beta and limit of the activation; from 0.28 on experts have them together."""
    config = getattr(experts, "activation_config", None)
    if config is not None:
        return config.alpha, config.beta, config.clamp_limit
    given = experts.quant_config
    alpha, beta, limit = given.gemm1_alpha, given.gemm1_beta, given.gemm1_clamp_limit
    return 1.702 if alpha is None else alpha, 1.0 if beta is None else beta, limit
