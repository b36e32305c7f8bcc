"""Experts of the package `triton_kernels` (gpt-oss' MXFP4), whose rows lie by expert.

LoRA is added to rows in the order of their (token, place among the token's experts) pairs. In 0.12
and 0.13, and from 0.31 on with the package's `matmul` (its 3.8), upstream hands it the rows as the
package leaves them: those of the first expert, then those of the second. Every adapter's change
then lands on other tokens. And from 0.21 to 0.24 it sums rows that the package never wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class _Call:
    """One call of experts' `apply`; ``pairs``: [rows], the pair of each row, once it is known."""

    def __init__(self) -> None:
        self.pairs: torch.Tensor | None = None


# Two threads run two halves of a batch through one layer (--enable-dbo).
_calls: ContextVar[_Call | None] = ContextVar("moe_lora_by_expert", default=None)


@contextmanager
def applying(apply: Callable[..., Any]) -> Iterator[None]:
    """One call of ``apply``, upstream's `UnfusedOAITritonExperts.apply` (0.31 on)."""
    generation = apply.__globals__["triton_kernels_version"]
    token = _calls.set(_Call() if generation == "3.8" else None)
    try:
        yield
    finally:
        _calls.reset(token)


def add_w13(add: Callable[[torch.Tensor], Any], y: torch.Tensor, more: dict[str, Any]) -> Any:
    """What ``add`` returns, which adds gate's and up's change to rows in the order of pairs.

    Args:
        add: the rest of `LoRAExpertsMixin.apply_w13_lora`.
        y: [tokens * top_k, out], changed in place.
        more: arguments of that method; ``topk_ids`` [tokens, top_k] are the model's experts.
    """
    call = _calls.get()
    if call is None:
        return add(y)
    ids, experts = more["topk_ids"].flatten().long(), more["expert_map"]
    if experts is not None:
        ids = torch.where(ids < 0, -1, experts[ids.clamp(min=0)])
    # As `make_routing_data` does: pairs of other ranks are put to the first expert's.
    call.pairs = ids.clamp(min=0).argsort(stable=True)
    in_order = torch.empty_like(y)
    in_order[call.pairs] = y
    result = add(in_order)
    torch.index_select(in_order, 0, call.pairs, out=y)
    return result


def add_w2(add: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """The same for down's change, whose ``y`` upstream has put in order, but not its input.

    Args:
        x: [tokens * top_k, inner].
    """
    call = _calls.get()
    if call is None or call.pairs is None:
        return add(x)
    in_order = torch.empty_like(x)
    in_order[call.pairs] = x
    return add(in_order)


# [tokens, top_k] bool: whose experts are another rank's.
_elsewhere: ContextVar[torch.Tensor | None] = ContextVar("moe_lora_elsewhere", default=None)


@contextmanager
def on_rank(
    experts: Any, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> Iterator[None]:
    """One call of `UnfusedOAITritonExperts.apply` of ``experts`` with LoRA (0.21 to 0.24).

    Args:
        topk_ids: [tokens, top_k] of the model's experts.
        expert_map: [experts of the model], -1 for another rank's; None without ranks.
    """
    mask = None
    if expert_map is not None and experts._lora_context is not None:
        mask = expert_map[topk_ids] < 0
    token = _elsewhere.set(mask)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def cleared(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [tokens, top_k, hidden], zero where the product of another rank's expert would be.

    The package leaves them as they were, and upstream sums them.
    """
    mask = _elsewhere.get()
    return rows if mask is None else rows.masked_fill_(mask[..., None], 0)


def install(layer: Any) -> None:
    """Have a wrapped ``layer``'s experts activate rows in the order of pairs (0.12 and 0.13).

    There LoRA is added by closures around the activation and the sum, which keep the activation's
    result for the second.
    """
    experts = layer.quant_method.fused_experts.fused_experts
    if type(experts).__name__ != "UnfusedOAITritonExperts":
        return
    gathers: ContextVar[Any] = ContextVar("moe_lora_gather")
    route, activate = experts._make_routing_data, experts.activation

    def _make_routing_data(*args: Any) -> Any:
        routing, gather, scatter = route(*args)
        gathers.set(gather)
        return routing, gather, scatter

    def activation(kind: Any, output: torch.Tensor, rows: torch.Tensor) -> None:
        gather, in_order = gathers.get(), torch.empty_like(output)
        activate(kind, in_order, rows[gather.dst_indx])
        output.copy_(in_order[gather.src_indx])

    experts._make_routing_data, experts.activation = _make_routing_data, activation
