"""Refusals as one sentence: which adapter, which tensor, and the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters import folder as files
from ..adapters.config import Config
from ..adapters.errors import AdapterError, head, rank_text
from ..adapters.group import group, refuse_what_is_not_lora
from ..adapters.layouts.recognise import resolve
from .moe_layers import dims_of, is_experts


def refusal(manager: Any, request: Any, error: Exception) -> Exception:
    """What the caller is to get for an adapter whose load ended in ``error``.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model.
        request: the LoRARequest.
        error: this package's, upstream's, or what a library raised.

    Returns:
        An `AdapterError` that begins with "LoRA adapter N: ", by which the front end knows it;
        ``error`` itself where no adapter was found at all, which upstream tells its callers well.
    """
    named = head(request.lora_int_id)
    if str(error).startswith(named) or type(error).__name__ == "LoRAAdapterNotFoundError":
        return error
    better = error
    if not isinstance(error, AdapterError):
        better = _reason(manager, Path(request.lora_path), error) or error
    text = str(better) if isinstance(better, AdapterError) else _said(better)
    return AdapterError(named + text)


def _said(error: Exception) -> str:
    return f"it cannot be loaded: {type(error).__name__}: {error}".rstrip(": ")


def _reason(manager: Any, folder: Path, error: Exception) -> AdapterError | None:
    """What our reader says of an adapter that upstream refused, None where it has no objection."""
    try:
        config = Config.from_folder(folder)
        found = group(files.tensors(folder))
        refuse_what_is_not_lora(found)
        if "max_lora_rank" not in str(error):
            return None
        ranks = [(t.shape[0], key) for key, t in found.dense.items() if "lora_A" in key]
        wrapper = next((m for m in manager.modules.values() if is_experts(m)), None)
        if found.experts and wrapper is not None:
            experts, _ = resolve(found.experts, dims_of(manager, wrapper), config)
            ranks += [(part.rank, part.label) for one in experts for _, part in one]
    except AdapterError as better:
        return better
    limit = manager.lora_config.max_lora_rank
    rank, tensor = max(ranks, default=(0, ""))
    return AdapterError(rank_text(tensor, rank, limit)) if rank > limit else None
