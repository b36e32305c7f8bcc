"""The kernels that `vllm-moe-lora tune` compares, as calls on one layer and one batch.

A side is all that LoRA adds to one MoE layer: routing, w13 and w2. Where the layer has base
weights, a side also contains the two base GEMMs, because `tail` computes both in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_moe_lora.kernels.paged_stack import Arena
from vllm_moe_lora.kernels.writable_slots import RANK_AXES
from vllm_moe_lora.layers.gpu import moe_kernels
from vllm_moe_lora.records import LayerShape
from vllm_moe_lora.tuning.cases import Batch, Layer

Call = Callable[[], None]
CAPTURE_LIMIT = 512  # tokens; vLLM runs larger batches as prefill, without a CUDA graph


@dataclass
class Outputs:
    """What a side writes: y13 and y2, [tokens, top_k, out] each."""

    y13: torch.Tensor
    y2: torch.Tensor

    @classmethod
    def of(cls, layer: Layer, batch: Batch) -> Outputs:
        """Allocate the outputs of a batch."""
        shape, rows = layer.shape, (batch.tokens, layer.shape.top_k)
        new = {"dtype": batch.x.dtype, "device": batch.x.device}
        return cls(
            torch.zeros(*rows, shape.fused * shape.inner, **new),
            torch.zeros(*rows, shape.hidden, **new),
        )

    def flat(self) -> list[torch.Tensor]:
        """Return [y13, y2] as [pairs, out] each."""
        return [y.view(-1, y.shape[-1]) for y in (self.y13, self.y2)]


def factors_of(layer: Layer) -> moe_kernels.LayerFactors:
    """Return the layer's buffers as our kernels take them.

    Raises:
        TypeError, ValueError: our kernels do not support the buffers; the text says why.
    """
    return moe_kernels.LayerFactors(layer.as_vllm())


def in_pages(layer: Layer) -> moe_kernels.LayerFactors:
    """Return a copy of the layer's factors in pages, as engines have them (layers/gpu/pages.py).

    Raises:
        TypeError, ValueError: our kernels do not support the buffers; the text says why.
    """
    made = layer.as_vllm()
    for name, rank_axis in RANK_AXES.items():
        dense = getattr(made, name)
        first = dense[0]
        stacks = Arena(first.shape, len(dense), rank_axis, first.dtype, first.device).stacks()
        for stack, factors in zip(stacks, dense, strict=True):
            for slot, factor in enumerate(factors):
                stack.write(slot, factor)
        setattr(made, name, stacks)
    return moe_kernels.LayerFactors(made)


def ours(
    layer: Layer,
    factors: moe_kernels.LayerFactors,
    batch: Batch,
    out: Outputs,
    add_inputs: bool = True,
) -> Call:
    """Return a call of our shrink and expand kernels.

    Args:
        layer, batch: what to run on.
        factors: from `factors_of`.
        out: the outputs.
        add_inputs: False to store the LoRA in place of adding it.
    """
    from vllm_moe_lora.kernels.triton import launch, route

    def call() -> None:
        routing = _route(route, layer, factors, batch)
        launch.add_lora(out.y13, batch.x, factors.w13, routing, add_inputs=add_inputs)
        launch.add_lora(out.y2, batch.act, factors.w2, routing, batch.weights, add_inputs)

    return call


def tail(
    layer: Layer, factors: moe_kernels.LayerFactors, batch: Batch, out: Outputs, order: Any
) -> Call:
    """Return a call of our base GEMMs with the LoRA in them.

    Args:
        layer: with base weights.
        factors: from `factors_of`.
        batch: what to run on.
        out: the outputs; all rows are overwritten.
        order: `grouped.Order` of the batch's pairs.
    """
    from vllm_moe_lora.kernels.triton import route
    from vllm_moe_lora.kernels.triton.grouped import Lora, grouped_product

    top_k, (y13, y2) = layer.shape.top_k, out.flat()

    def call() -> None:
        assert isinstance(layer.w13, torch.Tensor)
        assert isinstance(layer.w2, torch.Tensor)
        routing = _route(route, layer, factors, batch)
        on13, on2 = (Lora(one, routing, batch.slots) for one in (factors.w13, factors.w2))
        grouped_product(y13, batch.x, layer.w13, order, top_k, None, on13, factors.w13.slices)
        grouped_product(y2, batch.act, layer.w2, order, top_k, batch.weights, on2, 1)

    return call


def _route(route: Any, layer: Layer, factors: moe_kernels.LayerFactors, batch: Batch) -> Any:
    sizes = factors.w13.num_slots, factors.w13.num_experts
    more = {"expert_map": layer.expert_map, "active": factors.active}
    return route.route(batch.ids, batch.slots, *sizes, factors.w13.dtype, **more)


def punica_of(shape: LayerShape, batch: Batch) -> Any:
    """Return vLLM's `PunicaWrapperGPU` with the metadata of a batch."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    tokens = batch.tokens
    config = LoRAConfig(max_loras=shape.slots, max_lora_rank=shape.rank)
    wrapper: Any = PunicaWrapperGPU(tokens, tokens, batch.x.device, lora_config=config)
    names = [slot + 1 for slot in batch.slots.tolist()]  # 0 is a token without an adapter
    mapping = LoRAMapping(tuple(names), tuple(names), is_prefill=tokens > CAPTURE_LIMIT)
    wrapper.update_metadata(mapping, list(range(1, shape.slots + 1)), shape.slots, 1024)
    return wrapper


