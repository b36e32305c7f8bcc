"""LoRA on routed experts on GPUs for tokens of other data-parallel ranks (vLLM 0.30 to 0.33).

Upstream sends the slots of tokens with them, but then looks only for those slots that its own batch
has: with an adapter that only the other rank uses, no kernel is launched for it. And a batch
without adapters runs a CUDA graph without LoRA, and says that its tokens have the slots of an
earlier batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..data_parallel import has_adapters


class AllSlots:
    """Stands in for upstream's `LoRAKernelMeta`, and says that a batch has tokens of every slot.

    Args:
        own: the `LoRAKernelMeta` of the rank's own batch.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        here = own.active_lora_ids
        slots = here.numel() - 1
        # The last one stands for tokens without an adapter; kernels do nothing for it.
        self._ids = torch.arange(slots + 1, dtype=here.dtype, device=here.device)
        self._ids[slots] = -1
        self._no_lora = torch.tensor([False])
        self._count = torch.tensor([slots + 1], dtype=torch.int32)

    def meta_args(self, token_nums: int, *args: Any) -> tuple[torch.Tensor, ...]:
        """What `LoRAKernelMeta.meta_args` returns, of which MoE kernels use the slots."""
        own = self._own.meta_args(token_nums, *args)
        return (*own[:4], self._ids, self._no_lora, self._count)


@contextmanager
def all_slots(punica: Any) -> Iterator[None]:
    """Have a `PunicaWrapperGPU` look for tokens of all slots inside the block, in a group."""
    own = punica.token_mapping_meta
    if not getattr(punica, "moe_lora_group", False):
        yield
        return
    if not hasattr(own, "moe_lora_all_slots"):
        # Kept, because CUDA graphs keep the addresses of its tensors.
        own.moe_lora_all_slots = AllSlots(own)
    punica.token_mapping_meta = own.moe_lora_all_slots
    try:
        yield
    finally:
        punica.token_mapping_meta = own


def clear_others(meta: Any, tokens: int) -> None:
    """Say that tokens beyond a new batch have no adapter; all of them if the batch has none.

    Args:
        meta: a `LoRAKernelMeta`.
        tokens: of the batch.
    """
    first = 0 if bool(meta.no_lora_flag_cpu.item()) else tokens
    meta.token_lora_mapping[first:].fill_(-1)


def wants_lora_graph(runner: Any, forced: bool | None) -> bool:
    """Whether a `GPUModelRunner` has to run a CUDA graph with LoRA, whatever its own batch has.

    Args:
        runner: the model runner.
        forced: upstream's ``force_has_lora``: not None while graphs are captured, and for dummy
            batches.
    """
    group = runner.parallel_config.data_parallel_size > 1
    if not group or runner.lora_config is None or not runner.model_config.is_moe:
        return False
    return forced is None or has_adapters(runner)
