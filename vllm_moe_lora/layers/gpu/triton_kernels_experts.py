"""LoRA on experts that run the package `triton_kernels` (gpt-oss' MXFP4): the order of their rows.

The package sorts the token-expert pairs by expert. vLLM's LoRA kernels expect them in token order:
row token * top_k + i for the i-th expert of a token. `UnfusedOAITritonExperts` gets this wrong in
some releases, so that a token gets the LoRA of another one:

- in vLLM 0.12 and 0.13 (`install`);
- in 0.31 and later, with version 3.8 of the package (`applying`, `add_w13`, `add_w2`).

And in 0.21 to 0.24, with LoRA and expert parallelism, it sums rows of experts on other devices,
which the package leaves uninitialised (`expert_parallel`, `clear_remote`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class _Call:
    """One call of the experts' `apply`.

    Attributes:
        order: [tokens * top_k] int64, the pair (in token order) of each row; None before it is
            known.
    """

    def __init__(self) -> None:
        self.order: torch.Tensor | None = None


# Two threads may run two halves of a batch through one layer (--enable-dbo).
_calls: ContextVar[_Call | None] = ContextVar("moe_lora_sorted_rows", default=None)


@contextmanager
def applying(apply: Callable[..., Any]) -> Iterator[None]:
    """Run one call of `UnfusedOAITritonExperts.apply` inside the block (vLLM 0.31 and later).

    Args:
        apply: upstream's function. Its module says which version of the package is installed;
            only with 3.8 do `add_w13` and `add_w2` change anything.
    """
    generation = apply.__globals__["triton_kernels_version"]
    token = _calls.set(_Call() if generation == "3.8" else None)
    try:
        yield
    finally:
        _calls.reset(token)


def add_w13(add: Callable[[torch.Tensor], Any], y: torch.Tensor, more: dict[str, Any]) -> Any:
    """Add the LoRA of gate and up to rows that are sorted by expert.

    Args:
        add: `LoRAExpertsMixin.apply_w13_lora` without its other arguments; it adds LoRA to rows in
            token order.
        y: [tokens * top_k, out], the output of w13; changed in place.
        more: the other arguments. ``topk_ids`` [tokens, top_k] are ids of the whole model, and
            ``expert_map`` maps them to local ones.

    Returns:
        What ``add`` returned.
    """
    call = _calls.get()
    if call is None:
        return add(y)
    ids, experts = more["topk_ids"].flatten().long(), more["expert_map"]
    if experts is not None:
        ids = torch.where(ids < 0, -1, experts[ids.clamp(min=0)])
    # Upstream's make_routing_data sorts like this. Pairs of experts on other devices (-1) come with
    # those of expert 0.
    call.order = ids.clamp(min=0).argsort(stable=True)
    in_token_order = torch.empty_like(y)
    in_token_order[call.order] = y
    result = add(in_token_order)
    torch.index_select(in_token_order, 0, call.order, out=y)
    return result


def add_w2(add: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """Add the LoRA of down, from an activation that is sorted by expert.

    Upstream brings the output ``y`` into token order, but not the input.

    Args:
        add: `LoRAExpertsMixin.apply_w2_lora` without its other arguments.
        x: [tokens * top_k, intermediate], the activation.

    Returns:
        What ``add`` returned.
    """
    call = _calls.get()
    if call is None or call.order is None:
        return add(x)
    in_token_order = torch.empty_like(x)
    in_token_order[call.order] = x
    return add(in_token_order)


# [tokens, top_k] bool, whether the pair's expert is on another device; None if there are none.
_remote: ContextVar[torch.Tensor | None] = ContextVar("moe_lora_remote", default=None)


@contextmanager
def expert_parallel(
    experts: Any, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> Iterator[None]:
    """Run one call of `UnfusedOAITritonExperts.apply` inside the block (vLLM 0.21 to 0.24).

    Args:
        experts: upstream's experts.
        topk_ids: [tokens, top_k], ids of the whole model.
        expert_map: [experts of the model] int32, -1 for an expert on another device. None without
            expert parallelism.
    """
    mask = None
    if expert_map is not None and experts._lora_context is not None:
        mask = expert_map[topk_ids] < 0
    token = _remote.set(mask)
    try:
        yield
    finally:
        _remote.reset(token)


def clear_remote(rows: torch.Tensor) -> torch.Tensor:
    """Set the rows of experts on other devices to zero, in place, before upstream sums the rows.

    Args:
        rows: [tokens, top_k, hidden], the output of w2.

    Returns:
        ``rows``.
    """
    mask = _remote.get()
    return rows if mask is None else rows.masked_fill_(mask[..., None], 0)


def install(layer: Any) -> None:
    """Make the experts of a layer that LoRA wraps use token order (vLLM 0.12 and 0.13).

    There the LoRA layer wraps a function around the experts' activation, which adds the LoRA of w13
    to the activation's input and keeps its output for the LoRA of w2. Here another function around
    that one passes it the input in token order, and sorts the output by expert again.

    Args:
        layer: the module that LoRA wraps; its experts are changed.
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
        gather, in_token_order = gathers.get(), torch.empty_like(output)
        activate(kind, in_token_order, rows[gather.dst_indx])
        output.copy_(in_token_order[gather.src_indx])

    experts._make_routing_data, experts.activation = _make_routing_data, activation