def upstream(layer: Layer, batch: Batch, out: Outputs) -> Call:
    """Return vLLM's own two calls, as its experts make them. Needs a GPU and its vLLM."""
    shape, tokens = layer.shape, batch.tokens
    wrapper = punica_of(shape, batch)
    a13, b2 = (  # shared factors as vLLM's experts pass them
        tuple(one.expand(-1, shape.experts, -1, -1) for one in stack)
        for stack in (layer.a13, layer.b2)
    )
    # vLLM only asks these for their shapes, to find its tuned configuration.
    w1, w2 = (
        torch.empty(size, dtype=batch.x.dtype, device="meta")
        for size in (
            (shape.experts, shape.fused * shape.inner, shape.hidden),
            (shape.experts, shape.hidden, shape.inner),
        )
    )
    same: dict[str, Any] = {
        "w1": w1, "w2": w2, "num_tokens": tokens, "top_k_num": shape.top_k, "top_k": shape.top_k,
        "max_loras": shape.slots, "adapter_enabled": layer.enabled, "fully_sharded": False,
        "use_tuned_config": False, "topk_weights": batch.weights,
    }  # fmt: skip

    def call() -> None:
        sorted_ids, expert_ids, padded, mapped = wrapper.add_lora_w13(
            y=out.y13, x=batch.x, lora_a_stacked=a13, lora_b_stacked=layer.b13,
            topk_ids=batch.ids, expert_map=layer.expert_map, local_num_experts=shape.experts,
            num_slices=shape.slices, **same,
        )  # fmt: skip
        wrapper.add_lora_w2(
            y=out.y2, x=batch.act, lora_a_stacked=layer.a2, lora_b_stacked=b2,
            sorted_token_ids_lora=sorted_ids, expert_ids_lora=expert_ids,
            num_tokens_post_padded_lora=padded, token_lora_mapping=mapped, tp_rank=0, **same,
        )  # fmt: skip

    return call


def vllm_base(layer: Layer, batch: Batch, out: Outputs) -> tuple[Call, Any]:
    """Return vLLM's own base GEMMs, and the order of pairs that it made for them.

    Needs a GPU and its vLLM.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        _prepare_expert_assignment,
        invoke_fused_moe_triton_kernel,
        try_get_optimal_moe_config,
    )
    from vllm.triton_utils import tl

    from vllm_moe_lora.kernels.triton.grouped import Order

    shape, tokens = layer.shape, batch.tokens
    assert isinstance(layer.w13, torch.Tensor)
    assert isinstance(layer.w2, torch.Tensor)
    tiles = try_get_optimal_moe_config(layer.w13.shape, layer.w2.shape, shape.top_k, None, tokens)
    # vLLM does not sort few pairs.
    sizes = tokens, shape.top_k, shape.total
    made = _prepare_expert_assignment(batch.ids, tiles, *sizes, layer.expert_map)
    kind = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}[shape.dtype]

    def product(x: Any, weight: Any, y: Any, weighted: bool, per_row: int) -> None:
        invoke_fused_moe_triton_kernel(
            x, weight, y, None, None, batch.weights if weighted else None, *made, weighted,
            per_row, tiles, compute_type=kind, use_fp8_w8a8=False, use_int8_w8a8=False,
            use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,
        )  # fmt: skip

    def call() -> None:
        product(batch.x, layer.w13, out.y13, False, shape.top_k)
        product(batch.act, layer.w2, out.y2, True, 1)

    ids, experts, padded = made
    return call, Order(ids, experts, padded, tiles["BLOCK_SIZE_M"])


def plain_order(layer: Layer, batch: Batch, block_m: int = 16) -> Any:
    """Return the order of pairs as vLLM makes it, computed in Python: for the interpreter."""
    from vllm_moe_lora.kernels.triton.grouped import Order

    flat, ids, blocks = layer.here(batch.ids).flatten().tolist(), [], []
    for expert in range(-1, layer.shape.experts):
        own = [pair for pair, one in enumerate(flat) if one == expert]
        ids += own + [len(flat)] * (-len(own) % block_m)
        blocks += [expert] * -(-len(own) // block_m)
    new = {"dtype": torch.int32, "device": batch.x.device}
    first, second, third = (torch.tensor(one, **new) for one in (ids, blocks, [len(ids)]))
    return Order(first, second, third, block_m)


def after(first: Call, second: Call) -> Call:
    """Return a call of both."""

    def call() -> None:
        first()
        second()

    return call
