"""The base's product in Triton's experts, put off until its LoRA is known, which then is its tail.

Upstream multiplies with the experts' weights, then calls Punica, which reads and writes all of the
result once more. With VLLM_MOE_LORA_KERNELS=tail the first call only leaves word here, and what
stands in Punica's place (`segments`) runs both in one kernel. Whoever cannot has to `flush`.
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
class Product:
    """One product that waits.

    Attributes:
        launch: upstream's kernel.
        y: [tokens, top_k, out] or [pairs, out], not written yet.
        x: [tokens, in] or [pairs, in].
        weight: [experts, out, in].
        topk_weights: [tokens, top_k] to multiply by, or None.
        order: pairs by expert.
    """

    launch: Callable[[], None]
    y: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    topk_weights: torch.Tensor | None
    order: Order

    def run(self, top_k: int, lora: Lora | None, slices: int) -> None:
        """Our kernel in place of upstream's.

        Raises:
            TypeError, ValueError: it does not take them; nothing was written.
        """
        from ...kernels.triton.grouped import grouped_product

        y = self.y.view(-1, self.y.shape[-1])
        given = (self.x, self.weight, self.order, top_k, self.topk_weights)
        grouped_product(y, *given, lora, slices)


class _Call:
    def __init__(self) -> None:
        self.product: Product | None = None


_calls: ContextVar[_Call | None] = ContextVar("moe_lora_tail", default=None)


@contextmanager
def applying(put: bool) -> Iterator[None]:
    """One call of experts' `apply`; its products are ``put`` off.

    Raises:
        RuntimeError: a product was put off and nothing asked for it.
    """
    call = _Call() if put else None
    token = _calls.set(call)
    try:
        yield
    finally:
        _calls.reset(token)
    if call is not None and call.product is not None:
        raise RuntimeError(
            "MoE LoRA kernels: vLLM did not add LoRA after a product of its experts that waited "
            "for it. Cure: VLLM_MOE_LORA_KERNELS=ours."
        )


def wanted() -> bool:
    """Whether this is within a call of `apply` whose products are put off."""
    return _calls.get() is not None


def put_off(launch: Callable[[], None], given: dict[str, Any]) -> bool:
    """Whether ``launch``, upstream's product, waits for its LoRA.

    Only where `wanted`.

    Args:
        given: the arguments of `invoke_fused_moe_triton_kernel`, by name.
    """
    flush()
    x, weight, ids = given["A"], given["B"], given["sorted_token_ids"]
    quantised = any(given[name] is not None for name in ("A_scale", "B_scale"))
    if quantised or given["B_bias"] is not None or x.dtype != weight.dtype:
        return False
    from ...kernels.triton.grouped import Order

    block_m = given["config"]["BLOCK_SIZE_M"]
    if ids is not None and x.shape[0] < block_m:  # as upstream: no more blocks than pairs
        ids = ids[: x.shape[0] * given["top_k"] * block_m]
    order = Order(ids, given["expert_ids"], given["num_tokens_post_padded"], block_m)
    weights = given["topk_weights"] if given["mul_routed_weight"] else None
    call = _calls.get()
    assert call is not None
    call.product = Product(launch, given["C"], x, weight, weights, order)
    return True


def waiting(y: torch.Tensor, x: torch.Tensor) -> Product | None:
    """The product that writes ``y`` and reads ``x``; any other is flushed."""
    call = _calls.get()
    product = None if call is None else call.product
    if product is None:
        return None
    same = product.y.data_ptr() == y.data_ptr() and product.y.numel() == y.numel()
    if same and product.x.data_ptr() == x.data_ptr():
        return product
    flush()
    return None


def done() -> None:
    """The product that waited was run."""
    call = _calls.get()
    if call is not None:
        call.product = None


def flush() -> None:
    """Run upstream's kernel for a product that waits, if one does."""
    call = _calls.get()
    if call is not None and call.product is not None:
        product, call.product = call.product, None
        product.launch()
