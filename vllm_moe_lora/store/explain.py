"""Upstream's refusals, said again with the tensor's name and the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_moe_lora.adapters import folder as files
from vllm_moe_lora.adapters.config import Config
from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.adapters.group import group, refuse_what_is_not_lora
from vllm_moe_lora.adapters.resolve import resolve
from vllm_moe_lora.store.fit import dims_of, is_experts
from vllm_moe_lora.store.strict import rank_text


def explain(manager: Any, folder: Path, error: ValueError) -> AdapterError | None:
    """What is wrong with an adapter that upstream refused, None where this reader sees nothing.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model.
        folder: of the adapter.
        error: upstream's.
    """
    if isinstance(error, AdapterError):
        return None
    try:
        found = group(files.tensors(folder))
        refuse_what_is_not_lora(found)
        if "max_lora_rank" not in str(error):
            return None
        ranks = [(t.shape[0], key) for key, t in found.dense.items() if "lora_A" in key]
        wrapper = next((m for m in manager.modules.values() if is_experts(m)), None)
        if found.experts and wrapper is not None:
            config = Config.from_folder(folder)
            experts, _ = resolve(found.experts, dims_of(manager, wrapper), config)
            ranks += [(part.rank, part.label) for one in experts for _, part in one]
    except AdapterError as better:
        return better
    limit = manager.lora_config.max_lora_rank
    rank, tensor = max(ranks, default=(0, ""))
    return AdapterError(rank_text(tensor, rank, limit)) if rank > limit else None
