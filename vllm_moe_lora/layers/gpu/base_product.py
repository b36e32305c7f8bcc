"""Defers the GEMMs of the base experts, so that one kernel computes a GEMM together with its LoRA.

For unquantised experts in Triton, with VLLM_MOE_LORA_KERNELS=tail (vLLM 0.28 to 0.33). Upstream
launches the kernel of the base GEMM, and then adds the LoRA, which reads and writes the whole
output once more. Here the call of upstream's kernel is only recorded (`defer`). When upstream asks
for the LoRA of that output, moe_kernels.py fetches the record (`deferred_for`) and launches one
kernel for both.

Code that needs the output of the base GEMM, or cannot add LoRA in this way, must call `flush`. It
launches upstream's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ...kernels.triton.grouped import Lora, Order


@dataclass
class DeferredProduct:
    """One deferred GEMM of the base experts.

    Attributes:
        launch: launches upstream's kernel.
        y: [tokens, top_k, out] or [tokens * top_k, out], the output; not written yet.
        x: [tokens, in] or [tokens * top_k, in].
        weight: [experts, out, in].
        topk_weights: [tokens, top_k] to multiply the output with; None for w13.
        order: the token-expert pairs, sorted by expert.
    """

    launch: Callable[[], None]
    y: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    topk_weights: torch.Tensor | None
    order: Order

    def run(self, top_k: int, lora: Lora | None, slices: int) -> None:
        """Compute the GEMM and its LoRA with our kernel.

        Args:
            top_k: experts per token.
            lora: what to add; None for the base GEMM alone.
            slices: 2 if gate and up have LoRA factors of their own, else 1.

        Raises:
            TypeError, ValueError: the kernel does not support the tensors. Nothing was written.
        """
        from ...kernels.triton.grouped import grouped_product

        y = self.y.view(-1, self.y.shape[-1])
        given = (self.x, self.weight, self.order, top_k, self.topk_weights)
        grouped_product(y, *given, lora, slices)


class _Call:
    """One call of the experts' `apply`; it has at most one deferred GEMM at a time."""

    def __init__(self) -> None:
        self.product: DeferredProduct | None = None


_calls: ContextVar[_Call | None] = ContextVar("moe_lora_tail", default=None)


@contextmanager
def deferring(enabled: bool) -> Iterator[None]:
    """Defer GEMMs inside the block, which is one call of the experts' `apply`.

    Args:
        enabled: False to defer none.

    Raises:
        RuntimeError: at the end a GEMM is still deferred, so its output was never computed.
    """
    call = _Call() if enabled else None
    token = _calls.set(call)
    try:
        yield
    finally:
        _calls.reset(token)
    if call is not None and call.product is not None:
        raise RuntimeError(
            "MoE LoRA kernels: a GEMM of the experts was deferred until its LoRA is added, but "
            "vLLM did not add any. Cure: VLLM_MOE_LORA_KERNELS=ours."
        )


def is_deferring() -> bool:
    """Return whether this is inside a block of `deferring` that is enabled."""
    return _calls.get() is not None


def defer(launch: Callable[[], None], given: dict[str, Any]) -> bool:
    """Record a call of upstream's GEMM kernel instead of launching it. Needs `is_deferring`.

    A GEMM that is deferred already is launched first.

    Args:
        launch: launches upstream's kernel.
        given: the arguments of `invoke_fused_moe_triton_kernel`, by name.

    Returns:
        False if our kernel cannot compute this GEMM: the weights are quantised or have a bias. The
        caller must then launch upstream's kernel.
    """
    flush()
    x, weight, ids = given["A"], given["B"], given["sorted_token_ids"]
    quantised = any(given[name] is not None for name in ("A_scale", "B_scale"))
    if quantised or given["B_bias"] is not None or x.dtype != weight.dtype:
        return False
    from ...kernels.triton.grouped import Order

    block_m = given["config"]["BLOCK_SIZE_M"]
    if ids is not None and x.shape[0] < block_m:
        # Upstream launches no more blocks than there are pairs, too.
        ids = ids[: x.shape[0] * given["top_k"] * block_m]
    order = Order(ids, given["expert_ids"], given["num_tokens_post_padded"], block_m)
    weights = given["topk_weights"].contiguous() if given["mul_routed_weight"] else None
    call = _calls.get()
    assert call is not None
    call.product = DeferredProduct(launch, given["C"], x, weight, weights, order)
    return True


def deferred_for(y: torch.Tensor, x: torch.Tensor) -> DeferredProduct | None:
    """Return the deferred GEMM that reads ``x`` and writes ``y``.

    It stays deferred until `mark_done` or `flush` is called. If the deferred GEMM has other
    tensors, it is launched, and None is returned.
    """
    call = _calls.get()
    product = None if call is None else call.product
    if product is None:
        return None
    same = product.y.data_ptr() == y.data_ptr() and product.y.numel() == y.numel()
    if same and product.x.data_ptr() == x.data_ptr():
        return product
    flush()
    return None


def mark_done() -> None:
    """Forget the deferred GEMM, after our kernel has computed it."""
    call = _calls.get()
    if call is not None:
        call.product = None


def flush() -> None:
    """Launch upstream's kernel for the deferred GEMM, if there is one."""
    call = _calls.get()
    if call is not None and call.product is not None:
        product, call.product = call.product, None
        product.launch()
