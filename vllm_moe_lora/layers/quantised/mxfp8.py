"""Adds LoRA to the native MXFP8 experts of ROCm, `Mxfp8NativeTritonExperts`, in vLLM 0.24 to 0.33.

The class inherits ``supports_lora() == True``, but its `apply` does not add LoRA. `apply` calls
`_grouped_gemm_mxfp8` twice, for w13 and for w2. Between them a fused kernel computes the activation
and quantises it to MXFP8.

The hooks in hooks/fused_moe_mxfp8_native.py call `add_lora` on the result of both GEMMs. The LoRA
of w2 needs the activation before it was quantised, so it is computed a second time here. Tokens
without an adapter keep the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .lora_context import ROUTING_ARGUMENTS, common_arguments


@dataclass
class _Call:
    """One call of `apply`.

    Attributes:
        experts: the `Mxfp8NativeTritonExperts`.
        x, topk_ids, expert_map: arguments of `apply_w13_lora`.
        common: the arguments that `apply_w13_lora` and `apply_w2_lora` have in common.
        gate_up: [tokens * top_k, 2 * intermediate], the output of w13 with LoRA; None before it.
        found: arguments of `apply_w2_lora` that `apply_w13_lora` returned.
    """

    experts: Any
    x: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    common: dict[str, Any]
    gate_up: torch.Tensor | None = None
    found: dict[str, Any] = field(default_factory=dict)


_calls: ContextVar[_Call | None] = ContextVar("moe_lora_mxfp8", default=None)


@contextmanager
def adding_lora(
    experts: Any,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> Iterator[None]:
    """Inside the block, which is one call of `apply`, `add_lora` adds the LoRA of ``experts``.

    Args:
        experts: the `Mxfp8NativeTritonExperts`.
        hidden_states: [tokens, hidden], not quantised.
        w1, w2: the experts' weights.
        topk_weights, topk_ids: [tokens, top_k]; the ids are those of the whole model.
        expert_map: [experts of the model] int32, the local expert, or -1 for one on another device.
            None if all experts are local.
    """
    call = None
    if experts._lora_context is not None:
        common = common_arguments(w1, w2, topk_weights)
        call = _Call(experts, hidden_states, topk_ids, expert_map, common)
    token = _calls.set(call)
    try:
        yield
    finally:
        _calls.reset(token)


def add_lora(output: torch.Tensor) -> torch.Tensor:
    """Add LoRA to the result of one grouped GEMM.

    Args:
        output: changed in place. The first time in a call of `apply`: [tokens * top_k,
            2 * intermediate], the output of w13. The second time: [tokens * top_k, hidden] float32,
            the output of w2, multiplied with the router weights.

    Returns:
        ``output``.
    """
    call = _calls.get()
    if call is None:
        return output
    experts, context = call.experts, call.experts._lora_context
    y = output.view(*call.topk_ids.shape, -1)
    if call.gate_up is None:
        where = {"topk_ids": call.topk_ids, "expert_map": call.expert_map}
        found = experts.apply_w13_lora(context, y=y, x=call.x, **where, **call.common)
        call.found = dict(zip(ROUTING_ARGUMENTS, found, strict=True))
        call.gate_up = output
        return output
    # The LoRA kernels read the factors in the dtype of the tensor that they add to. So they cannot
    # add to the float32 output directly.
    delta = torch.zeros_like(y, dtype=call.x.dtype)
    x = swiglu_oai(call.gate_up, *_constants(experts))
    experts.apply_w2_lora(context, y=delta, x=x, **call.found, **call.common)
    y += delta
    return output


def swiglu_oai(
    gate_up: torch.Tensor, alpha: float, beta: float, limit: float | None
) -> torch.Tensor:
    """Compute gate * sigmoid(alpha * gate) * (up + beta).

    The formula is that of vllm/models/minimax_m3/amd/ops/swiglu_oai.py (0.33), which also quantises
    the result.

    Args:
        gate_up: [rows, 2 * intermediate], first all of gate, then all of up.
        alpha, beta: see the formula.
        limit: gate is clamped to at most this, and up to [-limit, limit]. None for no limit.

    Returns:
        [rows, intermediate] in the dtype of ``gate_up``; computed in float32.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + beta)).to(gate_up.dtype)


def _constants(experts: Any) -> tuple[float, float, float | None]:
    """Return alpha, beta and limit of the activation, for `swiglu_oai`."""
    config = getattr(experts, "activation_config", None)
    if config is not None:  # 0.28 and later
        return config.alpha, config.beta, config.clamp_limit
    given = experts.quant_config
    alpha, beta, limit = given.gemm1_alpha, given.gemm1_beta, given.gemm1_clamp_limit
    return 1.702 if alpha is None else alpha, 1.0 if beta is None else beta, limit
