"""Puts routed experts' factors into pages, where our Triton kernels serve all batches of a layer.

Upstream allocates a slot for max_lora_rank, whether an adapter is there or not. On a GPU the memory
for adapters has to be there from the start, because the KV cache takes what is left. So each layer
gets a fixed number of pages (kernels/paged_stack.py), and an adapter takes those of its own rank
while it is in a slot.

All layers have pages for the same number of ranks, for all of their experts. This unit, 8 ranks in
all layers, is called a block here. VLLM_MOE_LORA_MEMORY limits the blocks. An adapter is refused if
it does not fit beside the largest adapters that may run with it, so each batch that the scheduler
makes finds pages (fitting/budget.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ... import envs, records
from ...fitting import budget
from ...fitting.moe_layers import is_experts, layers_of
from ...kernels.paged_stack import PAGE_RANKS, Arena, PagedStack, pages_for
from ...kernels.writable_slots import RANK_AXES
from ...log import get_logger
from . import moe_kernels

logger = get_logger(__name__)
_blocks: ContextVar[int | None] = ContextVar("moe_lora_blocks", default=None)


@contextmanager
def blocks_each(number: int) -> Iterator[None]:
    """Give ``number`` blocks to each LoRA layer that is created inside the block of ``with``."""
    token = _blocks.set(number)
    try:
        yield
    finally:
        _blocks.reset(token)


def possible(config: Any) -> bool:
    """Return whether our kernels may serve routed experts. All ranks get the same answer.

    Args:
        config: the `VllmConfig`; None, or without a model, in some of vLLM's own tests.
    """
    is_moe = getattr(getattr(config, "model_config", None), "is_moe", False)
    return bool(is_moe) and envs.get("VLLM_MOE_LORA_KERNELS") != "upstream"


def created(model: Any, lora: Any, create: Callable[[], Any]) -> Any:
    """Create vLLM's `LoRAModelManager`, with pages in the layers that our kernels serve.

    All ranks of the engine get the same number of blocks, so that all of them admit the same
    adapters. So all ranks must call this.

    Args:
        model: it has no LoRA layers yet.
        lora: the `LoRAConfig`.
        create: makes the manager, whose LoRA layers then get pages.

    Raises:
        ValueError: VLLM_MOE_LORA_MEMORY has a value that is not allowed, or allows no block.
        torch.OutOfMemoryError: the device has too little memory.
    """
    from vllm.platforms import current_platform

    value = str(envs.get("VLLM_MOE_LORA_MEMORY"))
    allowed = budget.limit(value, current_platform.get_device_total_memory())
    separate = lora.enable_mixed_moe_lora_format or lora.enable_moe_shared_loras
    fused = model.is_3d_moe_weight and not separate
    layers = [layer.moe_config for layer in layers_of(model).values()]
    each = sum(block_bytes(moe, lora, fused) for moe in layers if moe.is_lora_enabled)
    dense = lora.max_loras * pages_for(lora.max_lora_rank)
    blocks, ours = _agreed(min(dense, allowed // each if each else dense))
    if not ours:
        return create()
    if blocks < 1:
        raise ValueError(
            f"VLLM_MOE_LORA_MEMORY={value} allows {budget.mib(allowed)} MiB for LoRA on routed "
            f"experts, but {PAGE_RANKS} ranks of one adapter take {budget.mib(each)} MiB. Raise "
            "it, or set VLLM_MOE_LORA_KERNELS=upstream."
        )
    try:
        with blocks_each(blocks):
            manager = create()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{error} LoRA on routed experts takes pages of {budget.mib(blocks * each)} MiB here: "
            f"VLLM_MOE_LORA_MEMORY={value}. Lower it."
        ) from error
    if not any(map(in_pages, manager.modules.values())):
        return manager
    manager.moe_lora_budget = budget.PageBudget(blocks, each, lora.max_loras, value)
    logger.info(
        "MoE LoRA: pages of %s MiB for LoRA on routed experts (dense slots would take %s). "
        "Adapters that run together may have %d ranks in all; VLLM_MOE_LORA_MEMORY=%s.",
        budget.mib(blocks * each),
        budget.mib(dense * each),
        blocks * PAGE_RANKS,
        value,
    )
    return manager


def _agreed(blocks: int) -> tuple[int, bool]:
    """Return the smallest number of blocks of all ranks, and whether our kernels may serve some.

    With VLLM_MOE_LORA_KERNELS=auto they may where there is a record of `tune`, which not all
    machines need have. All ranks of the engine must call this.
    """
    ours = envs.get("VLLM_MOE_LORA_KERNELS") != "auto" or any(records.files())
    if not torch.distributed.is_initialized():
        return blocks, ours
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return blocks, ours
    found = torch.tensor([blocks, -int(ours)])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(found[0]), bool(found[1])


def block_bytes(moe: Any, lora: Any, fused: bool) -> int:
    """Return the bytes that 8 ranks of one adapter take in one layer.

    Args:
        moe: the layer's `FusedMoEConfig`.
        lora: vLLM's `LoRAConfig`.
        fused: gate and up share one lora_a (`FusedMoE3DWithLoRA`).
    """
    experts, hidden = moe.num_local_experts, moe.hidden_dim
    inner, gated = moe.intermediate_size_per_partition, bool(moe.is_act_and_mul)
    shared = bool(getattr(lora, "enable_moe_shared_loras", False))
    outer = (2 + (gated and not fused)) * hidden * (1 if shared else experts)  # w13 a, w2 b
    return PAGE_RANKS * lora.lora_dtype.itemsize * (outer + (2 + gated) * inner * experts)


def planned() -> bool:
    """Return whether LoRA layers that are created now may get pages; `allocate` decides."""
    return _blocks.get() is not None


def allocate(wrapper: Any) -> None:
    """Replace the stacks of a layer, which upstream created without memory.

    They become `PagedStack`s if our kernels serve all batches, and else tensors as upstream's.

    Args:
        wrapper: vLLM's `FusedMoEWithLoRA`.
    """
    blocks = _blocks.get()
    meta = {name: getattr(wrapper, name) for name in RANK_AXES}
    if blocks is not None and moe_kernels.serves_all_batches(wrapper):
        for name, stacks in meta.items():
            first, count = stacks[0], len(stacks)
            pages = blocks * count * first.shape[1]
            arena = Arena(first.shape, count, RANK_AXES[name], first.dtype, wrapper.device, pages)
            setattr(wrapper, name, arena.stacks())
        if moe_kernels.register(wrapper):
            return
    for name, stacks in meta.items():
        dense = (torch.zeros(s.shape, dtype=s.dtype, device=wrapper.device) for s in stacks)
        setattr(wrapper, name, tuple(dense))


def in_pages(module: Any) -> bool:
    """Return whether a module is the LoRA layer of experts whose factors are in pages."""
    return is_experts(module) and isinstance(module.w2_lora_a_stacked[0], PagedStack)


def free_unused(manager: Any) -> None:
    """Give the pages of slots without an adapter back.

    Args:
        manager: vLLM's `LoRAModelManager`.
    """
    used = {slot for slot, lora_id in enumerate(manager.lora_index_to_id) if lora_id is not None}
    for module in filter(in_pages, manager.modules.values()):
        # A projection without LoRA has no pages.
        taken = set().union(*(one.taken for n in RANK_AXES for one in getattr(module, n)))
        for slot in taken - used:
            module.reset_lora(slot)
