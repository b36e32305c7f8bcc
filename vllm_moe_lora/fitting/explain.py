"""Words the error for an adapter that failed to load: which adapter, which tensor, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters import folder as files
from ..adapters.config import Config
from ..adapters.errors import AdapterError, message_prefix, rank_text
from ..adapters.group import group, refuse_what_is_not_lora
from ..adapters.layouts.recognise import resolve
from .moe_layers import dims_of, is_experts


def refusal(manager: Any, request: Any, error: Exception) -> Exception:
    """The error to raise for an adapter whose load raised ``error``.

    If vLLM or a library raised it, the adapter is read again by this package, which may find a
    better reason.

    Args:
        manager: vLLM's `LoRAModelManager` of a MoE model.
        request: the LoRARequest.
        error: raised by this package, by vLLM or by a library.

    Returns:
        An `AdapterError` whose message starts with `errors.message_prefix`. The front end finds the
        message by it. If the adapter's folder was not found, ``error`` itself: vLLM's servers
        already answer that one well.
    """
    prefix = message_prefix(request.lora_int_id)
    if str(error).startswith(prefix) or type(error).__name__ == "LoRAAdapterNotFoundError":
        return error
    better = error
    if not isinstance(error, AdapterError):
        better = _reason(manager, Path(request.lora_path), error) or error
    text = str(better) if isinstance(better, AdapterError) else _generic_text(better)
    return AdapterError(prefix + text)


def _generic_text(error: Exception) -> str:
    return f"it cannot be loaded: {type(error).__name__}: {error}".rstrip(": ")


def _reason(manager: Any, folder: Path, error: Exception) -> AdapterError | None:
    """Our reader's reason why an adapter that vLLM refused cannot load; None if it has none."""
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
