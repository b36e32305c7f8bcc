"""The slots of routed experts' LoRA layers on a CPU: they hold adapters' own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ... import envs
from ...fitting import budget
from ...kernels.slot_stack import SlotStack
from ...kernels.writable_slots import RANK_AXES, without_memory
from .packing import PACK_COLUMNS, PACK_ROWS, round_up


@contextmanager
def created(wrapper: Any) -> Iterator[None]:
    """Make a `SlotStack` of each stack that vLLM creates inside the block, without its memory.

    Args:
        wrapper: the `FusedMoEWithLoRA`.

    Raises:
        ValueError: VLLM_MOE_LORA_MEMORY has a value that is not allowed.
    """
    budget.limit(str(envs.get("VLLM_MOE_LORA_MEMORY")), 0)  # better now than at the first load
    with without_memory(wrapper):
        yield
    for name, axis in RANK_AXES.items():
        stacks = getattr(wrapper, name, ())
        if any(isinstance(one, torch.Tensor) for one in stacks):
            setattr(wrapper, name, tuple(SlotStack(one.shape, one.dtype, axis) for one in stacks))


def free(manager: Any, slot: int) -> None:
    """Empty a slot whose adapter is not active any more, so that its memory can be freed.

    Args:
        manager: vLLM's `LoRAModelManager`.
        slot: its number.
    """
    for module in manager.modules.values():
        stacks = getattr(module, "w2_lora_a_stacked", None)
        if stacks and isinstance(stacks[0], SlotStack):
            module.reset_lora(slot)


def widened(layers: list[tuple[Any, int]], config: Any) -> int:
    """Return by how many bytes an adapter of max_lora_rank widens the experts of all layers.

    See unquantized.py. Quantised experts, and those up to vLLM 0.27, stay as they are.

    Args:
        layers: the modules that hold the experts, each with the number of its packed modules.
        config: vLLM's.
    """
    total, rank = 0, config.lora_config.max_lora_rank
    for layer, packed in layers:
        if not hasattr(getattr(layer.quant_method, "experts_cls", None), "before_load"):
            continue
        moe = layer.moe_config
        inner, slices = moe.intermediate_size_per_partition, 2 if moe.is_act_and_mul else 1
        columns = round_up(rank * min(packed, slices), PACK_COLUMNS) * slices * inner
        rows = round_up(rank, PACK_ROWS) * inner
        total += moe.num_local_experts * (columns + rows) * config.model_config.dtype.itemsize
    return total
